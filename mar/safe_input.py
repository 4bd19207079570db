"""Input from others that is not trusted: names that become paths, JSON and YAML.

A name must stay in its folder. A file is read, or refused with a message, within seconds and with
bounded memory. Imports neither torch nor Ray.
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
"""Largest JSON file. The largest known annotations, Something-Something V2's, have 30 MB."""
MOST_YAML_BYTES = 2**20
"""Largest YAML text. PyYAML takes ten seconds to read this much; the largest study of the paper has
4 KB."""
_MOST_YAML_VALUES = 100_000
"""Most values of a YAML text, with each alias counted as the values that it stands for."""
_MOST_DIGITS = 40
"""Most characters of a number. No setting needs more, and Python refuses to parse a whole number of
thousands of digits."""


def below(folder: Path, name: str) -> Path:
    """Return ``folder / name`` for a name that somebody else wrote.

    Raises:
        UserError: the path would leave the folder, or the name cannot be a file's name.
    """
    # Only the name is checked and links are not resolved: a link in the folder was made by the
    # user, who may keep the data on another disk.
    pure = PurePosixPath(name)
    if not name or "\0" in name or pure.is_absolute() or ".." in pure.parts or not pure.parts:
        raise UserError(
            f"{folder}: the name {printable(name)!r} leaves this folder; nothing was read or "
            "written there"
        )
    return folder / pure


def read_json(file: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, nested too deeply, not UTF-8 or not JSON.
    """
    # The size is checked before reading, so that a huge file never gets into memory.
    if file.stat().st_size > MOST_JSON_BYTES:
        raise ValueError(f"larger than {MOST_JSON_BYTES // 2**20} MiB")
    return parse_json(file.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """Return the content of a JSON text.

    Raises:
        ValueError: it is not JSON, or nested too deeply.
    """
    # json.loads calls itself for each level. Its RecursionError is not a ValueError, and callers
    # would not catch it.
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class PlainLoader(yaml.SafeLoader):
    """A YAML reader that refuses numbers which YAML 1.1 reads differently than a person does.

    Examples: 010 (eight), 1:30 (ninety), 0x10, 1_000, .inf.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Return a whole number in plain decimal notation."""
        self._check(node, _WHOLE)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        """Return a finite number in plain decimal notation."""
        self._check(node, _DECIMAL)
        value = super().construct_yaml_float(node)
        # The pattern allows 1e999, which float() turns into infinity.
        if not math.isfinite(value):
            raise yaml.constructor.ConstructorError(
                None, None, "the number is too large", node.start_mark
            )
        return value

    def _check(self, node: yaml.ScalarNode, pattern: re.Pattern[str]) -> None:
        # The length comes first: the other message would quote all of a number of megabytes.
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


# No leading zeros, which YAML 1.1 reads as octal. The YAML loader has a table of functions by tag,
# so the two methods above must be registered anew to be called.
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_DECIMAL = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)


def parse_yaml(text: str, kind: type[PlainLoader] = PlainLoader) -> tuple[Any, yaml.Node | None]:
    """Return the content of a YAML text, and its tree of nodes, which has the line numbers.

    Raises:
        yaml.YAMLError: it is not YAML, or more than settings can have: too long, nested too deeply,
            aliases that multiply or refer to themselves, numbers of thousands of digits.
    """
    if len(text) > MOST_YAML_BYTES:
        raise yaml.YAMLError(f"larger than {MOST_YAML_BYTES // 2**20} MiB")
    loader = kind(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        if node is None:
            return None, None
        # Values are counted before they are constructed, because a few lines of nested aliases can
        # stand for billions of values. Nodes only refer to the target of an alias.
        _count(node, {}, set())
        return loader.construct_document(node), node
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    # PyYAML lets Python's error through for a date that does not exist, such as 2026-02-30.
    except (ValueError, OverflowError) as error:
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """Return the number of values of a node; the values of an alias count each time it is used.

    ``known`` has the counts of nodes by ``id``, ``above`` the ids of the nodes around this one.
    """
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an alias refers to itself", node.start_mark
        )
    # Each node is counted once, however often aliases use it: this takes time in proportion to the
    # text and not to the values.
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
