"""HTML pages, from the templates beside this file.

Every value is escaped: labels, messages and settings are written by others. A part that is HTML
already is passed as ``Markup``; the code that makes it escapes what is inside.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("orchestration.reporting", "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    # A name that a template spells wrongly is an error, not an empty text.
    undefined=jinja2.StrictUndefined,
)


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write a page; makes its folder.

    Every template needs ``title``, and ``script``: plotly's, or an empty text.
    """
    page = _ENVIRONMENT.get_template(template).render(**values)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
