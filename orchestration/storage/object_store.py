"""Object storage (``s3://``, ``gs://``) for clusters whose nodes share no disk.

Every node then has a store of its own, under the same path; what others need of it is copied here,
and from here. A folder that was sealed with a manifest is copied with the manifest last, so what
has one here is whole. Addresses and keys come from where the provider's own tools find them
(``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, …).
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


class ObjectStore:
    """A place in an object store; names in it are relative, as ``trials/KEY/result``.

    Raises:
        UserError: the address is none.
    """

    def __init__(self, uri: str) -> None:
        import pyarrow.fs

        if has_secrets(uri):
            raise UserError(
                f"{without_secrets(uri)}: leave the keys out of the address, it is written into "
                "logs: "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or whatever else the provider's own "
                "tools read"
            )
        try:
            self.files, root = pyarrow.fs.FileSystem.from_uri(uri)
        except (ValueError, OSError, NotImplementedError) as error:
            raise UserError(
                f"--object-store {uri}: {error}; expected s3://bucket/folder or gs://bucket/folder"
            ) from None
        self.uri, self.root = uri, str(root).rstrip("/")

    def upload(self, file: Path, name: str) -> None:
        """Copy a file there, whole or not at all."""
        with (
            self._explained(name),
            file.open("rb") as source,
            self.files.open_output_stream(self._at(name)) as target,
        ):
            shutil.copyfileobj(source, target, _CHUNK_BYTES)

    def download(self, name: str, file: Path) -> bool:
        """Copy a file from there, whole or not at all; false where there is none."""
        if not self.exists(name):
            return False
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(
            f".{file.name}.{os.getpid()}.pulled"
        )  # workers of a node share its disk
        with self._explained(name), self.files.open_input_stream(self._at(name)) as source:
            with unfinished.open("wb") as target:
                shutil.copyfileobj(source, target, _CHUNK_BYTES)
            unfinished.replace(file)
        return True

    def upload_dir(self, folder: Path, name: str) -> None:
        """Copy a folder's files there, its manifest last."""
        files = [file for file in folder.rglob("*") if file.is_file()]
        for file in sorted(files, key=lambda each: (each.name == MANIFEST, str(each))):
            self.upload(file, f"{name}/{file.relative_to(folder)}")

    def download_dir(self, name: str, folder: Path) -> bool:
        """Have here the sealed folder that is there, verified.

        False where there is no whole one.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / ".pulling"):  # workers of one node share its disk
            unfinished = folder.with_name(f".{folder.name}.pulled")
            shutil.rmtree(unfinished, ignore_errors=True)
            if not self.download(f"{name}/{MANIFEST}", unfinished / MANIFEST):
                return False
            if (
                _is_whole(folder)
                and (folder / MANIFEST).read_bytes() == (unfinished / MANIFEST).read_bytes()
            ):
                shutil.rmtree(unfinished)
                return True
            try:
                for each in self.names(name):
                    self.download(f"{name}/{each}", below(unfinished, each))
                is_whole = _is_whole(unfinished)
                if is_whole:
                    shutil.rmtree(folder, ignore_errors=True)
                    unfinished.rename(folder)
            finally:
                shutil.rmtree(unfinished, ignore_errors=True)
            return is_whole

    def download_missing(self, name: str, folder: Path) -> int:
        """Copy those files of a folder that are not here, or here with another size.

        Returns how many.
        """
        here = {
            str(file.relative_to(folder)): file.stat().st_size
            for file in folder.rglob("*")
            if file.is_file()
        }
        wanted = {
            each: below(folder, each)
            for each, size in self._sizes(name).items()
            if here.get(each) != size
        }
        for each, file in wanted.items():
            self.download("/".join(part for part in (name, each) if part), file)
        return len(wanted)

    def upload_missing(self, folder: Path, name: str) -> int:
        """Copy those files of a folder that are not there, or there with another size.

        Returns how many.
        """
        there = self._sizes(name)
        files = [
            file
            for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.startswith(".")
        ]
        wanted = [
            file
            for file in files
            if there.get(str(file.relative_to(folder))) != file.stat().st_size
        ]
        for file in wanted:
            self.upload(
                file, "/".join(part for part in (name, str(file.relative_to(folder))) if part)
            )
        return len(wanted)

    def names(self, name: str) -> list[str]:
        """Return what is directly in a folder."""
        return sorted({each.split("/")[0] for each in self._sizes(name)})

    def complete_dirs(self, name: str) -> set[str]:
        """Return the folders directly in a folder that are whole: those with a manifest."""
        return {
            each.split("/")[0] for each in self._sizes(name) if each.split("/")[1:] == [MANIFEST]
        }

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        import pyarrow.fs

        with self._explained(name):
            return self.files.get_file_info(self._at(name)).type == pyarrow.fs.FileType.File

    def touch(self, name: str) -> None:
        """Make an empty file."""
        with self._explained(name), self.files.open_output_stream(self._at(name)):
            pass

    def remove(self, name: str) -> None:
        """Remove a file or a folder, if there is one."""
        with suppress(FileNotFoundError), self._explained(name):
            if self.exists(name):
                self.files.delete_file(self._at(name))
            else:
                for each in (MANIFEST, *self._sizes(name)):  # what has no manifest is not whole
                    if self.exists(f"{name}/{each}"):
                        self.files.delete_file(self._at(f"{name}/{each}"))

    def _sizes(self, name: str) -> dict[str, int]:
        import pyarrow.fs

        path = self._at(name)
        with self._explained(name):
            selected = pyarrow.fs.FileSelector(path, recursive=True, allow_not_found=True)
            found: list[Any] = self.files.get_file_info(selected)
        files = [each for each in found if each.type == pyarrow.fs.FileType.File]
        return {str(each.path).removeprefix(f"{path}/"): int(each.size) for each in files}

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @contextmanager
    def _explained(self, name: str) -> Generator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise Failure(
                f"{self.uri}/{name} cannot be used: {first_line(error)}", "worker_lost"
            ) from None


def _is_whole(folder: Path) -> bool:
    try:
        read_atomic_dir(folder)
    except Failure:
        return False
    return True


@lru_cache(maxsize=8)
def open_object_store(uri: str) -> ObjectStore:
    """Return the remote at an address; one for all that a process does there."""
    return ObjectStore(uri)
