"""MLflow's client and entities, and its errors explained; ``mlflow_model`` alone imports it too."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator

# MLflow and GitPython read these when they are imported. A value that the user has set is kept.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
# The writer retries by itself: MLflow's defaults, seven retries with growing pauses and 120 s for
# each answer, would hide an unreachable server for minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
# These would write into the progress display.
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# GitPython prints a warning on import where git is not installed.
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

# ``as`` with the same name marks these as exported from here, for type checkers.
from mlflow import MlflowClient as MlflowClient
from mlflow.entities import Metric as Metric
from mlflow.entities import Param as Param
from mlflow.entities import Run as Run
from mlflow.entities import RunTag as RunTag
from mlflow.exceptions import MlflowException as MlflowException
from sqlalchemy.exc import SQLAlchemyError

from mar.errors import Failure, notice
from orchestration.config import LaunchConfig
from orchestration.secrets import without_secrets

# A new database logs each of its tables and migrations at level INFO.
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# When the disk is full, this logger prints a traceback at each attempt. The writer retries, and
# reports the reason in one line.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")
"""MLflow's error codes for a request that it understood and refused."""


def is_permanent(error: Exception) -> bool:
    """Whether a retry cannot succeed: the store refused the request, or refused its run before.

    A KeyError is from the writer's table of runs: the run was never created.
    """
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, KeyError)


def mention_refusal(error: Exception) -> None:
    """Print that MLflow refused something permanently, and why."""
    # A message of MLflow may have the address of a database, with its password.
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    notice(f"MLflow refuses something for good, which is left out: {reason}")


@contextlib.contextmanager
def explained(launch: LaunchConfig) -> Generator[None]:
    """Turn errors of the tracking store into a ``Failure`` with advice."""
    try:
        yield
    # An ImportError: the address of a database needs a driver that is not installed.
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise Failure(unusable(launch, error)) from None


def unusable(launch: LaunchConfig, error: Exception) -> str:
    """Return the message for a tracking store that cannot be used."""
    # The later lines of an SQLAlchemy message have the statement and its parameters.
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    if launch.tracking.startswith("http"):
        advice = "Is the server up, and --tracking-uri right? "
    else:
        advice = ""
    return (
        f"the tracking store {launch.shown_tracking} cannot be used: {reason}. "
        f"{advice}Checkpoints are safe; when it works again, the same command resumes"
    )
