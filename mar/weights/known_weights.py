"""The pre-trained weights that mar is known to read (``known_weights.yaml``)."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from mar.safe_input import parse_yaml


class KnownWeights(BaseModel):
    """Weights that somebody published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """What ``encoder.weights`` takes; of a file that must be fetched first, its file name."""
    model: str
    data: str
    """What it was pre-trained on."""
    licence: str
    checked: str
    """How its layout is tested here."""
    accuracy: str
    """As published, top-1."""
    address: str = ""
    """Where to fetch a file that has no name on the hub."""
    epochs: int | None = None
    settings: str = ""
    """What a recipe needs besides."""
    recipe: str = ""
    """A recipe that starts from it."""


def known_weights() -> list[KnownWeights]:
    """Return all of them, in the file's order."""
    text = (Path(__file__).parent / "known_weights.yaml").read_text(encoding="utf-8")
    return [KnownWeights.model_validate(each) for each in parse_yaml(text)[0]]
