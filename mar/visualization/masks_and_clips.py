"""Pictures of masks, as in Figs. 3 and 4, and of clips after training's augmentation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import interpolate

from mar.augmentation.augment import augmented, draw_step, mix
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video, class_names, read_split
from mar.data.dataset import TrainingClips, TrainingOrder, evaluation_views, one_after_another
from mar.data.frame_cache import check, open_video
from mar.data.loaders import collate
from mar.data.video.paths import is_video
from mar.data.video.sequential_reader import BrokenVideo
from mar.distributed import WorkerRank
from mar.errors import Failure, UserError
from mar.model.encoder import patchify
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask, training_mask
from mar.model.pixels import to_pixels
from mar.rng import Stream, rng
from mar.visualization.charts import save


def example_masks(
    settings: TrainingConfig,
    num_clips: int,
    pixels: Float[Tensor, "C T H W"] | None = None,
    network: MAR | None = None,
) -> dict[str, Bool[Tensor, "t h w"]]:
    """Return the mask of evaluation and ``num_clips`` masks drawn as in training, by name.

    A mask that sees the clip sees ``pixels``, and the patch embeddings of ``network``; by default
    those of a model that has learnt nothing.

    Raises:
        UserError: the mask sees the clip, and there is none.
    """
    # Examples, and not the masks of a certain step, whose generator has another seed (draw_step).
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = {"evaluation": evaluation_mask(settings)[:1]}
    masks = settings.mask.in_training
    for mask in masks:
        training = training_mask(mask, settings.grid, num_clips, generator)
        ratio = ""
        if len(masks) > 1:
            ratio = f"ρ = {mask.first_ratio:.0%}, "
        for number in range(num_clips):
            drawn[f"training, {ratio}clip {number + 1}"] = training[number : number + 1]
    # At ratio 0 there is a mask also where it would see the clip.
    if all(each.dtype == torch.bool for each in drawn.values()):
        return {name: each[0] for name, each in drawn.items()}
    if pixels is None:
        raise UserError(
            f"mask.strategy: {settings.mask.strategy} sees the clip: which? Give a video"
        )
    tubelets = patchify(pixels[None], settings.encoder.tubelet)
    model = network or MAR(settings)
    return {name: model.masked(each, tubelets)[0] for name, each in drawn.items()}


def middle_clip(settings: TrainingConfig, path: Path) -> Float[Tensor, "C T H W"]:
    """Return a video's middle clip and centre crop, as a test has it; pixel values from 0 to 1.

    Raises:
        UserError: no such file.
        Failure: it cannot be decoded.
    """
    if not is_video(path):
        raise UserError(f"no such video: {path}")
    # The frame cache has the data set's videos, and this may be any.
    data = settings.data.model_copy(update={"cache": None})
    try:
        # Label 0 is a placeholder.
        with open_video(data, Video(str(path), path, 0)) as reader:
            return to_pixels(evaluation_views(settings, reader, 1, 1))[0]
    except BrokenVideo as broken:
        raise Failure(str(broken), "data") from None


_SHADE = 0.2
"""Brightness of hidden patches that are drawn over a frame."""


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


def draw_masks(
    masks: dict[str, Bool[Tensor, "t h w"]],
    title: str,
    file: Path,
    pixels: Float[Tensor, "C T H W"] | None = None,
) -> None:
    """Draw each mask as a row of slices, hidden tokens dark; with ``pixels`` over their frames.

    Raises:
        UserError: matplotlib does not write that format.
    """
    num_slices = next(iter(masks.values())).shape[0]
    figure = Figure(figsize=(1.1 * num_slices + 1.2, 1.25 * len(masks) + 0.6), layout="constrained")
    panels: Any = figure.subplots(len(masks), num_slices, squeeze=False)
    for row, (line, (name, mask)) in enumerate(zip(panels, masks.items(), strict=True)):
        for step, (panel, hidden) in enumerate(zip(line, mask, strict=True)):
            if pixels is None:
                # pcolormesh has its first row at the bottom.
                cells = hidden.flip(0).int().numpy()
                panel.pcolormesh(
                    cells, cmap="Greys", vmin=0, vmax=1.6, edgecolors="0.8", linewidth=0.4
                )
            else:
                # The first frame of the slice's tubelets.
                frame = pixels[:, step * pixels.shape[1] // num_slices]
                shade = _SHADE + (1 - _SHADE) * (~hidden).float()
                shade = interpolate(shade[None, None], size=tuple(frame.shape[1:]))[0]
                panel.imshow((frame * shade).clamp(0, 1).permute(1, 2, 0).numpy())
            panel.set(aspect="equal", xticks=[], yticks=[])
            if row == 0:
                panel.set_title(f"t = {step}", fontsize=8)
        line[0].set_ylabel(name, fontsize=7)
    figure.suptitle(title, fontsize=10)
    save(figure, file)
