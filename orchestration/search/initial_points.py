"""The points with which a search begins, as a study, for ``mar plan``."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from mar.config.overrides import SettingError
from mar.data.annotations import fingerprint
from mar.errors import UserError
from orchestration.search.schema import Search
from orchestration.studies.schema import StudyFile
from orchestration.studies.trial import ABSENT, Study, Trial


def as_study(search: Search) -> Study:
    """Return a study with a trial for each initial point of a search.

    A search without initial points gives one trial: its recipe unchanged.

    Raises:
        UserError: a point breaks a rule of the settings.
    """
    trials: list[Trial] = []
    for point in search.file.initial_points or ({},):
        label = ", ".join(f"{path}={value}" for path, value in point.items()) or "the recipe"
        try:
            settings = search.settings(point)
        except SettingError as error:
            raise UserError(f"initial_points: {label}: {error}") from None
        content = ABSENT
        # The costs of a point follow from its settings, so data that cannot be read is no error.
        with suppress(UserError):
            if Path(settings.data.root).is_dir():
                content = fingerprint(settings.data)
        trials.append(Trial({"point": label}, settings, content))
    # The report of a study needs an axis; its labels are those of the trials.
    file = StudyFile(title=search.file.title, recipe=search.file.recipe, axes={"point": {}})
    return Study(search.name, file, trials)
