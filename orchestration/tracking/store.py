"""The tracking store: reads runs, and finds or creates them by their tags.

A study is an experiment with one parent run, which each launch of the study finds by its tags. A
trial is a child run. A trial's tag ``mar.identity`` identifies its training across studies.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mar import MANIFEST, RESULT_DIR
from mar.config.overrides import flatten
from mar.errors import Failure
from orchestration.config import LaunchConfig
from orchestration.tracking.client import (
    MlflowClient,
    MlflowException,
    Param,
    Run,
    RunTag,
    explained,
)
from orchestration.tracking.embedded import follow_move, one_at_a_time
from orchestration.tracking.run_record import RunRecord
from orchestration.tracking.tags import EXPECTED, FOLDER, KIND, OVERRIDES

_NO_REGISTRY = (
    "INVALID_PARAMETER_VALUE",
    "FEATURE_DISABLED",
    "ENDPOINT_NOT_FOUND",
    "PERMISSION_DENIED",
)
"""Error codes of a store that has no registry, or refuses our models: a run is complete without."""
VIEW = "mar"
"""The name of the view that a study's page opens with: columns and order."""
_WHOLE_VIEW: dict[str, Any] = {
    "searchFilter": "",
    "startTime": "ALL",
    "lifecycleFilter": "Active",
    "modelVersionFilter": "All Runs",
    "datasetsFilter": [],
    "runsExpanded": {},
    "runsPinned": [],
    "runsHidden": [],
}
_PARAMS_PER_BATCH = 90
"""MLflow accepts at most 100 parameters in one call."""


class Store:
    """The tracking store, for reading and for making runs."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        with explained(launch):
            if launch.tracking_uri is None:
                launch.store.mkdir(parents=True, exist_ok=True)
            # The first call to a new database creates its tables.
            with one_at_a_time(launch):
                self.client = MlflowClient(tracking_uri=launch.tracking)
                experiments = list(self._pages(self.client.search_experiments))
                if launch.tracking_uri is None:
                    follow_move(launch, [str(each.artifact_location) for each in experiments])

    def trials(self) -> list[RunRecord]:
        """Return every trial's run, of all studies, newest first."""
        with explained(self.launch), _uncollected():
            names = {
                item.experiment_id: item.name
                for item in self._pages(self.client.search_experiments)
            }
            runs = self._runs(names, f"tags.`{KIND}` = 'trial'")
        return [_record(run, names[run.info.experiment_id]) for run in runs]

    def trial(self, run_id: str) -> RunRecord:
        """Return one trial's run.

        Raises:
            MlflowException: there is no such run.
        """
        run = self.client.get_run(run_id)
        return _record(run, self.client.get_experiment(run.info.experiment_id).name)

    def expected(self) -> dict[str, int]:
        """Return the number of trials that each study has, finished or not, by its last launch."""
        with explained(self.launch):
            names = {
                item.experiment_id: item.name
                for item in self._pages(self.client.search_experiments)
            }
            runs = self._runs(names, f"tags.`{KIND}` = 'study'")
        return {names[run.info.experiment_id]: int(run.data.tags.get(EXPECTED, 0)) for run in runs}

    def last_overrides(self, study: str) -> list[str]:
        """Return the overrides of a study's last launch; empty if that is not known here."""
        with explained(self.launch):
            found = self.client.get_experiment_by_name(study)
            if found is None:
                return []
            runs = self._runs([found.experiment_id], f"tags.`{KIND}` = 'study'")
        # Launches of an earlier version did not record them.
        return [word for run in runs for word in json.loads(run.data.tags.get(OVERRIDES, "[]"))]

    def _runs(self, experiment_ids: Iterable[str], query: str) -> list[Run]:
        """Return all runs of some experiments that a query finds."""
        ids = list(experiment_ids)
        # MLflow refuses a search in no experiment.
        if not ids:
            return []

        def page(page_token: str | None) -> Any:
            return self.client.search_runs(ids, query, max_results=1000, page_token=page_token)

        return list(self._pages(page))

    def result_of(self, record: RunRecord) -> Path:
        """Return the result folder of a finished trial, downloaded if it is not on this disk.

        Raises:
            Failure: neither this disk nor MLflow has it.
        """
        # The manifest is written last: a folder without one is incomplete, and is downloaded.
        here = self.launch.trial_folder(record.key) / RESULT_DIR
        if not (here / MANIFEST).is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            with explained(self.launch):
                return Path(
                    self.client.download_artifacts(record.run_id, RESULT_DIR, str(here.parent))
                )
        return here

    def file_of(self, record: RunRecord, name: str) -> Path:
        """Return one file of a finished trial's result, downloaded if it is not on this disk.

        Raises:
            Failure: neither this disk nor MLflow has it, or the result has no such file.
        """
        here = self.launch.trial_folder(record.key) / RESULT_DIR / name
        # One file must not lie in the trial's folder, where it would look like a part of a result.
        fetched = self.launch.store.resolve() / "fetched" / record.run_id
        if here.is_file():
            return here
        if (here.parent / MANIFEST).is_file():
            raise Failure(f"{here.parent}: this result has no {name}")
        if not (fetched / name).is_file():
            fetched.mkdir(parents=True, exist_ok=True)
            with explained(self.launch):
                return Path(
                    self.client.download_artifacts(
                        record.run_id, f"{RESULT_DIR}/{name}", str(fetched)
                    )
                )
        return fetched / name

    def experiment(self, study: str) -> str:
        """Return the id of the study's experiment; creates it if it does not exist."""
        with explained(self.launch):
            found = self.client.get_experiment_by_name(study)
            # MLflow keeps the name of an experiment that was deleted in its pages, and refuses to
            # create another of that name.
            if found and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            if found:
                return found.experiment_id
            # Without this tag MLflow 3 opens the experiment's page in its view of LLM traces.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return self.client.create_experiment(
                study, artifact_location=self.launch.artifacts, tags=kind
            )

    def show_columns(
        self, experiment_id: str, metrics: Sequence[str], params: Sequence[str]
    ) -> None:
        """Set the view ``VIEW`` of an experiment's page to these columns.

        The runs are sorted by the first metric, the greatest value first.
        """
        columns = ["attributes.`Created`", "attributes.`Duration`"]
        columns += [f"metrics.`{name}`" for name in metrics] + [
            f"params.`{name}`" for name in params
        ]
        if metrics:
            order = {"orderByKey": f"metrics.`{metrics[0]}`", "orderByAsc": False}
        else:
            order = {}
        shown = {**_WHOLE_VIEW, **order, "selectedColumns": columns}
        # MLflow's pages store a shared view in a tag of this name; its API has no call for that.
        with explained(self.launch):
            self.client.set_experiment_tag(
                experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(shown)
            )

    def pages(self) -> dict[str, str]:
        """Return each study's page, below the server's address, in the view of ``show_columns``."""
        # MLflow makes an experiment "Default" with the id 0, which is no study.
        with explained(self.launch):
            studies = [
                item
                for item in self._pages(self.client.search_experiments)
                if item.experiment_id != "0"
            ]
        return {
            item.name: f"/#/experiments/{item.experiment_id}/runs?viewStateShareKey={VIEW}"
            for item in sorted(studies, key=lambda item: item.name)
        }

    def close_stale(self, experiment_id: str) -> int:
        """Mark as killed the trials that are running in MLflow and were left by a killed launch.

        Call it while holding the study's lock, so that no launch of this store runs them.

        Returns:
            How many they were.
        """
        # A server may have runs of the same study from another store, whose launch may be alive.
        ours = f"{self.launch.store.resolve()}/"
        # All runs of an embedded store are its own, also those with its path before it was moved.
        is_embedded = self.launch.tracking_uri is None
        with explained(self.launch):
            running = self._runs([experiment_id], "attributes.status = 'RUNNING'")
            folders = {run.info.run_id: run.data.tags.get(FOLDER, "") for run in running}
            stale = [
                run_id
                for run_id, folder in folders.items()
                if folder and (is_embedded or folder.startswith(ours))
            ]
            for run_id in stale:
                self.client.set_terminated(run_id, "KILLED")
        return len(stale)

    def register(
        self, run_id: str, name: str, tags: Mapping[str, str], alias: str = "latest"
    ) -> None:
        """Make a run's result a version of a study's registered model, and give it an alias.

        A version that exists is not made again. Does nothing if the store has no registry.
        """
        # The writer may try this again after a call in the middle of it failed, so each step looks
        # first whether it is done.
        try:
            if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
                self.client.create_registered_model(name)
            # A study's best model may be another study's too, which shares the trial.
            found = self.client.search_model_versions(f"run_id = '{run_id}'")
            versions = [each.version for each in found if each.name == name]
            if not versions:
                source = f"{self.client.get_run(run_id).info.artifact_uri}/{RESULT_DIR}"
                made = self.client.create_model_version(name, source, run_id, tags=dict(tags))
                versions = [made.version]
            self.client.set_registered_model_alias(name, alias, str(versions[0]))
        except MlflowException as error:
            # Any other error may pass, as a server that restarts: the writer tries again.
            if error.error_code not in _NO_REGISTRY:
                raise

    def run(
        self, experiment_id: str, name: str, find: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """Return the id of the run that has the tags ``find``, and set its status to RUNNING.

        Creates the run if it does not exist.
        """
        with explained(self.launch):
            query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in find.items())
            runs = self.client.search_runs([experiment_id], query, max_results=1)
            if not runs:
                return self.client.create_run(
                    experiment_id, tags={**find, **tags}, run_name=name
                ).info.run_id
            run_id = runs[0].info.run_id
            # The tags are written again: versions and host are those of this launch.
            self.client.update_run(run_id, status="RUNNING")
            self.client.log_batch(run_id, tags=[RunTag(tag, value) for tag, value in tags.items()])
        return run_id

    def parameters(self, run_id: str, settings: Mapping[str, Any]) -> None:
        """Log flattened settings as parameters."""
        params = [Param(path, _parameter(value)) for path, value in flatten(settings).items()]
        with explained(self.launch):
            for first in range(0, len(params), _PARAMS_PER_BATCH):
                self.client.log_batch(run_id, params=params[first : first + _PARAMS_PER_BATCH])

    def _pages(self, search: Callable[..., Any]) -> Iterator[Any]:
        """Yield the items of all pages of a search."""
        token = None
        while True:
            page = search(page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _record(run: Run, experiment: str) -> RunRecord:
    return RunRecord(
        run.info.run_id,
        experiment,
        run.info.experiment_id,
        run.info.status,
        run.data.metrics,
        run.data.tags,
    )


def _parameter(value: Any) -> str:
    """Return a setting's value as MLflow stores it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """Suspend garbage collection.

    MLflow makes about a hundred objects of each run, none of them garbage. To read 2,000 runs, the
    collector took 3.3 of 5.4 s.
    """
    # The caller may have disabled it for itself.
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
