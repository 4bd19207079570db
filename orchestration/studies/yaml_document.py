"""YAML files of studies and recipes: finds them, and remembers the line of each entry."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from mar.config.overrides import SettingError, merge
from mar.errors import UserError
from mar.safe_input import MOST_YAML_BYTES, PlainLoader, parse_yaml
from orchestration.installation import packaged

FAMILY_FILE = "family.yaml"
"""File in a folder of recipes that is none of them (``orchestration.studies.family``)."""


def find(name: str, kind: str) -> Path:
    """Return the file that ``name`` means: a path, or the name of a packaged study or recipe.

    Raises:
        UserError: no such file exists; the message has the nearest packaged names.
    """
    given = Path(name)
    spaces = packaged("search_spaces")
    folder = spaces / "recipes" if kind == "recipe" else spaces
    # The working folder first, so that a user's file wins over a packaged one of the same name. The
    # parent folder is for names as ``search_spaces/quickstart``.
    bases = (Path(), folder, spaces, spaces.parent)
    candidates = [base / each for base in bases for each in (name, f"{name}.yaml")]
    found = next((path for path in candidates if path.is_file()), None)
    if found:
        return found.resolve()
    if given.is_dir():
        inside = (
            ", ".join(sorted(path.name for path in given.glob("*.yaml"))[:5]) or "no .yaml file"
        )
        raise UserError(f"{name} is a folder ({inside}); name a file")
    pattern = "**/*.yaml" if kind == "recipe" else "*.yaml"
    known = sorted(
        str(path.relative_to(folder).with_suffix(""))
        for path in folder.glob(pattern)
        if path.name != FAMILY_FILE
    )
    near = difflib.get_close_matches(given.stem, known, n=3, cutoff=0.3) or known
    raise UserError(
        f"no {kind} {name!r}: neither a file nor one that ships with mar ({', '.join(near)})"
    )


def shipped() -> dict[str, str]:
    """Return the studies and recipes that ship with mar: name -> title, or its first comment."""
    spaces = packaged("search_spaces")
    found: dict[str, str] = {}
    for file in [*sorted(spaces.glob("*.yaml")), *sorted((spaces / "recipes").rglob("*.yaml"))]:
        if file.name == FAMILY_FILE:
            continue
        title = Document(file).content.get("title")
        if not title:
            comments = " ".join(_first_comments(file)).split(". ")
            title = comments[0].rstrip(".")
        found[str(file.relative_to(spaces).with_suffix(""))] = str(title)
    return found


def _first_comments(file: Path) -> Iterator[str]:
    """Yield the lines of the comment that a file begins with."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            return
        yield line.removeprefix("#").strip()


class _KeysAsWritten(PlainLoader):
    """Reads every key as text.

    YAML 1.1 reads a label like ``on`` or ``0.10`` as a boolean or a number, and the label would be
    printed as ``True`` or ``0.1``.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # The parser has given each key a tag by its looks: replace it by that of a text.
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                key.tag = "tag:yaml.org,2002:str"
        return super().construct_mapping(node, deep)


class Document:
    """A YAML mapping that remembers the line of every entry."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[tuple[str, ...], int] = {}
        try:
            # A video or a file of weights, given by mistake, must not be read into memory.
            if path.stat().st_size > MOST_YAML_BYTES:
                raise UserError(
                    f"{path}: larger than {MOST_YAML_BYTES // 2**20} MiB: not a study or a recipe"
                )
            text = path.read_text(encoding="utf-8")
            content, node = parse_yaml(text, _KeysAsWritten)
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            # Only some errors of PyYAML have a position, whose line is counted from 0.
            mark = getattr(error, "problem_mark", None)
            line = f":{mark.line + 1}" if mark else ""
            raise UserError(
                f"{path}{line}: not valid YAML: {getattr(error, 'problem', error)}"
            ) from None
        if not isinstance(content, dict) or not isinstance(node, yaml.MappingNode):
            raise UserError(f"{path}: expected settings, 'name: value' line by line")
        self.content: dict[str, Any] = content
        self.comments = _comments(text)
        self._read_lines(node, ())

    def location(self, *names: str) -> str:
        """Return ``file:line`` of the entry, or of its nearest ancestor that the file has."""
        for length in range(len(names), 0, -1):
            if names[:length] in self.lines:
                return f"{self.path}:{self.lines[names[:length]]}"
        return str(self.path)

    def location_of_setting(self, path: str) -> str:
        """Return ``file:line`` of a dotted setting, written nested or dotted."""
        return self.location(*(self._key(path) or path.split(".")))

    def has(self, path: str) -> bool:
        """Whether the file has that dotted setting."""
        return self._key(path) is not None

    def comment(self, path: str) -> str | None:
        """Return the comment on the line of a dotted setting."""
        key = self._key(path)
        return self.comments.get(self.lines[key]) if key else None

    def _key(self, path: str) -> tuple[str, ...] | None:
        """Return the key in ``lines`` of a dotted setting, written nested or dotted."""
        # ``mask: {ratio: 0.5}`` and ``mask.ratio: 0.5`` are the same setting.
        return next((key for key in self.lines if ".".join(key) == path), None)

    def _read_lines(self, node: yaml.MappingNode, above: tuple[str, ...]) -> None:
        """Record the line of each entry of a mapping and of the mappings in it.

        Raises:
            UserError: an entry is written twice.
        """
        for key, value in node.value:
            name = (*above, str(key.value))
            # PyYAML keeps the last of two equal keys, without an error.
            if name in self.lines:
                raise UserError(
                    f"{self.path}:{key.start_mark.line + 1}: {'.'.join(name)} is written twice"
                )
            self.lines[name] = key.start_mark.line + 1
            if isinstance(value, yaml.MappingNode):
                self._read_lines(value, name)


def _comments(text: str) -> dict[int, str]:
    """Return the comments that follow something on their line, by line."""
    # PyYAML drops comments. What follows the last token of a line is space or a comment; a "#"
    # inside a token, as in a quoted text, is none.
    ends: dict[int, int] = {}
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        end = token.end_mark
        if token.start_mark.index < end.index:
            ends[end.line] = max(ends.get(end.line, 0), end.column)
    lines = text.splitlines()
    # Tokens count lines from 0, ``Document.lines`` from 1.
    behind = {
        line + 1: lines[line][column:].strip() for line, column in ends.items() if line < len(lines)
    }
    return {
        line: comment.lstrip("# ") for line, comment in behind.items() if comment.startswith("#")
    }


class Recipe:
    """A recipe's settings, merged with those of the recipes that it extends."""

    def __init__(self, path: Path) -> None:
        self.documents: list[Document] = []
        """The recipe's file last; each file extends the one before it."""
        document = Document(path)
        while True:
            self.documents.insert(0, document)
            # Removed, because the content is merged below and ``extends`` is no setting.
            base = document.content.pop("extends", None)
            if base is None:
                break
            above = (document.path.parent / str(base)).resolve()
            if not above.is_file():
                try:
                    above = find(str(base), "recipe")
                except UserError as error:
                    raise UserError(f"{document.location('extends')}: extends: {error}") from None
            # A circle of files would be read without end.
            if above in [each.path.resolve() for each in self.documents]:
                raise UserError(f"{document.location('extends')}: extends: {base} extends itself")
            document = Document(above)
        self.content: dict[str, Any] = {}
        for each in self.documents:
            try:
                self.content = merge(self.content, each.content)
            except SettingError as error:
                raise UserError(f"{each.location_of_setting(error.path)}: {error}") from None

    def location_of_setting(self, path: str) -> str:
        """Return ``file:line`` of a dotted setting, in the file that sets it last."""
        return self._owner(path).location_of_setting(path)

    def comment(self, path: str) -> str | None:
        """Return the comment on the line of a dotted setting, in the file that sets it last."""
        return self._owner(path).comment(path)

    def _owner(self, path: str) -> Document:
        """Return the file that sets a setting last; the recipe's own file if none does."""
        return next(
            (each for each in reversed(self.documents) if each.has(path)), self.documents[-1]
        )
