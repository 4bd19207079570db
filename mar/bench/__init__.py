"""How fast it is, beside its peers, on this machine. Needs torch, timm, numpy and pydantic alone: ``python -m mar.bench``."""
