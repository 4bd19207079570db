"""Text from others, made safe to show in a terminal, a spreadsheet or a page.

Imports no other module of this project.
"""

from __future__ import annotations

import re
import unicodedata
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""First characters of a cell that a spreadsheet evaluates as a formula."""
_MOST_OF_A_MESSAGE = 4000
"""Most characters of a message: a file may have a line of megabytes, which the message quotes."""
_SHOWN_CONTROLS = "\n\t"
# Unicode's categories of control characters, line separators and paragraph separators.
_HIDDEN_CATEGORIES = {"Cc", "Zl", "Zp"}
_DIRECTIONS = re.compile("[\u202a-\u202e\u2066-\u2069]")
"""Characters that change the reading direction: with them a name can look like another one."""
_NUMBER = re.compile(r"[-+]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")


def printable(text: str) -> str:
    r"""Return text without characters that a terminal would act on.

    Control characters are escaped, for example as ``\x1b``, except new lines and tabs.
    """
    # Nearly all texts end here: str.isprintable() is false for every character that is escaped.
    if text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def message(text: str) -> str:
    """Return a message for a person: printable, and cut off after 4,000 characters."""
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
    """Return a value for a csv file that no spreadsheet evaluates as a formula."""
    # A number may begin with a sign, and stays as it is.
    if not isinstance(value, str) or not value.startswith(_FORMULA) or _NUMBER.fullmatch(value):
        return value
    # Spreadsheets show a value with a leading apostrophe as text.
    return f"'{value}"


def markdown(text: str) -> str:
    """Return text that Markdown shows unchanged: no HTML, no links, no further table columns."""
    # First: a backslash of the text would take the one that is put before what follows it.
    safe = printable(text).replace("\\", "\\\\").replace("|", "\\|")
    # A < starts HTML only before a letter, /, ! or ?: others, as in "p < 0.05", stay as they are.
    safe = re.sub(r"<(?=[A-Za-z/!?])", r"\\<", safe)
    return safe.replace("](", "]\\(").replace("\n", " ")
