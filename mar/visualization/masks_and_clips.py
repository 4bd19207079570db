"""Pictures of masks, as in Figs. 3 and 4, and of clips after training's augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from matplotlib.figure import Figure
from torch import Tensor

from mar.augmentation.augment import augmented, draw_step, mix
from mar.config.schema import TrainingConfig
from mar.data.annotations import class_names, read_split
from mar.data.dataset import TrainingClips, TrainingOrder, one_after_another
from mar.data.frame_cache import check
from mar.data.loaders import collate
from mar.distributed import WorkerRank
from mar.errors import Failure
from mar.model.masking import evaluation_mask, training_mask
from mar.rng import Stream, rng
from mar.visualization.charts import save


def example_masks(settings: TrainingConfig, num_clips: int) -> dict[str, Bool[Tensor, "t h w"]]:
    """Return the mask of evaluation and ``num_clips`` masks drawn as in training, by name."""
    # Examples, and not the masks of a certain step, whose generator has another seed (draw_step).
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = training_mask(settings.mask, settings.grid, num_clips, generator)
    named = {f"training, clip {number}": mask for number, mask in enumerate(drawn, start=1)}
    return {"evaluation": evaluation_mask(settings)[0], **named}


def draw_clips(settings: TrainingConfig, num_clips: int, num_frames: int, file: Path) -> None:
    """Draw some frames of clips of the first training step, after augmentation and mixing.

    Raises:
        UserError: the data is missing, or matplotlib does not write that format.
        Failure: a video cannot be decoded, and ``data.broken`` is ``error``.
    """
    # The same steps as in the training loop, for one worker and step 0, on the CPU.
    videos = read_split(settings.data, "train")
    order = TrainingOrder(settings, [video.label for video in videos], WorkerRank())
    check(settings.data, videos)
    dataset = TrainingClips(settings, videos)
    batch = collate([dataset[key] for key in next(iter(order))[:num_clips]])
    if batch.broken and settings.data.broken == "error":
        raise Failure(str(batch.broken[0]))
    row = one_after_another(batch)
    # Only the first num_clips videos are decoded, so their clips come first in the whole batch too.
    # The choices are drawn for the whole batch, as in training, and then the first are taken.
    shown_clips = slice(min(num_clips, settings.recipe.batch_size))
    drawn = draw_step(settings, 0).of(range(settings.recipe.batch_size)[shown_clips])
    pixels, targets = augmented(row.clips[shown_clips], row.labels[shown_clips], drawn, settings)
    pixels, targets = mix(
        pixels, targets, settings.augment, rng(settings.seed, Stream.MIX, 0), row.good[shown_clips]
    )
    names = class_names(settings.data)
    # Four clips on a line, each as a few frames from its first to its last.
    shown = torch.linspace(0, pixels.shape[2] - 1, num_frames).long()
    figure = Figure(
        figsize=(4 * num_frames * 0.9, 1.05 * (-(-len(pixels) // 4))), layout="constrained"
    )
    columns = 4 * num_frames
    panels: Any = figure.subplots(-(-len(pixels) // 4), columns, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    for number, (clip, target) in enumerate(zip(pixels, targets, strict=True)):
        line = panels[number // 4][number % 4 * num_frames :]
        for panel, frame in zip(line, shown.tolist(), strict=False):
            panel.imshow(clip[:, frame].clamp(0, 1).permute(1, 2, 0).numpy())
        # A mixed clip has the labels of two clips; the title shows both with their shares.
        best = target.topk(min(2, len(target)))
        lines = [
            f"{names[label][:18]} {share:.0%}"
            for label, share in zip(best.indices, best.values, strict=True)
        ]
        line[0].set_title("\n".join(lines), fontsize=5, loc="left", pad=2)
    save(figure, file)


def draw_masks(masks: dict[str, Bool[Tensor, "t h w"]], title: str, file: Path) -> None:
    """Draw each mask as a row of slices, hidden tokens dark.

    Raises:
        UserError: matplotlib does not write that format.
    """
    num_slices = next(iter(masks.values())).shape[0]
    figure = Figure(figsize=(1.1 * num_slices + 1.2, 1.25 * len(masks) + 0.6), layout="constrained")
    panels: Any = figure.subplots(len(masks), num_slices, squeeze=False)
    for row, (line, (name, mask)) in enumerate(zip(panels, masks.items(), strict=True)):
        for step, (panel, hidden) in enumerate(zip(line, mask, strict=True)):
            # pcolormesh has its first row at the bottom.
            cells = hidden.flip(0).int().numpy()
            panel.pcolormesh(cells, cmap="Greys", vmin=0, vmax=1.6, edgecolors="0.8", linewidth=0.4)
            panel.set(aspect="equal", xticks=[], yticks=[])
            if row == 0:
                panel.set_title(f"t = {step}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, file)
