"""The name of a study in a store: its file's name, made distinct from other files' names.

The name is used for a study's experiment in MLflow, its lock and its report. The first file that
runs under a name owns it in that store. Another file of the same name, in another folder, gets a
name with its folder's name before it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mar.errors import Failure, UserError
from orchestration.installation import CODE, packaged
from orchestration.studies.yaml_document import Document, find

_FOLDER = "studies"
"""Folder below the store with a file for each name, which has the path of the study's file."""


def name_in_store(base: str, file: Path, store: Path, claims: bool = False) -> str:
    """Return a study's name in a store; with ``claims``, reserve it for this file.

    Raises:
        Failure: the name cannot be reserved, because the store cannot be written.
    """
    # Ray unpacks the files of a submitted job into another folder each time: by their paths, each
    # job would be another study.
    if CODE in os.environ:
        return base
    owner = _owner(file)
    # The last of the three names is distinct from those of all other files.
    digest = hashlib.sha256(owner.encode(errors="surrogateescape")).hexdigest()[:6]
    for name in (base, f"{file.parent.name}_{base}", f"{base}_{digest}"):
        note = store / _FOLDER / f"{name}.txt"
        if note.is_file():
            known = note.read_text(encoding="utf-8", errors="surrogateescape")
        else:
            known = ""
        # The name of a file that no longer exists is free: the study was probably moved here.
        has_moved = bool(known) and not known.startswith("mar:") and not Path(known).is_file()
        if known in ("", owner) or has_moved:
            if claims and known != owner:
                _keep(note, owner, store)
            return name
    return f"{base}_{digest}"


def _keep(note: Path, owner: str, store: Path) -> None:
    """Write which file owns a name.

    Raises:
        Failure: the store cannot be written.
    """
    # A path on Linux is bytes: ``surrogateescape`` writes one that is not UTF-8 unchanged.
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(owner, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise Failure(
            f"the store {store} cannot be written: {error}; choose another with --store"
        ) from None


def name_of(given: str, store: Path) -> str:
    """Return the name in a store of the study, search or recipe that a user names.

    A name that is no file is returned unchanged: its file may be gone while its runs exist.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        file = find(given, "study")
    except UserError:
        return given
    return name_in_store(base_name(file), file, store)


def base_name(file: Path) -> str:
    """Return the name of a study, search or recipe in a store where no other file has it."""
    # A recipe's name has its folder too, because several families have recipes of the same name.
    content = Document(file).content
    if {"axes", "title", "space"} & content.keys() or isinstance(content.get("recipe"), str):
        return file.stem
    return recipe_title(file).replace("/", "_")


def recipe_title(file: Path) -> str:
    """Return a recipe's title: its file's name, after the name of its folder."""
    if file.parent.name != "recipes":
        return f"{file.parent.name}/{file.stem}"
    return file.stem


def _owner(file: Path) -> str:
    """Return what identifies a file: its path, or for a packaged one its path in the package."""
    # A packaged file stays the same study when mar is installed in another folder.
    spaces = packaged("search_spaces").resolve()
    if file.is_relative_to(spaces):
        return f"mar:{file.relative_to(spaces)}"
    return str(file)
