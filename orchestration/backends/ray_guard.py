"""Ends a private Ray together with the launch that started it, however either ends.

Run as a script, this file is the guard: a process that waits until its launch is gone and then ends
what Ray left. It imports nothing of ours, so that it is there at once and small.
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
"""Environment variable that all processes of a private Ray inherit: a random value, by which they
are found."""
_PROC = Path("/proc")
_SERVERS = ("raylet", "gcs_server")
_LOOKS_S = 1.0
_RAY_CLEANS_UP_S = 4.0
"""How long Ray's own processes may take to notice that their launch is gone."""


class Guard:
    """Watches over a private Ray; make it before Ray starts, in the process that starts it."""

    def __init__(self, mark: str) -> None:
        os.environ[MARK] = mark
        self._over = threading.Event()
        # Its input is a pipe that this process alone writes to: it ends when this process does.
        self._process = subprocess.Popen(  # noqa: S603  (our own file)
            [sys.executable, "-S", __file__, str(os.getpid()), mark],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def ray_has_started(self) -> None:
        """Begin to look whether Ray's servers are alive.

        When one is not, the launch ends in words, exit code 1.
        """
        os.environ.pop(MARK, None)
        servers = _servers_of(os.getpid())
        if servers:
            threading.Thread(
                target=self._watch, args=(servers,), name="ray-guard", daemon=True
            ).start()

    def ray_is_to_stop(self) -> None:
        """Take its servers' end for what it is from now on."""
        self._over.set()

    def close(self) -> None:
        """Have what Ray may have left ended; Ray is stopped."""
        self._over.set()
        os.environ.pop(MARK, None)
        if self._process.stdin:
            self._process.stdin.close()
        threading.Thread(target=self._process.wait, name="ray-guard-end", daemon=True).start()

    def _watch(self, servers: dict[int, str]) -> None:
        while not self._over.wait(_LOOKS_S):
            lost = [name for pid, name in servers.items() if not _is_alive(pid)]
            if lost and not self._over.wait(
                _LOOKS_S
            ):  # the launch may be stopping it in this moment
                print(
                    f"mar: Ray's {lost[0]} has ended, and with it all that ran (out of memory? "
                    "killed?). "
                    "Checkpoints are safe; the same command resumes from them",
                    file=sys.stderr,
                    flush=True,
                )
                sys.stdout.flush()
                os._exit(
                    1
                )  # Ray would wait for a server that does not come back; the guard ends the rest


def _servers_of(parent: int) -> dict[int, str]:
    """Return the processes of Ray's servers that a process has started, by id."""
    found: dict[int, str] = {}
    for folder in _PROC.glob("[0-9]*"):
        name, _, started_by = _facts(folder)
        if name in _SERVERS and started_by == parent:
            found[int(folder.name)] = name
    return found


def _is_alive(pid: int) -> bool:
    return _facts(_PROC / str(pid))[1] not in ("", "Z")


def _facts(folder: Path) -> tuple[str, str, int]:
    """Return a process's name, its state (``Z``: ended, nobody has asked how) and its parent.

    Empty for none.
    """
    try:
        name, _, rest = (
            (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")
        )
    except OSError:
        return "", "", 0
    state, parent = rest.split()[:2]
    return name.partition("(")[2], state, int(parent)


def _processes() -> dict[int, tuple[int, str]]:
    """Return every process's parent and when it was started, by id.

    An id alone may be given to another process.
    """
    found: dict[int, tuple[int, str]] = {}
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError, ValueError, IndexError):
            rest = (
                (folder / "stat")
                .read_text(encoding="utf-8", errors="replace")
                .rpartition(")")[2]
                .split()
            )
            found[int(folder.name)] = int(rest[1]), rest[19]
    return found


def _of_ray(launch: int, mark: str) -> dict[int, str]:
    """Return the processes that a launch's Ray has started: id -> start time.

    Those that descend from its servers or carry its mark.
    """
    processes = _processes()
    wanted, found = f"{MARK}={mark}".encode(), dict[int, str]()
    for pid, (parent, began) in processes.items():
        with suppress(OSError):
            is_server = parent == launch and _facts(_PROC / str(pid))[0] in _SERVERS
            if is_server or wanted in (_PROC / str(pid) / "environ").read_bytes().split(b"\0"):
                found[pid] = began
    while True:
        more = {
            pid: began
            for pid, (parent, began) in processes.items()
            if parent in found and pid not in found
        }
        if not more:
            return found
        found |= more


def _guard(launch: int, mark: str) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its launch, not before
    own, known = os.getpid(), dict[int, str]()
    while not select.select([sys.stdin], [], [], _LOOKS_S)[0]:
        known |= _of_ray(
            launch, mark
        )  # some write over their environment, and lose their parent before they end
    for _ in range(2):  # a process may start another meanwhile
        time.sleep(_RAY_CLEANS_UP_S / 2)
        known |= _of_ray(launch, mark)
        there = _processes()
        for pid, began in known.items():
            if pid != own and pid in there and there[pid][1] == began:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    _guard(int(sys.argv[1]), sys.argv[2])
