"""A progress bar for what takes a while before, or beside, a training."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def progress_bar(unit: str) -> Generator[Callable[[int, int], None]]:
    """Show a progress bar on the error stream: programs may read the output stream.

    Yields:
        A function that sets how much is done, of how much.
    """
    from rich.console import Console
    from rich.progress import Progress, TextColumn, TimeRemainingColumn

    # The first two of rich's columns are the description and the bar.
    columns = (
        *Progress.get_default_columns()[:2],
        TextColumn(f"{{task.completed}} {unit}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        # The total is known only when the first item is done.
        task = bar.add_task("")
        yield lambda done, total: bar.update(task, completed=done, total=total)
