"""The name of a study in a store: its file's name, made distinct from other files' names.

A name stands for a study's experiment in MLflow, its lock and its report. The first file that runs
under a name keeps it in that store; another file of that name, in another folder, is called by its
folder's name too.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from mar.errors import Failure, UserError
from orchestration.installation import CODE, packaged
from orchestration.studies.yaml_document import Document, find

_FOLDER = "studies"
"""Below the store: a file for each name, in it the path of the study's file."""


def name_in_store(base: str, file: Path, store: Path, claims: bool = False) -> str:
    """Return a study's name in a store; ``claims`` keeps it for this file."""
    if CODE in os.environ:  # a submitted job: its files lie in another folder each time
        return base
    owner = _owner(file)
    digest = hashlib.sha256(owner.encode(errors="surrogateescape")).hexdigest()[:6]
    for name in (base, f"{file.parent.name}_{base}", f"{base}_{digest}"):
        note = store / _FOLDER / f"{name}.txt"
        if note.is_file():
            known = note.read_text(encoding="utf-8", errors="surrogateescape")
        else:
            known = ""
        has_moved = bool(known) and not known.startswith("mar:") and not Path(known).is_file()
        if known in ("", owner) or has_moved:
            if claims and known != owner:
                _keep(note, owner, store)
            return name
    return f"{base}_{digest}"


def _keep(note: Path, owner: str, store: Path) -> None:
    try:
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(owner, encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise Failure(
            f"the store {store} cannot be written: {error}; choose another with --store"
        ) from None


def name_of(given: str, store: Path) -> str:
    """Return the name in a store of the study, search or recipe that a person means.

    Or what was given, if it is no file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        file = find(given, "study")
    except UserError:
        return given
    return name_in_store(base_name(file), file, store)


def base_name(file: Path) -> str:
    """Return what a study, search or recipe is called where no other has its name."""
    content = Document(file).content
    if {"axes", "title", "space"} & content.keys() or isinstance(content.get("recipe"), str):
        return file.stem
    return recipe_title(file).replace("/", "_")


def recipe_title(file: Path) -> str:
    """Return what people call a recipe: its name, behind its folder's."""
    if file.parent.name != "recipes":
        return f"{file.parent.name}/{file.stem}"
    return file.stem


def _owner(file: Path) -> str:
    """Return what stands for a file: its path, or for one that ships with mar where it is there."""
    spaces = packaged("search_spaces").resolve()
    if file.is_relative_to(spaces):
        return f"mar:{file.relative_to(spaces)}"
    return str(file)
