"""The tracking store: reads runs, and finds or creates them by their tags.

A study is an experiment, a launch of it a parent run (found again, not made anew, when the study
goes on), a trial a child run. A run's tag ``mar.identity`` says which training it is, whatever
study it belongs to.
"""

from __future__ import annotations

import contextlib
import gc
import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
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
from orchestration.tracking.tags import EXPECTED, FOLDER, KIND

_NO_REGISTRY = (
    "INVALID_PARAMETER_VALUE",
    "FEATURE_DISABLED",
    "ENDPOINT_NOT_FOUND",
    "PERMISSION_DENIED",
)
"""What a store answers that keeps no models, or not such: a run is whole without."""
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


class Store:
    """The tracking store, for reading and for making runs."""

    def __init__(self, launch: LaunchConfig) -> None:
        self.launch = launch
        with explained(launch):
            if launch.tracking_uri is None:
                launch.store.mkdir(parents=True, exist_ok=True)
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
            runs: list[Run] = []
            token = None
            while names:
                page = self.client.search_runs(
                    list(names), f"tags.`{KIND}` = 'trial'", max_results=1000, page_token=token
                )
                runs.extend(page)
                token = page.token
                if not token:
                    break
        return [
            RunRecord(
                run.info.run_id,
                names[run.info.experiment_id],
                run.info.experiment_id,
                run.info.status,
                run.data.metrics,
                run.data.tags,
            )
            for run in runs
        ]

    def expected(self) -> dict[str, int]:
        """Return how many trials each study had, or was to have, at its last launch."""
        with explained(self.launch):
            names = {
                item.experiment_id: item.name
                for item in self._pages(self.client.search_experiments)
            }
            if names:
                runs = self.client.search_runs(
                    list(names), f"tags.`{KIND}` = 'study'", max_results=1000
                )
            else:
                runs = []
        return {names[run.info.experiment_id]: int(run.data.tags.get(EXPECTED, 0)) for run in runs}

    def result_of(self, record: RunRecord) -> Path:
        """Return the result folder of a finished trial; downloads it where it was not trained.

        Raises:
            Failure: it is in neither place.
        """
        here = self.launch.trial_folder(record.key) / RESULT_DIR
        if not (here / MANIFEST).is_file():
            here.parent.mkdir(parents=True, exist_ok=True)
            with explained(self.launch):
                return Path(
                    self.client.download_artifacts(record.run_id, RESULT_DIR, str(here.parent))
                )
        return here

    def file_of(self, record: RunRecord, name: str) -> Path:
        """Return one file of a finished trial's result; downloads it where it is not on this disk.

        Raises:
            Failure: it is in neither place, or the result has no such file.
        """
        here = self.launch.trial_folder(record.key) / RESULT_DIR / name
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
        """Return the id of the study's experiment; makes it if there is none."""
        with explained(self.launch):
            found = self.client.get_experiment_by_name(study)
            if found and found.lifecycle_stage == "deleted":
                self.client.restore_experiment(found.experiment_id)
            if found:
                return found.experiment_id
            kind = {
                "mlflow.experimentKind": "custom_model_development"
            }  # its pages show runs first, not LLM traces
            return self.client.create_experiment(
                study, artifact_location=self.launch.artifacts, tags=kind
            )

    def show_columns(
        self, experiment_id: str, metrics: Sequence[str], params: Sequence[str]
    ) -> None:
        """Create the view of an experiment's page (``VIEW``) with these columns.

        The best runs by the first metric come first.
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
        with explained(self.launch):
            self.client.set_experiment_tag(
                experiment_id, f"mlflow.sharedViewState.{VIEW}", json.dumps(shown)
            )

    def pages(self) -> dict[str, str]:
        """Return each study's page below the server's address.

        It lists the runs in the view of ``show_columns``.
        """
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
        """Mark as killed the trials of this store that a driver that is no more left running.

        Returns how many.
        """
        ours = f"{self.launch.store.resolve()}/"
        is_embedded = (
            self.launch.tracking_uri is None
        )  # then all are of this store, wherever it was
        with explained(self.launch):
            running = self.client.search_runs(
                [experiment_id], "attributes.status = 'RUNNING'", max_results=1000
            )
            folders = {run.info.run_id: run.data.tags.get(FOLDER, "") for run in running}
            stale = [
                run_id
                for run_id, folder in folders.items()
                if folder and (is_embedded or folder.startswith(ours))
            ]
            for run_id in stale:
                self.client.set_terminated(run_id, "KILLED")
        return len(stale)

    def register(self, run_id: str, name: str, tags: Mapping[str, str]) -> None:
        """Make a run's result a version of the study's registered model, once.

        The weights are safetensors, without pickles.
        """
        try:
            if not self.client.search_registered_models(f"name = '{name}'", max_results=1):
                self.client.create_registered_model(name)
            if not self.client.search_model_versions(f"run_id = '{run_id}'"):
                source = f"{self.client.get_run(run_id).info.artifact_uri}/{RESULT_DIR}"
                self.client.create_model_version(name, source, run_id, tags=dict(tags))
        except MlflowException as error:
            if error.error_code not in _NO_REGISTRY:  # the store may be away: try again
                raise

    def run(
        self, experiment_id: str, name: str, find: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        """Return the id of the run that has the tags ``find``, running again.

        Makes it if there is none.
        """
        with explained(self.launch):
            query = " and ".join(f"tags.`{tag}` = '{value}'" for tag, value in find.items())
            runs = self.client.search_runs([experiment_id], query, max_results=1)
            if not runs:
                return self.client.create_run(
                    experiment_id, tags={**find, **tags}, run_name=name
                ).info.run_id
            run_id = runs[0].info.run_id
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
        token = None
        while True:
            page = search(page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _parameter(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@contextlib.contextmanager
def _uncollected() -> Generator[None]:
    """Suspend garbage collection.

    Among the hundred objects that MLflow makes of a run there is no garbage, and looking for it
    takes most of the time.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
