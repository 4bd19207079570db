"""Charts of a training, drawn without torch: learning curves and confusion matrices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure

from mar.errors import UserError

_NAMED_CLASSES = 40
"""A confusion matrix of more classes shows neither names nor counts, which would not be legible."""


def draw_confusion(
    counts: Int[np.ndarray, "classes classes"], names: list[str], file: Path
) -> None:
    """Draw a confusion matrix: rows are true classes, columns predicted; shares of each row."""
    # A class without videos has a row of zeros, which clip() saves from a division by zero.
    shares = counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    is_named = len(names) <= _NAMED_CLASSES
    # In inches: room for each name, up to a page.
    side = min(3 + 0.45 * len(names), 12)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    panel: Any = figure.subplots()
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the class's videos", shrink=0.8)
    panel.set(xlabel="taken for", ylabel="class")
    if is_named:
        panel.set_xticks(range(len(names)), [name[:28] for name in names], rotation=90, fontsize=7)
        panel.set_yticks(range(len(names)), [name[:28] for name in names], fontsize=7)
        for row, line in enumerate(counts.tolist()):
            for column, count in enumerate(line):
                if count:
                    # White on the dark half of the colour map, black on the light half.
                    if shares[row, column] > 0.5:
                        color = "white"
                    else:
                        color = "black"
                    panel.text(
                        column, row, str(count), ha="center", va="center", fontsize=7, color=color
                    )
    save(figure, file)


def draw_curves(history: list[dict[str, float]], file: Path) -> None:
    """Draw the losses of each epoch and, if the history has them, the accuracies."""
    # Losses and accuracies have other scales, so each group has a panel. A pre-training has no
    # accuracies, and then no second panel.
    groups = [
        ["train/loss", "train/reconstruction_loss", "val/reconstruction_loss"],
        ["val/top1", "val/top5"],
    ]
    shown = [
        [name for name in group if any(name in epoch for epoch in history)] for group in groups
    ]
    shown = [group for group in shown if group]
    width = 4.6 * len(shown)
    figure = Figure(figsize=(width, 3.2))
    # Fixed margins, because layout="constrained" takes forty milliseconds more, in every trial.
    margins = {
        "left": 0.65 / width,
        "right": 1 - 0.15 / width,
        "bottom": 0.15,
        "top": 0.97,
        "wspace": 0.18,
    }
    panels: Any = figure.subplots(1, len(shown), squeeze=False, gridspec_kw=margins)
    for panel, names in zip(panels[0], shown, strict=True):
        for name in names:
            # Not every epoch has every metric: validation may come every few epochs.
            points = [
                (number, epoch[name])
                for number, epoch in enumerate(history, start=1)
                if name in epoch
            ]
            panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
        panel.set(xlabel="epoch", ylabel="%" if names[0].startswith("val/top") else "loss")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    save(figure, file)


def save(figure: Figure, file: Path) -> None:
    """Write a figure in the format that the file's name ends with.

    Raises:
        UserError: matplotlib does not write that format.
    """
    # Checked first, because matplotlib's own error lists all formats but not the option to change.
    if file.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(
            f"-o {file}: cannot draw a {file.suffix or 'nameless'} file; use .png, .pdf or .svg"
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {}
    # For pictures of frames, level 1 takes half the time of the default and a sixth more bytes.
    if file.suffix.lower() == ".png":
        options["pil_kwargs"] = {"compress_level": 1}
    figure.savefig(file, dpi=160, **options)
