"""Families of recipes: a folder whose recipes replace the recipes of a study by their names.

``recipe=released`` puts a study on the recipes of ``recipes/released``. A family of another size
also has a file ``family.yaml``: the values of the paper's studies that mean nothing at its size,
each with the value that stands for it, and the seeds of every study.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from mar.config.overrides import SETTING_PATHS
from mar.errors import UserError
from orchestration.installation import packaged
from orchestration.studies.schema import StudyFile
from orchestration.studies.validation import mistake_in
from orchestration.studies.yaml_document import FAMILY_FILE, Document


class StandIn(BaseModel):
    """A value that stands for one of the paper's."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    setting: str
    """The setting's dotted path."""
    paper: Any
    """The value in the studies."""
    here: Any
    """The value that the trials get."""


class FamilyFile(BaseModel):
    """The content of ``family.yaml``."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    seeds: tuple[NonNegativeInt, ...] | None = None
    """The seeds of each study; none: those of its file."""
    stand_ins: tuple[StandIn, ...] = ()
    """What replaces values of the studies' rows."""
    notes: tuple[str, ...] = ()
    """Notes that are printed below every table."""


class Family:
    """A folder of recipes.

    Raises:
        UserError: its ``family.yaml`` has a mistake.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = FamilyFile()
        path = folder / FAMILY_FILE
        if path.is_file():
            self.file = _read(Document(path))

    def recipe(self, name: str) -> str:
        """Return the family's recipe of the same name; without one, the recipe itself."""
        near = self.folder / Path(name).name
        return str(near) if near.is_file() else name

    def study(self, file: StudyFile) -> StudyFile:
        """Return a study's content with the family's values, seeds and notes."""
        used: set[int] = set()
        axes = {
            axis: {label: self._replaced(settings, used) for label, settings in labels.items()}
            for axis, labels in file.axes.items()
        }
        fixed = self._replaced(file.fixed, used)
        stand_ins = [self.file.stand_ins[index] for index in sorted(used)]
        notes = (*file.notes, *self.file.notes, *(_note(each) for each in stand_ins))
        update: dict[str, Any] = {"axes": axes, "fixed": fixed, "notes": notes}
        if self.file.seeds is not None:
            update["seeds"] = self.file.seeds
        return file.model_copy(update=update)

    def _replaced(self, settings: Mapping[str, Any], used: set[int]) -> dict[str, Any]:
        """Return settings with the values that stand for them; add what was used to ``used``."""
        replaced = dict(settings)
        for index, stand_in in enumerate(self.file.stand_ins):
            # Compared with what the study says: a stand-in does not apply to another's value.
            if settings.get(stand_in.setting) == stand_in.paper:
                replaced[stand_in.setting] = stand_in.here
                used.add(index)
        return replaced


def find_family(name: str) -> Family | None:
    """Return the family that ``recipe=NAME`` means; None where the name is no folder of recipes.

    A folder of the user's wins over the packaged one of the same name.
    """
    for folder in (Path(name), packaged("search_spaces") / "recipes" / name):
        # Any folder may have a family's name, as docs/mini: without recipes it would replace none,
        # and the study would train what it was not asked for.
        if any(folder.glob("*.yaml")):
            return Family(folder.resolve())
    return None


def _read(document: Document) -> FamilyFile:
    try:
        file = FamilyFile.model_validate(document.content)
    except ValidationError as error:
        raise UserError(mistake_in(document, error, FamilyFile)) from None
    for stand_in in file.stand_ins:
        if stand_in.setting not in SETTING_PATHS:
            raise UserError(
                f"{document.location('stand_ins')}: stand_ins: there is no setting "
                f"{stand_in.setting!r}"
            )
    return file


def _note(stand_in: StandIn) -> str:
    here = _text(stand_in.here)
    return f"{stand_in.setting}: {here} stands for the paper's {_text(stand_in.paper)}."


def _text(value: Any) -> str:
    """Return a value for a reader: a list of lengths as a product."""
    if isinstance(value, list):
        parts: list[Any] = value
        return " × ".join(str(part) for part in parts)
    return str(value)
