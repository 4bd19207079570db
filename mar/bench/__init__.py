"""Benchmarks of MAR beside its peers on this machine, without Ray or MLflow."""
