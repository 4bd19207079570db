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
"""How long to wait for another process that creates the database; it takes 2 s, on a slow disk 10
s."""


@contextlib.contextmanager
def one_at_a_time(launch: LaunchConfig) -> Generator[None]:
    """Lock the embedded store while its database is opened.

    Raises:
        Failure: another process holds the lock for too long.
    """
    # Without the lock, two first launches would both create the tables, and one would fail. A store
    # that cannot be written has its database already, and cannot have a lock file.
    if launch.tracking_uri is not None or not os.access(launch.store, os.W_OK):
        yield
        return
    try:
        with filelock.FileLock(launch.store / ".database.lock", timeout=_DATABASE_MADE_S):
            yield
    except filelock.Timeout:
        raise Failure(
            f"another process has held the lock of the database in {launch.store} for "
            f"{_DATABASE_MADE_S:g} s; end it, or choose another --store"
        ) from None


_ADDRESS_COLUMNS = {
    "experiments": ("artifact_location",),
    "runs": ("artifact_uri",),
    "model_versions": ("source", "storage_location"),
    "logged_models": ("artifact_location",),
}
"""Table of MLflow's database -> its columns with addresses of artifacts."""


def follow_move(launch: LaunchConfig, locations: Sequence[str]) -> None:
    """Change the addresses of artifacts in the database of a store that was moved or copied.

    MLflow writes absolute addresses into its database and has no call that changes them. With the
    old ones, a moved store would read from and write to its earlier folder. ``locations`` are the
    experiments' addresses as the database has them.
    """
    now = launch.artifacts
    # Our own experiments have ``file://…/artifacts``. Others, as one that a user has put into a
    # bucket, keep their address.
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
        # One transaction: with only a part of the tables changed, runs would lose their artifacts.
        with engine.begin() as connection:
            for table, columns in _ADDRESS_COLUMNS.items():
                # Later versions of MLflow add tables.
                if not known.has_table(table):
                    continue
                for column in columns:
                    for old in moved:
                        statement = sqlalchemy.text(_move_statement(table, column))
                        connection.execute(statement, {"now": now, "old": old})
    finally:
        engine.dispose()


def _move_statement(table: str, column: str) -> str:
    """Return SQL that replaces ``:old`` at the beginning of a column's addresses by ``:now``."""
    # An address that only begins with the same characters, as ``…/artifacts2``, is not changed.
    # Table and column are constants of this module, so formatting them into SQL is safe (S608).
    return (
        f"UPDATE {table} SET {column} = :now || substr({column}, length(:old) + 1) "  # noqa: S608
        f"WHERE {column} = :old "
        f"OR substr({column}, 1, length(:old) + 1) = :old || '/'"
    )


def serve(launch: LaunchConfig, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves MLflow's pages on the loopback interface, and its environment.

    The server answers requests for this machine's own names only.
    """
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    if launch.artifacts:
        command += ["--default-artifact-root", launch.artifacts]
    # MLflow's default accepts every host that looks like a private address, ``10.evil.example``
    # among them: a web page of that name could read the store (DNS rebinding). Any port is allowed,
    # because ``ssh -L`` may forward another one.
    own = ("localhost", "127.0.0.1", "[::1]")
    environment = {
        "MLFLOW_SERVER_ALLOWED_HOSTS": ",".join(f"{name},{name}:*" for name in own),
        "MLFLOW_SERVER_CORS_ALLOWED_ORIGINS": ",".join(f"http://{name}:{port}" for name in own),
        **os.environ,
    }
    # In the environment, because every user of the machine can read a command line.
    return command, {**environment, "MLFLOW_BACKEND_STORE_URI": launch.tracking}
