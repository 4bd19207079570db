"""Tables as CSV text that is safe to open in a spreadsheet."""

from __future__ import annotations

import pandas as pd

from mar.safe_text import cell


def csv_text(frame: pd.DataFrame, index: bool = False) -> str:
    """Return a table as CSV text in which a spreadsheet takes no label for a formula."""
    # Column and index labels are written by users too.
    safe = frame.map(cell).rename(columns=cell)
    text: str = (safe.rename(index=cell) if index else safe).to_csv(index=index)
    return text
