"""``mar submit``: runs a study as a job on a Ray cluster, through Ray's Jobs API.

The job keeps running when the terminal that submitted it is closed.

The job contains the code and the study's files, not the data. Its id follows from the command, so
that a second submission of the same command joins the first. Everybody who can submit a job can run
any code on the cluster: a cluster that answers without a token is refused, unless it is on this
machine (CVE-2023-48022).
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import shlex
import shutil
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from mar.errors import Failure, UserError
from orchestration.failures import first_line
from orchestration.installation import CODE, package_folders, packaged
from orchestration.secrets import (
    close_token_file,
    has_secrets,
    webhook_of,
    without_secrets,
    write_private,
)
from orchestration.studies.yaml_document import Document, find
from orchestration.tracking.provenance import tags

_TIMEOUT_S = 10.0
"""Of the first request to a dashboard."""
_PATIENCE_S = 60.0
"""How long a followed job's dashboard may be away."""
_WEBHOOK = "webhook.txt"
"""File in a job's folder: the webhook, a secret, since whoever has it can post there."""
_UNSHIPPED = ("__pycache__", "*.pyc")
"""Patterns of files that a job's folder leaves out."""


@dataclass(frozen=True)
class Job:
    """One submission."""

    job_id: str
    study: str
    status: str
    """PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED."""
    began: str
    minutes: float | None
    message: str


class Jobs:
    """The jobs of a cluster.

    Raises:
        UserError: the address is invalid, does not answer, or answers without a token.
    """

    def __init__(self, address: str, is_open_allowed: bool = False) -> None:
        self.address = address.rstrip("/")
        parts = urlsplit(self.address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"--address {address}: expected the dashboard's address, as http://127.0.0.1:8265"
            )
        # Asked without Ray's client, which may send a token that is found on this machine.
        is_open = _answers_without_a_token(self.address)
        if is_open and not is_open_allowed and not _is_loopback(self.address):
            raise UserError(
                f"--address {address}: this cluster answers without a token, so anybody who "
                "reaches it can run code there (CVE-2023-48022). Start it with "
                "RAY_AUTH_MODE=token; or, on a network that you trust, give "
                "--allow-unauthenticated"
            )
        if not is_open:
            os.environ["RAY_AUTH_MODE"] = "token"
            close_token_file()
        # Not at the top: Ray reads RAY_AUTH_MODE when this module is imported.
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray").setLevel(logging.WARNING)
        try:
            self.client = JobSubmissionClient(self.address)
        # Ray raises errors of several unrelated types, its authentication errors among them.
        except Exception as error:
            advice = ""
            if not is_open:
                advice = "is the token right? (~/.ray/auth_token, or RAY_AUTH_TOKEN) "
            raise UserError(f"--address {address}: {advice}{first_line(error)}") from None

    def submit(
        self, study: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> tuple[str, bool]:
        """Submit ``mar run STUDY ARGUMENTS``, or join it if it is running.

        Returns:
            The job's id, and whether it is new.
        """
        digest = hashlib.sha256(json.dumps([study, *arguments]).encode()).hexdigest()[:8]
        base = f"mar-{Path(study).stem}-{digest}"
        # "-runN" at the end counts the submissions of one command.
        earlier = [job for job in self.list() if job.job_id.rpartition("-run")[0] == base]
        for job in earlier:
            if job.status in ("PENDING", "RUNNING"):
                return job.job_id, False
        # Ray refuses an id that was used before, even if that job has ended.
        job_id = f"{base}-run{len(earlier) + 1}"
        with TemporaryDirectory() as folder:
            study_argument = _packed(study, Path(folder))
            shown = printable_arguments(arguments, Path(folder))
            # "auto": the job runs on a node of the cluster, and joins it there.
            line = shlex.join(["run", study_argument, *shown, "--address", "auto"])
            try:
                self.client.submit_job(
                    entrypoint=f"python -m orchestration {line}",
                    submission_id=job_id,
                    runtime_env={"working_dir": folder, "env_vars": _job_environment(environment)},
                    metadata={"study": Path(study).stem, "asked": json.dumps([study, *shown])},
                )
            except RuntimeError as error:
                # Another submission of the same command came between the list and this call.
                if "already exists" in str(error):
                    return job_id, False
                raise Failure(f"{self.address}: {first_line(error)}") from None
        return job_id, True

    def list(self) -> list[Job]:
        """Return mar's jobs on the cluster, the newest first."""
        found: list[Any] = [
            each
            for each in self._answer(self.client.list_jobs)
            if str(each.submission_id or "").startswith("mar-")
        ]
        found.sort(key=lambda each: each.start_time or 0, reverse=True)
        return [_job(each) for each in found]

    def follow(self, job_id: str) -> str:
        """Print a job's log until it ends; returns its last status."""
        self._known(job_id)

        async def tail() -> None:
            async for lines in self.client.tail_job_logs(job_id):
                print(lines, end="", flush=True)

        answered = time.monotonic()
        while True:
            # The log also ends when the connection is lost, with an error of Ray or of its HTTP
            # client; only the status shows whether the job has ended. If it has not, the log is
            # read again from its start.
            with suppress(Exception):
                asyncio.run(tail())
            try:
                info = self._answer(lambda: self.client.get_job_info(job_id))
            except Failure:
                # A dashboard that restarts is away for some seconds.
                if time.monotonic() - answered > _PATIENCE_S:
                    raise
            else:
                answered = time.monotonic()
                if info.status.is_terminal():
                    return str(info.status)
            time.sleep(1)

    def stop(self, job_id: str) -> None:
        """Stop a job now. Its results and checkpoints are kept: the same submission resumes it."""
        self._known(job_id)
        self._answer(lambda: self.client.stop_job(job_id))

    def _answer(self, ask: Callable[[], Any]) -> Any:
        """Return what the dashboard answers.

        Raises:
            Failure: it does not answer, or with an error.
        """
        try:
            return ask()
        # Ray raises RuntimeError, and lets the errors of its HTTP client through.
        except Exception as error:
            raise Failure(
                f"{self.address} does not answer: {first_line(error)}. Its jobs run on if the "
                "cluster does; mar jobs list shows them when it answers again"
            ) from None

    def _known(self, job_id: str) -> None:
        known = [job.job_id for job in self.list()]
        if job_id not in known:
            raise UserError(
                f"no job {job_id!r} on {self.address} "
                f"({', '.join(known[:5]) or 'it has no jobs of mar submit'})"
            )


def printable_arguments(arguments: Sequence[str], folder: Path) -> list[str]:
    """Return the arguments without secrets: the cluster shows them in its list of jobs and logs.

    A webhook is written into a file of the job's folder, and its argument names that file.

    Raises:
        UserError: an address contains a password, or a webhook is not an address.
    """
    shown: list[str] = []
    for word in arguments:
        name, _, value = word.partition("=")
        if shown and shown[-1] == "--webhook":
            write_private(folder / _WEBHOOK, webhook_of(word))
            shown.append(f"@{_WEBHOOK}")
        elif name == "--webhook" and value:
            write_private(folder / _WEBHOOK, webhook_of(value))
            shown.append(f"--webhook=@{_WEBHOOK}")
        elif has_secrets(word):
            raise UserError(
                f"{without_secrets(word)}: leave user and password out, the cluster shows a job's "
                "command to everybody. MLflow reads MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD on each node"
            )
        else:
            shown.append(word)
    return shown


def _job_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the job's environment: the given variables, and the commit of its code."""
    # The job has no git checkout, from which its runs could get these tags.
    commit = {
        name: value
        for name, value in tags().items()
        if name in ("mlflow.source.git.commit", "git.dirty")
    }
    # Unbuffered, so that ``follow`` shows each line as it is printed; a job has no terminal that
    # would give rich a width.
    return {**environment, CODE: json.dumps(commit), "PYTHONUNBUFFERED": "1", "COLUMNS": "160"}


def _packed(study: str, folder: Path) -> str:
    """Copy the code and the study's files into a folder.

    Returns:
        The study's path in it, or its name if it ships with mar.
    """
    ignored = shutil.ignore_patterns(*_UNSHIPPED)
    for package in package_folders():
        shutil.copytree(package, folder / package.name, ignore=ignored)
    # In a wheel the shipped studies are inside the package; in a checkout they are beside it.
    if not (folder / "orchestration" / "search_spaces").is_dir():
        shutil.copytree(packaged("search_spaces"), folder / "search_spaces", ignore=ignored)
    path = find(study, "study")
    shipped = packaged("search_spaces").resolve()
    # Files that ship with mar are found by name on the cluster too, so they are not copied.
    own = [file for file in _files_of(path) if shipped not in file.parents]
    if not own:
        return study
    # The files refer to each other by relative paths, so these stay as they are.
    root = Path(os.path.commonpath([file.parent for file in own]))
    for file in own:
        target = folder / "study" / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    if path not in own:
        return study
    return str(Path("study") / path.relative_to(root))


def _files_of(path: Path) -> list[Path]:
    """Return the file of a study or recipe, and all files that it refers to, directly or not."""
    content = Document(path).content
    named = [content.get("recipe"), content.get("extends")]
    for labels in (content.get("axes") or {}).values():
        named += [(settings or {}).get("recipe") for settings in labels.values()]
    files = [path.resolve()]
    for name in dict.fromkeys(each for each in named if isinstance(each, str)):
        # A name is a path relative to this file, or the name of a recipe that ships with mar.
        file = path.parent / name
        if not file.is_file():
            file = find(name, "recipe")
        files += _files_of(file)
    return files


def _answers_without_a_token(address: str) -> bool:
    """Whether a cluster lists its jobs to a request without a token.

    Raises:
        UserError: it does not answer, or not as a dashboard does.
    """
    try:
        # The scheme was checked: http or https.
        with urllib.request.urlopen(f"{address}/api/jobs/", timeout=_TIMEOUT_S):  # noqa: S310
            return True
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return False
        raise UserError(f"--address {address}: no Ray dashboard: {error}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"--address {address}: no dashboard answers there: {error}") from None


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _job(info: Any) -> Job:
    """Return one of Ray's jobs as ours; its times are milliseconds since 1970."""
    began = ""
    minutes = None
    if info.start_time:
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.start_time / 1000))
        end = info.end_time or time.time() * 1000
        minutes = (end - info.start_time) / 60_000
    return Job(
        job_id=str(info.submission_id),
        study=(info.metadata or {}).get("study", ""),
        status=str(info.status),
        began=began,
        minutes=minutes,
        message=first_line(info.message or ""),
    )


def leave(job_id: str, address: str) -> None:
    """Print how to follow or stop a job that keeps running."""
    print(
        f"\n{job_id} keeps running. mar jobs follow {job_id} --address {address}; mar jobs stop …",
        file=sys.stderr,
    )
