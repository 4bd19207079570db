"""The experiment for Python: studies, their results as DataFrames, and models from MLflow.

``import mar`` offers these names: ``mar.load``, ``mar.Study``, ``mar.results``. The command's verbs
read and run studies by the same functions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pydantic import TypeAdapter, ValidationError

from mar.errors import UserError
from mar.training.retention import RetentionPolicy
from orchestration.config import DEFAULT_STORE, LaunchConfig, WorkerConfig
from orchestration.stored_results import (
    file_finder,
    has_store,
    named_in_store,
    records_of_store,
    results_of,
)
from orchestration.studies.loader import read_study
from orchestration.studies.names import name_of

# Not at the top for real: pandas, torch and MLflow take seconds to load, and a plan needs none.
if TYPE_CHECKING:
    import pandas as pd

    from mar.inference import Model
    from orchestration.reporting.study_results import StudyResults
    from orchestration.studies.trial import Study as ResolvedStudy
    from orchestration.tracking.run_record import RunRecord

_MLFLOW_ADDRESSES = ("runs:/", "models:/")


def load(
    name: str | Path,
    overrides: Mapping[str, Any] | None = None,
    *,
    store: str | Path = DEFAULT_STORE,
    tracking_uri: str | None = None,
) -> Model:
    """Return a trained model, on this machine's accelerator if it has one.

    Args:
        name: A trial's result folder, a file or folder of weights of any known layout,
            ``organisation/model`` on Hugging Face, a timm model's name, ``mini``, which ships with
            mar; or of MLflow a run, ``runs:/RUN_ID``, or a registered model, ``models:/STUDY/1``
            or ``models:/STUDY@best``.
        overrides: Settings to use instead of the model's, by path: ``{"mask.ratio": 0.75}``.
        store: Folder of the tracking store, for a name of MLflow.
        tracking_uri: Address of an MLflow server, in place of ``store``'s.

    Raises:
        UserError: there is no such model, it is not of a known layout, or does not fit.
        Failure: MLflow does not answer.
    """
    from mar.inference import load_model

    text = str(name)
    if text.startswith(_MLFLOW_ADDRESSES):
        from orchestration.tracking.models import result_folder

        text = str(result_folder(text, LaunchConfig(Path(store), tracking_uri)))
    return load_model(text, overrides)


@dataclass(frozen=True)
class Study:
    """A study that can be planned, run and read; its results are in the store.

    >>> study = mar.Study.read("quickstart", {"recipe.epochs": 2})
    >>> study.run(backend="inline").table()
    """

    name: str
    """A study file, the name of one that ships with mar, or a recipe."""
    overrides: tuple[str, ...] = ()
    """Settings that replace the file's, each as ``path=value``."""
    store: Path = DEFAULT_STORE
    """Folder of checkpoints, results and the tracking store."""
    tracking_uri: str | None = None
    """Address of an MLflow server, in place of the store's."""

    @classmethod
    def read(
        cls,
        name: str | Path,
        overrides: Mapping[str, Any] | Sequence[str] = (),
        *,
        store: str | Path = DEFAULT_STORE,
        tracking_uri: str | None = None,
    ) -> Self:
        """Return a study; its file and settings are checked.

        Args:
            name: A study file, the name of one that ships with mar, or a recipe.
            overrides: Settings by path, ``{"recipe.epochs": 2}``, or as on the command line,
                ``["recipe.epochs=2"]``.
            store: Folder of checkpoints, results and the tracking store.
            tracking_uri: Address of an MLflow server, in place of the store's.

        Raises:
            UserError: a bad file, setting or label; the message says where.
        """
        if isinstance(overrides, Mapping):
            arguments = [f"{path}={_yaml(value)}" for path, value in overrides.items()]
        else:
            arguments = list(overrides)
        study = cls(str(name), tuple(arguments), Path(store), tracking_uri)
        _ = study.resolved
        return study

    @cached_property
    def resolved(self) -> ResolvedStudy:
        """The study's trials with their complete settings, in its order."""
        return named_in_store(read_study(self.name, self.overrides), self.store)

    def plan(self) -> pd.DataFrame:
        """Return a row for each trial: whether it is finished, and what it costs.

        ``state`` is ``have`` (finished), ``new`` (to train), ``test`` (to test only, with a model
        that exists) or ``same`` (an earlier trial is the same). ``device_hours`` is known after a
        trial has finished.
        """
        import pandas as pd

        from orchestration.studies.plan import plan_json, plan_trials

        rows = json.loads(plan_json(plan_trials(self.resolved, self._records())))
        return pd.DataFrame(rows)

    def run(self, **options: Any) -> Self:
        """Train what is missing; what was trained before, also by other studies, is used.

        Args:
            **options: Those of ``mar run``, with underscores: ``backend="inline"`` (``train``,
                ``inline`` or ``local``), ``workers=8``, ``gpus_per_worker=1``, …: the fields of
                ``orchestration.config.LaunchConfig`` and ``WorkerConfig``.

        Returns:
            The study itself, so that ``study.run().table()`` works.

        Raises:
            UserError: the data is missing, an option is unknown, or another launch runs the study.
            Failure: a trial failed permanently; the others are finished and kept.
        """
        from orchestration.execution.study_runner import run_study

        study = named_in_store(self.resolved, self.store, claims=True)
        run_study(study, _launch(self.store, self.tracking_uri, options))
        return self

    def results(self) -> StudyResults:
        """Return the finished runs of its trials, for tables and figures of one's own."""
        if not has_store(self.store, self.tracking_uri):
            from orchestration.reporting.study_results import StudyResults

            return StudyResults(self.resolved, {})
        return results_of(self.resolved, self.store, self.tracking_uri)

    def table(self) -> pd.DataFrame:
        """Return the study's table: a row for each combination of labels, in its order.

        For each metric there is its mean over seeds; ``METRIC_n``, the number of values;
        ``METRIC_least`` and ``METRIC_greatest`` of several; ``METRIC_half_width``, half the mean's
        95 % confidence interval (Student's t; from three values on); and where the paper has a
        value, ``METRIC_paper``. With a reference row, ``difference`` is each other row's top-1
        minus the reference's, with its 95 % interval (``difference_low``, ``difference_high``) and
        p value (``difference_p``, corrected by Holm's method).
        """
        import pandas as pd

        from orchestration.reporting.tables import table_info

        info = table_info(self.results())
        rows: list[dict[str, Any]] = []
        for row in info.rows:
            values: dict[str, Any] = {}
            for name in info.columns:
                cell = row.cells[name]
                values[name] = cell.mean
                values[f"{name}_n"] = len(cell.values)
                if len(cell.values) > 1:
                    values[f"{name}_least"] = min(cell.values)
                    values[f"{name}_greatest"] = max(cell.values)
                if len(cell.values) > 2:
                    values[f"{name}_half_width"] = cell.half_width
                values[f"{name}_paper"] = cell.paper
            compared = info.comparisons.get(row.label)
            if compared is not None:
                values["difference"] = compared.difference
                values["difference_low"] = compared.low
                values["difference_high"] = compared.high
                values["difference_p"] = compared.p
            rows.append({**dict(zip(info.axes, row.labels, strict=True)), **values})
        frame = pd.DataFrame(rows)
        # Columns that no row fills, such as the paper's values of a study of one's own.
        unused = [
            column
            for column in frame.columns
            if column.endswith("_paper") and frame[column].isna().all()
        ]
        return frame.drop(columns=unused).set_index(list(info.axes))

    def figure(self, file: str | Path) -> Path:
        """Draw the study's figure (png, pdf, svg, or interactive html), and return the file."""
        from orchestration.reporting.drawing.plotly_figures import write_figure

        write_figure(self.results(), Path(file))
        return Path(file)

    def report(self, folder: str | Path | None = None) -> Path:
        """Write the table in every format, the figure and a page; return their folder."""
        from orchestration.reporting.study_report import write_report

        launch = LaunchConfig(self.store, self.tracking_uri)
        target = Path(folder) if folder else launch.report_folder(self.resolved.name)
        write_report(self.results(), target)
        return target

    def _records(self) -> list[RunRecord]:
        if not has_store(self.store, self.tracking_uri):
            return []
        return records_of_store(self.store, self.tracking_uri)


@dataclass(frozen=True)
class Results:
    """The runs of a store as DataFrames, by the id of their run in MLflow."""

    records: Sequence[RunRecord]
    find_file: Callable[[Any, str], Path]

    @cached_property
    def runs(self) -> pd.DataFrame:
        """A row for each run: its study, trial, status, key, and where its result is."""
        import pandas as pd

        from orchestration.tracking.tags import FOLDER

        rows = [
            {
                "run_id": run.run_id,
                "study": run.experiment,
                "trial": run.tags.get("mlflow.runName", ""),
                "status": run.status,
                "key": run.key,
                "folder": run.tags.get(FOLDER, ""),
            }
            for run in self.records
        ]
        columns = ["run_id", "study", "trial", "status", "key", "folder"]
        return pd.DataFrame(rows, columns=columns).set_index("run_id")

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A row for each run, a column for each metric: the last value."""
        import pandas as pd

        rows = {run.run_id: dict(run.metrics) for run in self.records}
        frame = pd.DataFrame.from_dict(rows, orient="index")
        frame.index.name = "run_id"
        return frame.sort_index(axis="columns")

    @cached_property
    def histories(self) -> pd.DataFrame:
        """The metrics of each epoch of finished trainings, by run and epoch.

        A trial that was only tested has none.
        """
        import pandas as pd

        frames: dict[str, pd.DataFrame] = {}
        for run in self.records:
            if run.status == "FINISHED" and run.was_trained:
                file = self.find_file(run, "history.csv")
                frames[run.run_id] = pd.read_csv(file, index_col="epoch")
        if not frames:
            return pd.DataFrame()
        return pd.concat(frames, names=["run_id"])


def results(
    study: str | None = None,
    *,
    store: str | Path = DEFAULT_STORE,
    tracking_uri: str | None = None,
) -> Results:
    """Return the runs of a study, or of all studies of a store.

    Args:
        study: The study's name in the store (its experiment in MLflow) or its file; None: all.
        store: Folder of the tracking store.
        tracking_uri: Address of an MLflow server, in place of ``store``'s.

    Raises:
        UserError: there is no such store, or it has no runs of the study.
    """
    folder = Path(store)
    if tracking_uri is None and not LaunchConfig(folder).database.is_file():
        raise UserError(f"store {folder}: no tracking store there; a study's run makes one")
    records = records_of_store(folder, tracking_uri)
    if study is not None:
        name = name_of(study, folder)
        experiments = sorted({record.experiment for record in records})
        records = [record for record in records if record.experiment == name]
        if not records:
            raise UserError(
                f"{study}: no runs of it in the store; it has {', '.join(experiments) or 'none'}"
            )
    return Results(records, file_finder(folder, tracking_uri))


def _launch(store: Path, tracking_uri: str | None, options: Mapping[str, Any]) -> LaunchConfig:
    """Return the configuration of a launch.

    Raises:
        UserError: an option is unknown, or its value out of range.
    """
    launch_names = {each.name for each in fields(LaunchConfig)} - {
        "store",
        "tracking_uri",
        "worker",
    }
    worker_names = {each.name for each in fields(WorkerConfig)}
    unknown = sorted(set(options) - launch_names - worker_names)
    if unknown:
        raise UserError(
            f"run({unknown[0]}=…): no such option; there are "
            f"{', '.join(sorted(launch_names | worker_names))}"
        )
    worker = {key: options[key] for key in options if key in worker_names}
    launch = {key: options[key] for key in options if key in launch_names}
    try:
        # As on the command line: "last=1,best".
        if isinstance(worker.get("keep"), str):
            worker["keep"] = RetentionPolicy.parse(worker["keep"])
        return TypeAdapter(LaunchConfig).validate_python(
            {**launch, "store": store, "tracking_uri": tracking_uri, "worker": worker}
        )
    # pydantic's own error, of a type or a range, is one too.
    except ValueError as error:
        raise UserError(f"run(): {_first_reason(error)}") from None


def _first_reason(error: ValueError) -> str:
    """Return the reason of an error in one line, with the option's name."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors()[0]
    # "Value error, " begins a message of our own, which has the option's name already.
    own = first["msg"].removeprefix("Value error, ")
    if own != first["msg"] or not first["loc"]:
        return own
    return f"{first['loc'][-1]}: {own}"


def _yaml(value: Any) -> str:
    """Return a value as it is written on the command line."""
    # JSON is YAML, in one line; its texts are quoted, so "1e-3" stays a text.
    return json.dumps(value)
