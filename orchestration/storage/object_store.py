"""Object storage (``s3://``, ``gs://``) for clusters whose nodes share no disk.

Every node then has a local store under the same path, and what other nodes need is uploaded to the
object store and downloaded from it. A folder with a manifest is uploaded with the manifest last: in
the object store, a folder with a manifest is complete. pyarrow reads the server's address and the
keys from the variables of the provider's own tools (``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``,
…).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import FileLock

from mar import MANIFEST
from mar.atomic_dir import read_atomic_dir
from mar.errors import Failure, UserError
from mar.safe_input import below
from orchestration.failures import first_line
from orchestration.secrets import has_secrets, without_secrets

_CHUNK_BYTES = 2**22
"""Memory for one copy, 4 MiB, however large the file is."""


class ObjectStore:
    """A folder in an object store; names in it are relative, as ``trials/KEY/result``.

    Raises:
        UserError: the address cannot be read, or contains keys.
    """

    def __init__(self, uri: str) -> None:
        # Imported here, so that a launch without an object store does not wait for pyarrow.
        import pyarrow.fs

        if has_secrets(uri):
            raise UserError(
                f"{without_secrets(uri)}: leave the keys out of the address, which is written into "
                "logs. The provider's own variables are read: AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, …"
            )
        try:
            self.files, root = pyarrow.fs.FileSystem.from_uri(uri)
        except (ValueError, OSError, NotImplementedError) as error:
            raise UserError(
                f"--object-store {uri}: {error}; expected s3://bucket/folder or gs://bucket/folder"
            ) from None
        self.uri = uri
        self.root = str(root).rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        """Upload a file, as a whole or not at all."""
        # S3 shows an object when its stream is closed, so a killed upload leaves nothing.
        with self._explained(name), file.open("rb") as source:
            target = self.files.open_output_stream(self._at(name))
            try:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            except BaseException:
                # The stream has no way to be given up: closed, it shows a part of the file.
                with suppress(OSError):
                    target.close()
                with suppress(OSError):
                    self.files.delete_file(self._at(name))
                raise
            target.close()

    def download(self, name: str, file: Path) -> bool:
        """Download a file, as a whole or not at all; false if it does not exist."""
        if not self.exists(name):
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        # Workers of a node share its disk: each has its own unfinished file. The name begins with a
        # dot, so ``upload_missing`` leaves it out.
        unfinished = file.with_name(f".{file.name}.{os.getpid()}.unfinished")
        with self._explained(name), self.files.open_input_stream(self._at(name)) as source:
            with unfinished.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            unfinished.replace(file)
        return True

    def upload_dir(self, folder: Path, name: str) -> None:
        """Upload a folder's files, the manifest last."""
        # A node that is lost in the middle of this leaves a folder without a manifest, which counts
        # as incomplete. False sorts before True, so the manifest is the last file.
        files = [file for file in folder.rglob("*") if file.is_file()]
        files.sort(key=lambda file: (file.name == MANIFEST, str(file)))
        for file in files:
            self.upload(file, f"{name}/{file.relative_to(folder)}")

    def download_dir(self, name: str, folder: Path) -> bool:
        """Download a folder with a manifest and verify it; false if no complete one exists."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Workers of one node share its disk: one downloads, the others find the folder complete.
        with FileLock(folder.parent / ".downloading"):
            unfinished = folder.with_name(f".{folder.name}.downloading")
            shutil.rmtree(unfinished, ignore_errors=True)
            if not self.download(f"{name}/{MANIFEST}", unfinished / MANIFEST):
                return False
            # The object store wins over this disk, which may have a stale folder: only one with the
            # same manifest and unchanged files is kept.
            if _is_complete(folder) and _has_same_manifest(folder, unfinished):
                shutil.rmtree(unfinished)
                return True
            try:
                # ``below`` refuses a name that would lead out of the folder.
                for each in self.names(name):
                    self.download(f"{name}/{each}", below(unfinished, each))
                # A damaged download must not replace the folder on this disk.
                is_complete = _is_complete(unfinished)
                if is_complete:
                    shutil.rmtree(folder, ignore_errors=True)
                    unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            return is_complete

    def download_missing(self, name: str, folder: Path) -> int:
        """Download the files of a folder that are not on the disk or have another size there.

        Returns:
            The number of downloaded files.
        """
        # Sizes, not hashes: to hash a frame cache would read all of it.
        local: dict[str, int] = {}
        for file in folder.rglob("*"):
            if file.is_file():
                local[str(file.relative_to(folder))] = file.stat().st_size
        remote = self._sizes(name)
        missing = [each for each, size in remote.items() if local.get(each) != size]
        for each in missing:
            self.download(_joined(name, each), below(folder, each))
        return len(missing)

    def upload_missing(self, folder: Path, name: str) -> int:
        """Upload the files of a folder that the object store lacks or has in another size.

        Hidden files are left out: they are unfinished.

        Returns:
            The number of uploaded files.
        """
        remote = self._sizes(name)
        num_uploaded = 0
        for file in sorted(folder.rglob("*")):
            if not file.is_file() or file.name.startswith("."):
                continue
            each = str(file.relative_to(folder))
            if remote.get(each) != file.stat().st_size:
                self.upload(file, _joined(name, each))
                num_uploaded += 1
        return num_uploaded

    def names(self, name: str) -> list[str]:
        """Return the names of the files and folders directly in a folder."""
        # An object store has no folders, only names with slashes: the first part is the folder.
        return sorted({each.split("/")[0] for each in self._sizes(name)})

    def complete_dirs(self, name: str) -> set[str]:
        """Return the complete folders directly in a folder: those with a manifest."""
        found: set[str] = set()
        for each in self._sizes(name):
            first, _, rest = each.partition("/")
            if rest == MANIFEST:
                found.add(first)
        return found

    def exists(self, name: str) -> bool:
        """Whether a file exists."""
        import pyarrow.fs

        with self._explained(name):
            return self.files.get_file_info(self._at(name)).type == pyarrow.fs.FileType.File

    def touch(self, name: str) -> None:
        """Create an empty file."""
        with self._explained(name), self.files.open_output_stream(self._at(name)):
            pass

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if it exists."""
        # Another worker may remove the same files at the same time.
        with suppress(FileNotFoundError), self._explained(name):
            if self.exists(name):
                self.files.delete_file(self._at(name))
            else:
                # The manifest first: nobody reads a folder without one, even if the removal stops
                # in the middle.
                for each in (MANIFEST, *self._sizes(name)):
                    if self.exists(f"{name}/{each}"):
                        self.files.delete_file(self._at(f"{name}/{each}"))

    def _sizes(self, name: str) -> dict[str, int]:
        """Return the size in bytes of each file below a folder, by its relative name."""
        import pyarrow.fs

        path = self._at(name)
        with self._explained(name):
            selected = pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
            found: list[Any] = self.files.get_file_info(selected)
        files = [each for each in found if each.type == pyarrow.fs.FileType.File]
        return {str(each.path).removeprefix(f"{path}/"): int(each.size) for each in files}

    def _at(self, name: str) -> str:
        """Return a name as pyarrow expects it: with bucket and folder, without the scheme."""
        return _joined(self.root, name)

    @contextmanager
    def _explained(self, name: str) -> Generator[None]:
        """Turn pyarrow's errors into a ``Failure`` that names the object.

        A FileNotFoundError passes: it is an answer, not a fault.
        """
        try:
            yield
        except FileNotFoundError:
            raise
        # The kind "worker_lost" is retried: a server that does not answer may come back.
        except OSError as error:
            raise Failure(
                f"{self.uri}/{name} cannot be used: {first_line(error)}", "worker_lost"
            ) from None


def _joined(folder: str, name: str) -> str:
    """Return a name in a folder; either may be empty."""
    return "/".join(part for part in (folder, name) if part)


def _is_complete(folder: Path) -> bool:
    """Whether a folder on the disk has all files of its manifest, unchanged."""
    try:
        read_atomic_dir(folder)
    except Failure:
        return False
    return True


def _has_same_manifest(one: Path, other: Path) -> bool:
    """Whether two folders have the same files: a manifest has the SHA-256 of each."""
    return (one / MANIFEST).read_bytes() == (other / MANIFEST).read_bytes()


@lru_cache(maxsize=8)
def open_object_store(uri: str) -> ObjectStore:
    """Return the object store at an address, opened once in a process."""
    return ObjectStore(uri)
