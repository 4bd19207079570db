"""HTML pages, made from the templates in ``templates/``.

Every value is escaped, because labels, messages and settings are written by users. A part that is
already HTML is passed as ``Markup``; the code that makes that part escapes its content.
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
    # A misspelled name in a template is an error, not an empty text.
    undefined=jinja2.StrictUndefined,
)


def write_page(file: Path, template: str, **values: Any) -> None:
    """Write a page; creates its folder.

    Every template needs ``title`` and ``script`` (plotly's, or an empty text).
    """
    # Rendered first: an error in a template leaves an existing page unchanged.
    page = _ENVIRONMENT.get_template(template).render(**values)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(page, encoding="utf-8")
