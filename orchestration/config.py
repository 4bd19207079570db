"""Where and how trials run. Nothing here changes a result, and nothing here is part of a trial's identity."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self
from urllib.parse import quote

from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from mar.safe_input import below
from mar.training.retention import RetentionPolicy
from orchestration.secrets import without_secrets


def sqlite_address(file: Path) -> str:
    """Return the address of an SQLite file, whatever characters its path has.

    In an address ``?`` begins the options and ``%`` a code, so such characters are written as codes. Then so are the
    slashes: MLflow makes the folder that stands before the last slash without reading the codes.
    """
    path = str(file)
    return f"sqlite:///{path if quote(path) == path else quote(path, safe='')}"


class LaunchConfig(BaseModel):
    """One launch of a study."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    store: Path = Path("mar_store")
    """Folder of the embedded tracking store, of checkpoints and of reports; shared storage on a cluster."""
    tracking_uri: str | None = None
    """MLflow server; none: SQLite and a folder below ``store``."""
    backend: Literal["train", "inline", "local"] = "train"
    """``train``: Ray Train workers. ``inline``: inside Tune's trial, one worker. ``local``: no Ray at all."""
    address: str | None = None
    """Ray cluster to join; none: a private one on this machine, reachable from here only."""
    workers: PositiveInt = 1
    """Data-parallel workers of a trial."""
    min_workers: PositiveInt | None = None
    """Elastic: a trial goes on with as few as these where there are no more, and grows again; none: ``workers``."""
    cpus_per_worker: PositiveInt = 1
    gpus_per_worker: NonNegativeInt | None = None
    """None: one where there are any."""
    max_concurrent_trials: PositiveInt | None = None
    """None: as many as the cluster holds."""
    loader_processes: NonNegativeInt = 0
    """Decoding processes of a worker; 0: the worker decodes itself."""
    max_microbatch_clips: PositiveInt | None = None
    """Gradient accumulation: largest forward-backward pass of one worker, clips."""
    activation_checkpointing: bool = False
    """Where memory is short: compute activations again in the backward pass; a third more work."""
    compile: bool = False
    """Compile the model's blocks: half a minute and more at a trial's start; ``mar bench`` on a GPU says whether it pays."""
    checkpoint_every_steps: PositiveInt | None = None
    """Checkpoint inside an epoch too; an epoch's end always has one."""
    keep: RetentionPolicy = RetentionPolicy()
    """Which checkpoints of a trial stay."""
    remote: str | None = None
    """Object store (``s3://…``, ``gs://…``) for checkpoints and results, where the nodes share no disk."""
    cache_from: str | None = None
    """Object store that has the frame cache: each node fetches it to ``data.cache`` once."""
    study: str = ""
    """Name of the study that is run."""
    hang_timeout_s: PositiveFloat | None = 1800.0
    """A worker that did nothing for so long is ended, its stacks in the log, and started again; none: never."""
    webhook: str | None = None
    """Address that hears, in JSON, when a study ends."""
    retries: NonNegativeInt = 1
    """Times a trial that Ray lost goes on from its last checkpoint; ``local`` has no such second try."""
    retry_numbers: bool = False
    """Also try again after a gradient that is not finite."""
    patience_s: PositiveFloat = 300.0
    """How long to wait for room on a full disk, and, when all is trained, for a tracking store that is away; seconds."""
    resize_s: PositiveFloat = 60.0
    """How often an elastic trial looks for more workers, seconds."""
    poll_s: PositiveFloat = 0.5
    """How often Ray Train looks at its workers, seconds."""

    @model_validator(mode="after")
    def _at_most_workers(self) -> Self:
        if (self.min_workers or 1) > self.workers:
            raise ValueError(
                f"min_workers: {self.min_workers} is more than the {self.workers} workers"
            )
        return self

    @property
    def database(self) -> Path:
        """The embedded tracking store's file."""
        return self.store.resolve() / "mlflow.db"

    @property
    def tracking(self) -> str:
        """The MLflow address."""
        return self.tracking_uri or sqlite_address(self.database)

    @property
    def shown_tracking(self) -> str:
        """The MLflow address as a message may have it: without a password."""
        return without_secrets(self.tracking)

    @property
    def artifacts(self) -> str | None:
        """Where a database's artifacts are kept: below ``store``; a server knows its own place, then none."""
        is_server = self.tracking.startswith(("http://", "https://", "databricks"))
        return None if is_server else (self.store.resolve() / "artifacts").as_uri()

    def trial_folder(self, key: str) -> Path:
        """Return the folder of a trial's checkpoints and result."""
        return below(self.store.resolve() / "trials", key)

    @property
    def stop_file(self) -> Path:
        """Return the file whose being there asks the study's workers to save and stop."""
        return self.store.resolve() / "locks" / f"{self.study}.stop"

    def report_folder(self, study: str) -> Path:
        """Return the folder of a study's tables and figures."""
        return self.store.resolve() / "reports" / study
