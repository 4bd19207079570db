"""The configuration of a launch: where and how trials run.

Nothing here changes a result, and nothing here is part of a trial's identity.

The options of ``mar run`` are made from these fields (``cli/launch_options.py``): a field's name
with hyphens is the option's name, and its help text here is the option's. The classes are plain
dataclasses, not pydantic models: every verb of the command imports this module, and ``mar --help``
must be quick.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote

from mar.safe_input import below
from mar.training.retention import RetentionPolicy
from orchestration.secrets import without_secrets

DEFAULT_STORE = Path("mar_store")
"""Folder of the store where none is given, in the working directory."""
AUTO_TRIALS = "auto"
"""``--trials-per-gpu``: by the memory that the largest trial needs."""
HELP = "help"
"""Key of a field's metadata: its meaning, its unit, and what none means."""
MINIMUM = "minimum"
"""Key of a field's metadata: the smallest value allowed."""
METAVAR = "metavar"
"""Key of a field's metadata: the placeholder for its value in the help."""


def _option(default: Any, help_text: str, **metadata: Any) -> Any:
    """Return a field with its help text, and optionally a minimum and a placeholder."""
    return field(default=default, metadata={HELP: help_text, **metadata})


def _check_minima(config: Any) -> None:
    """Check each field against its minimum.

    Raises:
        ValueError: a value is too small.
    """
    # Typer checks the options too; this also checks a configuration that a program makes.
    for each in fields(config):
        value = getattr(config, each.name)
        minimum = each.metadata.get(MINIMUM)
        if minimum is not None and value is not None and value < minimum:
            raise ValueError(f"{each.name}: {value} is less than {minimum}")


def sqlite_address(file: Path) -> str:
    """Return the address of an SQLite file, whatever characters its path has.

    In an address ``?`` begins the options and ``%`` a code, so such characters are written as
    codes. Then the slashes are too: MLflow creates the folder before the last slash without
    decoding the codes.
    """
    path = str(file)
    # ``quote`` keeps slashes; a path that has no other special character stays as it is.
    quoted = quote(path)
    if quoted != path:
        quoted = quote(path, safe="")
    return f"sqlite:///{quoted}"


@dataclass(frozen=True)
class WorkerConfig:
    """How the workers of one trial run; it is sent to them as JSON.

    Raises:
        ValueError: a value is out of its range.
    """

    workers: int = _option(1, "Data-parallel workers of a trial.", minimum=1)
    # None: all workers are needed, and a trial whose node is lost waits for another node.
    min_workers: int | None = _option(
        None,
        "Elastic: continue with as few workers as this when nodes are lost, and grow again later. "
        "Default: --workers.",
        minimum=1,
    )
    cpus_per_worker: float = _option(
        1.0, "CPU cores of a worker; a fraction lets more workers share them.", minimum=0.01
    )
    # None: decided by the cluster's resources, since the launch's own machine may have no GPU.
    gpus_per_worker: float | None = _option(
        None,
        "GPUs of a worker; 0.25: four workers share one. Default: one if the cluster has any, "
        "otherwise none.",
        minimum=0,
    )
    loader_processes: int = _option(
        0, "Decoding processes of a worker; 0: the worker decodes itself.", minimum=0
    )
    # At least two: where mixup or cutmix mix neighbours, a pair is in one pass.
    max_microbatch_clips: int | None = _option(
        None,
        "Clips in a worker's largest forward-backward pass; above this, gradients are accumulated.",
        minimum=2,
    )
    activation_checkpointing: bool = _option(
        False, "Recompute activations in the backward pass: less memory, a third more work."
    )
    compile: bool = _option(
        False,
        "Compile the model's blocks: on a GPU about 20 s to start, then more clips a second "
        "(H200, ViT-B: 29 % in training); on a CPU 3 %.",
    )
    checkpoint_every_steps: int | None = _option(
        None, "Checkpoint inside epochs too; an epoch's end always has one.", minimum=1
    )
    keep: RetentionPolicy = field(
        default_factory=RetentionPolicy,
        metadata={HELP: "Checkpoints that stay: last=N,best,every=EPOCHS.", METAVAR: "POLICY"},
    )
    # All layers that try again share this one count (``worker/retry_policy.py``).
    retries: int = _option(
        1, "How often a failed trial is resumed from its last checkpoint.", minimum=0
    )
    # Off: the same gradient usually comes again, and the settings are to blame.
    retry_non_finite: bool = _option(
        False, "Resume a trial also after a gradient that is not finite."
    )
    resize_s: float = _option(
        60.0, "How often an elastic trial looks for more workers, seconds.", minimum=1
    )
    object_store: str | None = _option(
        None,
        "Object store for checkpoints and results, where nodes share no disk: s3://bucket/folder, "
        "gs://….",
        metavar="URI",
    )
    cache_from: str | None = _option(
        None, "Object store to fetch data.cache from, once on each node.", metavar="URI"
    )
    hang_timeout_s: float | None = _option(
        1800.0,
        "End and restart a worker that made no progress for so many seconds; 0: never.",
        minimum=0,
    )
    patience_s: float = _option(
        300.0,
        "How long to wait for room on a full disk, or for an MLflow server that does not answer, "
        "seconds.",
        minimum=1,
    )

    def __post_init__(self) -> None:
        _check_minima(self)
        # What one field's minimum cannot express.
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(
                f"min_workers: {self.min_workers} is more than workers: {self.workers}"
            )
        gpus = self.gpus_per_worker
        # An infinite number is no whole one either.
        if gpus is not None and gpus > 1 and not float(gpus).is_integer():
            raise ValueError(f"gpus_per_worker: {gpus:g}: a fraction must be less than one GPU")
        store = self.object_store
        if store and not store.startswith(("s3://", "gs://", "file://")):
            raise ValueError(
                f"object_store: {store}: expected s3://bucket/folder or gs://bucket/folder"
            )

    @property
    def threads(self) -> int:
        """The threads of a worker's arithmetic: at least one."""
        return max(1, int(self.cpus_per_worker))

    def to_json(self) -> dict[str, Any]:
        """Return plain values, from which ``from_json`` makes an equal object."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Return the object that ``to_json`` made the values from."""
        # ``asdict`` made a plain dict of the policy too.
        own: dict[str, Any] = dict(values)
        own["keep"] = RetentionPolicy(**own["keep"])
        return cls(**own)


@dataclass(frozen=True)
class LaunchConfig:
    """One launch of a study.

    Raises:
        ValueError: a value is out of its range.
    """

    # Not made with ``_option``: several verbs have ``--store`` and ``--tracking-uri``, which are
    # declared once in ``cli/options.py``.
    store: Path = DEFAULT_STORE
    """Folder of the embedded tracking store, of checkpoints and of reports; shared storage on a
    cluster."""
    tracking_uri: str | None = None
    """Address of an MLflow server; none: SQLite and a folder below ``store``."""
    study: str = ""
    """Name of the study that runs."""
    backend: Literal["train", "inline", "local"] = _option(
        "train",
        "train: Ray Train workers. inline: inside Tune's trial, one worker. local: here, without "
        "Ray.",
    )
    address: str | None = _option(
        None, "Ray cluster to join. Default: a private one on this machine."
    )
    max_concurrent_trials: int | None = _option(
        None, "Largest number of trials at once. Default: as many as fit.", minimum=1
    )
    trials_per_gpu: str | None = _option(
        None,
        "Trials beside each other on one GPU; auto: as many as its memory allows, measured with "
        "the largest of a study. Default: one.",
        metavar="N|auto",
    )
    webhook: str | None = _option(
        None, "Address that gets a JSON message when a study ends; or @FILE, which contains it."
    )
    poll_s: float = 0.5
    """Seconds between two looks of Ray Train at its workers; each report waits for the next one."""
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    """How the workers of a trial run."""

    def __post_init__(self) -> None:
        _check_minima(self)
        asked = self.trials_per_gpu
        if asked is None:
            return
        is_number = asked.isdecimal() and 0 < int(asked) <= 100
        if asked != AUTO_TRIALS and not is_number:
            raise ValueError(f"trials_per_gpu: {asked}: expected a number from 1 to 100, or auto")
        if self.worker.gpus_per_worker is not None:
            raise ValueError(
                f"trials_per_gpu: {asked} says the share of a GPU, and --gpus-per-worker does too: "
                "give one of the two"
            )
        if self.backend == "local":
            raise ValueError("trials_per_gpu: --backend local runs one trial after the other")

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
        """The MLflow address as a message may show it: without a password."""
        return without_secrets(self.tracking)

    @property
    def artifacts(self) -> str | None:
        """The address of the folder for artifacts, below ``store``.

        It is none with a server, which has its own setting.
        """
        if self.tracking.startswith(("http://", "https://", "databricks")):
            return None
        # Absolute: MLflow resolves a relative location against each process's working directory.
        return (self.store.resolve() / "artifacts").as_uri()

    @property
    def stop_file(self) -> Path:
        """The file that, while it exists, asks the study's workers to save and stop."""
        return self.store.resolve() / "locks" / f"{self.study}.stop"

    @property
    def frames_root(self) -> Path:
        """The folder of the frame caches that ``data.cache: auto`` makes."""
        return self.store.resolve() / "frames"

    @property
    def tokens_root(self) -> Path:
        """The folder of the tokens that ``encoder.cached`` keeps."""
        return self.store.resolve() / "tokens"

    @property
    def stable_root(self) -> Path:
        """The folder of what trainings of several lengths share (``warmup_stable_decay``)."""
        return self.store.resolve() / "stable"

    def trial_folder(self, key: str) -> Path:
        """Return the folder of a trial's checkpoints and result.

        Raises:
            UserError: the key would lead out of the store.
        """
        # A key may come from a database or a file: it must not lead out of the store.
        return below(self.store.resolve() / "trials", key)

    def report_folder(self, study: str) -> Path:
        """Return the folder of a study's tables and figures."""
        return self.store.resolve() / "reports" / study
