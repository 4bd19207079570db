"""What others wrote: names that become paths, JSON and YAML.

None of it is trusted: a name stays below its folder, and a file ends in a value or a worded error,
in seconds and in bounded memory. Imports neither torch nor Ray.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from mar.errors import UserError
from mar.safe_text import printable

MOST_JSON_BYTES = 256 * 2**20
"""The annotations of Something-Something V2, the largest that are known, take 30 MB."""
MOST_YAML_BYTES = 2**20
"""The YAML reader takes ten seconds for so much; the largest study of the paper has 4 KB."""
_MOST_YAML_VALUES = 100_000
"""With each alias counted as what it stands for."""
_MOST_DIGITS = 40
"""Characters of a number: more is no setting, and a number of thousands of digits stops Python's
reader."""


def below(folder: Path, name: str) -> Path:
    """Return ``folder / name``, for a name that somebody else wrote.

    Links in the folder are the user's own.

    Raises:
        UserError: it would leave the folder, or cannot be a file's name.
    """
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UserError(
            f"{folder}: the name {printable(name)!r} leaves this folder; nothing was read or "
            "written there"
        )
    return folder / pure


def read_json(file: Path) -> Any:
    """Return what a JSON file says.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, nested too deeply, not UTF-8 or no JSON.
    """
    if file.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"larger than {MOST_JSON_BYTES // 2**20} MiB")
    return parse_json(file.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Return what a JSON text says; raises ValueError also where it is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class PlainLoader(yaml.SafeLoader):
    """Refuses numbers that YAML reads otherwise than a person does.

    As 010 (eight), 1:30 (ninety), 0x10, 1_000, .inf.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number that is written as such."""
        self._check(node, _WHOLE)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Return a finite number that is written as such."""
        self._check(node, _DECIMAL)
        value = super().construct_yaml_float(node)
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, "the number is too large", node.start_mark
            )
        return value

    def _check(self, node: yaml.ScalarNode, pattern: re.Pattern[str]) -> None:
        problem = ""
        if len(node.value) > _MOST_DIGITS:
            problem = f"a number of {len(node.value)} characters"
        elif not pattern.fullmatch(node.value):
            problem = (
                f"{node.value} is not a plain decimal number: write it as 8, 0.5 or 1e-3, or in "
                "quotes if it is a name"
            )
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)


def parse_yaml(text: str, kind: type[PlainLoader] = PlainLoader) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML text says, and its tree of nodes, which knows the lines.

    Raises:
        yaml.YAMLError: it is no YAML, or has more in it than settings have: too long, nested too
            deeply, aliases that multiply or refer to themselves, numbers of thousands of digits.
    """
    if len(text) > MOST_YAML_BYTES:
        raise yaml.YAMLError(f"larger than {MOST_YAML_BYTES // 2**20} MiB")
    loader = kind(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        if node is None:
            return None, None
        _count(node, {}, set())
        return loader.construct_document(node), node
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, OverflowError) as error:  # of a date that there is not, 2026-02-30
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return how many values a node stands for, those of aliases each time they are used."""
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an alias refers to itself", node.start_mark
        )
    if id(node) not in known:
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        else:
            if isinstance(node, yaml.SequenceNode):
                parts = node.value
            else:
                parts = []
        known[id(node)] = 1 + sum(_count(part, known, above | {id(node)}) for part in parts)
        if known[id(node)] > _MOST_YAML_VALUES:
            problem = f"its aliases stand for more than {_MOST_YAML_VALUES} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return known[id(node)]
