"""Servers over HTTP: an MLflow server, and a hub that takes uploads."""

import base64
import hashlib
import json
import os
import signal
import socket
import subprocess
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

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


class Hub:
    """A hub for models, as far as an upload asks one; it keeps what it was sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, bytes, str | None]] = []
        """Path, body and authorization of each request, in their order."""
        requests = self.requests

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                requests.append((self.path, body, self.headers.get("authorization")))
                page = f"http://{self.headers['host']}/me/it"
                content: dict[str, Any] = {"url": page}
                if "/preupload/" in self.path:
                    names = [each["path"] for each in json.loads(body)["files"]]
                    content = {
                        "files": [
                            {"path": name, "uploadMode": "regular", "shouldIgnore": False}
                            for name in names
                        ]
                    }
                if "/commit/" in self.path:
                    content = {"commitUrl": f"{page}/commit/1", "commitOid": "1"}
                written = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(written)))
                self.end_headers()
                self.wfile.write(written)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def files(self) -> dict[str, bytes]:
        """Return the content of each file of the last commit."""
        (body,) = [body for path, body, _ in self.requests if "/commit/" in path][-1:]
        lines = [json.loads(line) for line in body.splitlines()]
        return {
            line["value"]["path"]: base64.b64decode(line["value"]["content"])
            for line in lines
            if line["key"] == "file"
        }

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Repository:
    """A hub that serves one file of one repository, whole, damaged, or half of it once."""

    def __init__(self, path: str, content: bytes, served: bytes | None = None) -> None:
        self.requests: list[tuple[str, str, str | None]] = []
        """Method, path and range of each request."""
        self.cut = False
        """Whether the next answer ends after half of the content."""
        whole = served or content
        digest = hashlib.sha256(content).hexdigest()
        repository = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                span = self.headers.get("range")
                repository.requests.append((self.command, self.path, span))
                if self.path.split("/resolve/")[-1].split("/", 1)[-1] != path:
                    self.send_response(404)
                    self.send_header("x-error-code", "EntryNotFound")
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                start = int(span.removeprefix("bytes=").split("-")[0]) if span else 0
                self.send_response(206 if span else 200)
                self.send_header("etag", f'"{digest}"')
                self.send_header("x-repo-commit", "1" * 40)
                self.send_header("accept-ranges", "bytes")
                self.send_header("content-length", str(len(whole) - start))
                if span:
                    self.send_header(
                        "content-range", f"bytes {start}-{len(whole) - 1}/{len(whole)}"
                    )
                self.end_headers()
                if self.command == "HEAD":
                    return
                end = len(whole)
                if repository.cut:
                    end = start + (end - start) // 2
                    repository.cut = False
                self.wfile.write(whole[start:end])
                self.wfile.flush()
                if end < len(whole):
                    self.connection.shutdown(socket.SHUT_RDWR)

            do_GET = do_HEAD = answer  # noqa: N815

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
