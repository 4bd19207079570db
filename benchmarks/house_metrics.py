"""Measures of how the code is written: density, comments, sizes. Exits 1 past a limit.

    python benchmarks/house_metrics.py

The limits are a mirror, not a goal: docs/design.md says where clarity wins over a number.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("mar", "orchestration")
MOST_COLUMNS = 100
PRIVATE_WORDS = {
    "told", "words", "place", "places", "lane", "desk", "wish", "wished", "heed", "news",
}  # fmt: skip


@dataclass
class Counts:
    """What is counted over all files."""

    statements: int = 0
    tuple_assignments: int = 0
    conditional_expressions: int = 0
    comments: int = 0
    code_lines: int = 0
    long_lines: int = 0
    private_words: int = 0
    functions: list[tuple[int, str]] = field(default_factory=list)
    """Lines, and where."""
    parameters: list[tuple[int, str]] = field(default_factory=list)
    files: list[tuple[int, str]] = field(default_factory=list)


def count(path: Path, counts: Counts) -> None:
    """Add a file to the counts."""
    text = path.read_text(encoding="utf-8")
    name = str(path.relative_to(ROOT))
    lines = text.splitlines()
    counts.files.append((len(lines), name))
    counts.code_lines += sum(bool(line.strip()) for line in lines)
    counts.long_lines += sum(len(line) > MOST_COLUMNS for line in lines)
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        counts.comments += token.type == tokenize.COMMENT
    for node in ast.walk(ast.parse(text)):
        counts.statements += isinstance(node, ast.stmt)
        counts.conditional_expressions += isinstance(node, ast.IfExp)
        counts.tuple_assignments += _is_tuple_assignment(node)
        counts.private_words += _name_of(node).strip("_").lower() in PRIVATE_WORDS
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            counts.functions.append((length, f"{name}:{node.name}"))
            arguments = len(node.args.args) + len(node.args.kwonlyargs)
            counts.parameters.append((arguments, f"{name}:{node.name}"))


def _is_tuple_assignment(node: ast.AST) -> bool:
    """Whether several values are assigned to several names at once."""
    return (
        isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    )


def _name_of(node: ast.AST) -> str:
    for attribute in ("id", "arg", "attr", "name"):
        name = getattr(node, attribute, None)
        if isinstance(name, str):
            return name
    return ""


def main() -> None:
    """Print each measure with its limit."""
    counts = Counts()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            count(path, counts)
    per_1000 = 1000 / counts.statements
    comments = 100 * counts.comments / counts.code_lines
    largest = max(counts.functions), max(counts.files), max(counts.parameters)
    measures = [
        (
            "assignments of several names per 1,000 statements",
            counts.tuple_assignments * per_1000,
            4,
        ),
        (
            "conditional expressions per 1,000 statements",
            counts.conditional_expressions * per_1000,
            15,
        ),
        (f"lines past {MOST_COLUMNS} columns", counts.long_lines, 0),
        ("private words used as names", counts.private_words, 0),
        (f"longest function, lines ({largest[0][1]})", largest[0][0], 60),
        (f"longest file, lines ({largest[1][1]})", largest[1][0], 400),
        (f"most parameters ({largest[2][1]})", largest[2][0], 12),
    ]
    is_past = comments < 5
    print(f"{comments:8.1f}  comment lines per 100 lines of code (at least 5)")
    for name, value, limit in measures:
        is_past = is_past or value > limit
        print(f"{value:8.1f}  {name} (at most {limit})")
    sys.exit(is_past)


if __name__ == "__main__":
    main()
