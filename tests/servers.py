"""An MLflow server over HTTP."""

import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from commands import BIN, wait_for
from conftest import BUCKET


class Server:
    """An MLflow server over HTTP: a database, and artifacts in the object store or elsewhere."""

    def __init__(self, folder: Path, artifacts: str | None = None) -> None:
        self.port, self.folder = free_port(), folder
        self.artifacts = artifacts or f"{BUCKET}/artifacts"
        self.address = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        arguments = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        arguments += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                [BIN / "mlflow", *arguments, "--artifacts-destination", self.artifacts],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.answers, timeout_s=120)

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return True
        except OSError:
            return False

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it was killed before
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
