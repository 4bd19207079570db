"""Starts a private Ray for a launch, or joins a cluster; shuts it down in order."""

from __future__ import annotations

import gc
import logging
import os
import secrets
import signal
import stat
import sys
import tempfile
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mar.errors import Failure, UserError, notice
from orchestration.backends.ray_env import ray_environment
from orchestration.backends.ray_guard import Guard
from orchestration.config import LaunchConfig
from orchestration.failures import first_line
from orchestration.secrets import close_token_file

_TOKEN = secrets.token_hex(32)
"""Ray's token: it protects a private Ray, since only this process and its children know it."""
_LONGEST_TEMPORARY = 24
"""Characters: ``_private_folder`` and Ray append up to 82, and a socket's path may have 107."""
_OBJECT_STORE_BYTES = 200 * 2**20
"""200 MiB: only reports and settings pass through it. Ray's default is a share of the memory."""


@contextmanager
def ray_session(launch: LaunchConfig) -> Generator[None]:
    """Provide Ray: the one that this process uses already, or one that is started or joined here.

    Only the latter is shut down at the end.
    """
    # Before the import: Ray reads some of these variables when it is imported.
    os.environ.update(ray_environment(launch))
    import ray

    if ray.is_initialized():
        yield
        return
    guard = None
    # The guard reads /proc, which only Linux has. A cluster outlives a launch on purpose.
    if launch.address is None and sys.platform == "linux":
        guard = Guard(secrets.token_hex(16))
    try:
        _start(launch)
        if guard:
            guard.ray_has_started()
        yield
    finally:
        # Otherwise the guard would take Ray's orderly end for a loss, and end this process.
        if guard:
            guard.ray_is_to_stop()
        try:
            stop_ray()
        finally:
            if guard:
                guard.close()


def _start(launch: LaunchConfig) -> None:

    options: dict[str, Any] = {
        "logging_level": logging.ERROR,
        "log_to_driver": False,
        "configure_logging": True,
    }
    if launch.address is None:
        options["include_dashboard"] = False
        options["object_store_memory"] = _OBJECT_STORE_BYTES
        options["_temp_dir"] = str(_private_folder() / "ray")
        # A token in the environment alone: Ray would write one into a file below the home folder
        # that everybody can read.
        if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
            os.environ["RAY_AUTH_TOKEN"] = _TOKEN
    else:
        close_token_file()
    # ``ray.init`` replaces these handlers; ``graceful_shutdown`` needs its own again.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        _init(launch.address, options)
    except ConnectionError as error:
        raise UserError(
            f"--address {launch.address}: no Ray cluster answers there ({error})"
        ) from None
    except OSError as error:
        raise Failure(
            f"Ray does not start: {error}. It needs a temporary folder that can be written, with "
            "a short path (TMPDIR); "
            "--backend local runs without Ray"
        ) from None
    # Ray raises a bare Exception if its processes are not up in half a minute.
    except Exception as error:
        raise Failure(
            f"Ray does not start: {first_line(error)} Is this machine busy, or out of memory? Run "
            "the same command again; --backend local runs without Ray"
        ) from None
    finally:
        # Python lets only the main thread set handlers.
        if threading.current_thread() is threading.main_thread():
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _init(address: str | None, options: Mapping[str, Any]) -> None:
    """Start Ray or join it; a Ray of our own that does not come up is started once more."""
    import ray

    try:
        ray.init(address=address or "local", **options)
    # A wrong address or folder stays wrong.
    except OSError:
        raise
    # On a machine that is busy, half a minute may not be enough for Ray's processes; by the second
    # time their files are in memory.
    except Exception:
        if address is not None:
            raise
        ray.shutdown()
        ray.init(address="local", **options)


def _private_folder() -> Path:
    """Return a folder for Ray's sockets and logs that nobody else can enter.

    Ray makes its own folders writable for everybody, whenever one of its processes starts.

    Raises:
        Failure: none can be made.
    """
    parent = Path(tempfile.gettempdir())
    if len(str(parent)) > _LONGEST_TEMPORARY and os.access("/tmp", os.W_OK):  # noqa: S108
        notice(
            f"Ray's sockets are below /tmp: the path of TMPDIR ({parent}) is too long for a "
            "socket's"
        )
        parent = Path("/tmp")  # noqa: S108
    folder = parent / f"mar-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        state = folder.lstat()
        is_own = stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid()
        if is_own and not state.st_mode & 0o077:
            return folder
        # Another user may have made a folder of this name first, to read what Ray writes.
        return Path(tempfile.mkdtemp(prefix="mar-", dir=parent))
    except OSError as error:
        raise Failure(
            f"Ray does not start: {error}. It needs a temporary folder that can be written (TMPDIR)"
        ) from None


def stop_ray() -> None:
    """Shut Ray down.

    If one of Ray's references is freed during ``ray.shutdown``, Ray ends the whole process with
    exit code 1. A garbage collection in another thread (the tracking writer's) would free some, so
    garbage is collected before, and collection is off meanwhile.
    """
    import ray

    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
        # This process may join a cluster later, whose token is another one.
        if os.environ.get("RAY_AUTH_TOKEN") == _TOKEN:
            del os.environ["RAY_AUTH_TOKEN"]


def describe_cluster() -> str:
    """Start a private Ray, run a task on it, and stop it.

    Returns:
        Ray's version and its resources.
    """
    import ray

    with ray_session(LaunchConfig()):
        task: Any = ray.remote(num_cpus=0.1)(lambda: "ran")
        answer: Any = ray.get(task.remote(), timeout=60)
        total = ray.cluster_resources()
        return (
            f"{ray.__version__}: a task {answer}; {total.get('CPU', 0):g} CPU, "
            f"{total.get('GPU', 0):g} GPU"
        )
