"""The only module that imports mlflow: its client and entities, and its errors explained."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Generator

# MLflow and GitPython read these when they are imported.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

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

logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
# Of a database that is full for a moment: a page of traceback for what is tried again, and said in
# our words.
logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)

_REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "INVALID_STATE")


def is_permanent(error: Exception) -> bool:
    """Whether the store understood and refused, so that to try again is in vain.

    Or a run is asked for that it refused.
    """
    if isinstance(error, MlflowException):
        return error.error_code in _REFUSALS
    return isinstance(error, KeyError)


def mention_refusal(error: Exception) -> None:
    """Print that MLflow refused something permanently, and why."""
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    notice(f"MLflow refuses something for good, which is left out: {reason}")


@contextlib.contextmanager
def explained(launch: LaunchConfig) -> Generator[None]:
    """Turn errors of the tracking store into a ``Failure`` that says what to do."""
    try:
        yield
    except (MlflowException, SQLAlchemyError, ImportError, OSError) as error:
        raise Failure(unusable(launch, error)) from None


def unusable(launch: LaunchConfig, error: Exception) -> str:
    """Return the message for a tracking store that cannot be used."""
    reason = without_secrets(str(error).strip().splitlines()[0])[:200]
    if launch.tracking.startswith("http"):
        advice = "Is the server up, and --tracking-uri right? "
    else:
        advice = ""
    return (
        f"the tracking store {launch.shown_tracking} cannot be used: {reason}. "
        f"{advice}Checkpoints are safe; when it works again, the same command resumes"
    )
