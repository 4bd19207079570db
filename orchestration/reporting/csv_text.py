"""Tables as csv, which people open in a spreadsheet."""

from __future__ import annotations

import pandas as pd

from mar.safe_text import cell


def csv_text(frame: pd.DataFrame, index: bool = False) -> str:
    """Return a table as csv in which no label is a formula."""
    safe = frame.map(cell).rename(columns=cell)
    text: str = (safe.rename(index=cell) if index else safe).to_csv(index=index)
    return text
