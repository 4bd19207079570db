"""Ends a private Ray together with the launch that started it, however either of them ends.

Run as a script, this file is the guard: a process that waits until its launch is gone, and then
kills the processes that Ray left. It imports only the standard library, so that it starts at once
and stays small.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

MARK = "MAR_PRIVATE_RAY"
"""Environment variable whose random value marks a private Ray's processes: all inherit it."""
_PROC = Path("/proc")
_SERVERS = ("raylet", "gcs_server")
_POLL_S = 1.0
_RAY_CLEANS_UP_S = 4.0
"""Seconds that Ray's own processes have to notice that their launch is gone, and to end."""
_START_TIME = 19
"""Index of the start time in ``/proc/PID/stat`` after the name: with the id, it identifies a
process."""


class Guard:
    """Guards a private Ray. Create it before Ray starts, in the process that starts it."""

    def __init__(self, mark: str) -> None:
        os.environ[MARK] = mark
        self._over = threading.Event()
        # Its input is a pipe that only this process writes to: the pipe closes when this process
        # ends, even by SIGKILL. A session of its own: Ctrl-C in the terminal does not reach it.
        self._process = subprocess.Popen(  # noqa: S603  (our own file)
            [sys.executable, "-S", __file__, str(os.getpid()), mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ray_has_started(self) -> None:
        """Start watching Ray's servers; when one is lost, the launch ends with exit code 1."""
        # Processes that this one starts from now on are not Ray's.
        os.environ.pop(MARK, None)
        servers = _servers_of(os.getpid())
        if servers:
            threading.Thread(
                target=self._watch, args=(servers,), name="ray-guard", daemon=True
            ).start()

    def ray_is_to_stop(self) -> None:
        """Stop watching: from now on Ray's servers end on purpose."""
        self._over.set()

    def close(self) -> None:
        """Let the guard kill the processes that Ray may have left; Ray is stopped by now."""
        self._over.set()
        os.environ.pop(MARK, None)
        if self._process.stdin:
            self._process.stdin.close()
        # The guard takes seconds; waiting for it in a thread leaves no zombie.
        threading.Thread(target=self._process.wait, name="ray-guard-end", daemon=True).start()

    def _watch(self, servers: dict[int, str]) -> None:
        while not self._over.wait(_POLL_S):
            lost = [name for pid, name in servers.items() if not _is_alive(pid)]
            if not lost:
                continue
            # The launch may have begun to stop Ray just now: wait once more for that.
            if self._over.wait(_POLL_S):
                return
            print(
                f"mar: Ray's {lost[0]} has ended, and with it all that ran (out of memory? "
                "killed?). Checkpoints are safe; the same command resumes from them",
                file=sys.stderr,
                flush=True,
            )
            sys.stdout.flush()
            # Not sys.exit: Ray would wait for a server that does not come back. The guard kills the
            # rest.
            os._exit(1)


def _servers_of(parent: int) -> dict[int, str]:
    """Return the servers of Ray's that a process has started: id -> name."""
    found: dict[int, str] = {}
    for folder in _PROC.glob("[0-9]*"):
        name, _, started_by = _stat(folder)
        if name in _SERVERS and started_by == parent:
            found[int(folder.name)] = name
    return found


def _is_alive(pid: int) -> bool:
    _, state, _ = _stat(_PROC / str(pid))
    # "Z", a zombie: it has ended, but its parent has not read its exit code yet.
    return state not in ("", "Z")


def _stat(folder: Path) -> tuple[str, str, int]:
    """Return a process's name, its state and its parent; empty texts if there is none."""
    try:
        text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "", "", 0
    # "PID (NAME) STATE PARENT …"; a name may contain brackets and spaces.
    before, _, rest = text.rpartition(")")
    state, parent = rest.split()[:2]
    return before.partition("(")[2], state, int(parent)


def _processes() -> dict[int, tuple[int, str]]:
    """Return every process's parent and start time, by id.

    The start time tells a process from a later one with the same id.
    """
    found: dict[int, tuple[int, str]] = {}
    for folder in _PROC.glob("[0-9]*"):
        # A process may end while it is read.
        with suppress(OSError, ValueError, IndexError):
            text = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            fields = text.rpartition(")")[2].split()
            found[int(folder.name)] = (int(fields[1]), fields[_START_TIME])
    return found


def _of_ray(launch: int, mark: str) -> dict[int, str]:
    """Return the processes that a launch's Ray has started: id -> start time.

    They are those that carry its mark, and those that descend from its servers.
    """
    processes = _processes()
    marked = f"{MARK}={mark}".encode()
    found: dict[int, str] = {}
    for pid, (parent, start_time) in processes.items():
        with suppress(OSError):
            is_server = parent == launch and _stat(_PROC / str(pid))[0] in _SERVERS
            environment = (_PROC / str(pid) / "environ").read_bytes().split(b"\0")
            if is_server or marked in environment:
                found[pid] = start_time
    # Add children until a round finds no more.
    while True:
        children = {
            pid: start_time
            for pid, (parent, start_time) in processes.items()
            if parent in found and pid not in found
        }
        if not children:
            return found
        found |= children


def _guard(launch: int, mark: str) -> None:
    """Wait until the launch is gone, then kill the processes that its Ray left."""
    # A signal to the launch must not end the guard before the launch has ended.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    own = os.getpid()
    known: dict[int, str] = {}
    # Collected all the time: some processes overwrite their environment with a title, and lose
    # their parent before they end.
    while not select.select([sys.stdin], [], [], _POLL_S)[0]:
        known |= _of_ray(launch, mark)
    # Twice: a process may start another one meanwhile.
    for _ in range(2):
        time.sleep(_RAY_CLEANS_UP_S / 2)
        known |= _of_ray(launch, mark)
        processes = _processes()
        for pid, start_time in known.items():
            if pid != own and pid in processes and processes[pid][1] == start_time:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
