"""How fast it is, beside its peers, on this machine.

Needs no Ray and no MLflow: ``python -m mar.bench``.
"""
