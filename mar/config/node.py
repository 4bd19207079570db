"""The base class of every branch of the settings tree."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Node(BaseModel):
    """A branch of the settings tree: immutable, and unknown names are refused."""

    # Without extra="forbid" pydantic would ignore a misspelt setting, and the trial would train
    # with the default. Infinity and nan are refused because no setting can use them, and JSON, in
    # which settings are stored, has neither.
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
