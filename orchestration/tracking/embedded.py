"""The embedded tracking store: an SQLite database and a folder of artifacts below ``--store``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Generator, Sequence

import filelock
import sqlalchemy

from mar.errors import Failure
from orchestration.config import LaunchConfig

_DATABASE_MADE_S = 120.0
"""A new one takes two seconds, on a slow disk ten."""


@contextlib.contextmanager
def one_at_a_time(launch: LaunchConfig) -> Generator[None]:
    """Hold the embedded store while its database is opened.

    Two first launches would both create its tables.
    """
    if launch.tracking_uri is not None or not os.access(launch.store, os.W_OK):
        yield
        return
    try:
        with filelock.FileLock(launch.store / ".database.lock", timeout=_DATABASE_MADE_S):
            yield
    except filelock.Timeout:
        raise Failure(
            f"another process has been making the database in {launch.store} for "
            f"{_DATABASE_MADE_S:g} s"
        ) from None


_ADDRESS_COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}
"""Table -> columns of MLflow's database that hold addresses of artifacts."""


def follow_move(launch: LaunchConfig, locations: Sequence[str]) -> None:
    """Have an embedded store that was moved or copied know where its artifacts are now.

    MLflow writes absolute addresses into its database and has no call that changes them; with the
    old ones a moved store would read from, and write to, the place where it was.
    """
    now = launch.artifacts
    moved = {
        each
        for each in locations
        if each != now and each.startswith("file://") and each.endswith("/artifacts")
    }
    if not moved or now is None:
        return
    engine = sqlalchemy.create_engine(launch.tracking)
    try:
        known = sqlalchemy.inspect(engine)
        with engine.begin() as connection:
            for table, columns in _ADDRESS_COLUMNS.items():
                if not known.has_table(table):
                    continue
                for column in columns:
                    for old in moved:
                        statement = sqlalchemy.text(_move_statement(table, column))
                        connection.execute(statement, {"now": now, "old": old})
    finally:
        engine.dispose()


def _move_statement(table: str, column: str) -> str:
    """Return SQL that replaces the address ``:old`` before each address of a column by ``:now``."""
    # The names of table and column are our own, not a user's.
    return (
        f"UPDATE {table} SET {column} = :now || substr({column}, length(:old) + 1) "  # noqa: S608
        f"WHERE {column} = :old "
        f"OR substr({column}, 1, length(:old) + 1) = :old || '/'"
    )


def serve(launch: LaunchConfig, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves the store's pages on the loopback interface.

    And the environment it needs.

    The database's address is in the environment: everybody on the machine can read a command line.
    It answers to this machine's own names alone, on any port, for ``ssh -L``: MLflow's default
    takes ``10.evil.example`` for a private address, so that a page of that name could read the
    store (DNS rebinding).
    """
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if launch.artifacts:
        command += ["--default-artifact-root", launch.artifacts]
    own = ("localhost", "127.0.0.1", "[::1]")
    environment = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name},{name}:*" for name in own),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in own),
        **os.environ,
    }
    return command, {**environment, "MLFLOW_BACKEND_STORE_URI": launch.tracking}
