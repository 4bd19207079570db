"""Others' words, shown and not obeyed: by a terminal, a spreadsheet, a page.

Imports nothing else of ours.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What begins so, a spreadsheet computes."""
_MOST_OF_A_MESSAGE = 4000
"""Characters; a file may have a line of megabytes, and a message quotes it."""
_SHOWN_CONTROLS = "\n\t"
_HIDDEN_CATEGORIES = {"Cc", "Zl", "Zp"}
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that turn the reading order: a name can look like another one."""
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def printable(text: str) -> str:
    r"""Return text that a terminal shows and does not obey.

    Control characters are written as ``\x1b``, except new lines and tabs.
    """
    if text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def message(text: str) -> str:
    """Return words for a person: printable, and not so many that nobody finds what is wrong."""
    if len(text) > _MOST_OF_A_MESSAGE:
        text = f"{text[:_MOST_OF_A_MESSAGE]} … ({len(text)} characters)"
    return printable(text)


def _visible(character: str) -> str:
    is_hidden = (
        unicodedata.category(character) in _HIDDEN_CATEGORIES and character not in _SHOWN_CONTROLS
    )
    if is_hidden or _DIRECTIONS.match(character):
        return character.encode("unicode_escape").decode("ascii")
    return character


def cell(value: Any) -> Any:
    """Return a value for a csv file that no spreadsheet takes for a formula.

    Numbers stay numbers.
    """
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def markdown(text: str) -> str:
    """Return text that Markdown shows unchanged: no HTML, no links, no further table columns."""
    safe = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", printable(text).replace("|", "\\|"))
    return safe.replace("](", "]\\(").replace("\n", " ")
