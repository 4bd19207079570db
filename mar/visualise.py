"""Pictures of masks, as in Figs. 3 and 4."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from mar.config import ExperimentConfig
from mar.errors import UserError
from mar.masking import evaluation_mask, training_mask


def example_masks(settings: ExperimentConfig, num_clips: int) -> dict[str, Bool[Tensor, "t h w"]]:
    """Return the mask of evaluation and some drawn as in training, by name."""
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = training_mask(settings.mask, settings.grid, num_clips, generator)
    named = {f"training, clip {number}": mask for number, mask in enumerate(drawn, start=1)}
    return {"evaluation": evaluation_mask(settings)[0], **named}


def draw_masks(masks: dict[str, Bool[Tensor, "t h w"]], title: str, file: Path) -> None:
    """Draw each mask as a row of slices, hidden tokens dark.

    Raises:
        UserError: matplotlib does not write that format.
    """
    from matplotlib.figure import Figure

    num_slices = next(iter(masks.values())).shape[0]
    figure = Figure(figsize=(1.1 * num_slices + 1.2, 1.25 * len(masks) + 0.6), layout="constrained")
    panels: Any = figure.subplots(len(masks), num_slices, squeeze=False)
    for row, (line, (name, mask)) in enumerate(zip(panels, masks.items(), strict=True)):
        for step, (panel, hidden) in enumerate(zip(line, mask, strict=True)):
            cells = hidden.flip(0).int().numpy()
            panel.pcolormesh(cells, cmap="Greys", vmin=0, vmax=1.6, edgecolors="0.8", linewidth=0.4)
            panel.set(aspect="equal", xticks=[], yticks=[])
            if row == 0:
                panel.set_title(f"t = {step}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(title, fontsize=10)
    if file.suffix.lstrip(".").lower() not in figure.canvas.get_supported_filetypes():
        raise UserError(f"-o {file}: cannot draw a {file.suffix or 'nameless'} file; use .png, .pdf or .svg")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=160)
