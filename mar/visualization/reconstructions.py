"""Pictures of reconstructions (Fig. 6): the original, the masked and the reconstructed video."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import pad

from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.dataset import EvaluationClips
from mar.data.frame_cache import check
from mar.data.loaders import collate
from mar.errors import Failure, UserError
from mar.model.encoder import patchify, unpatchify
from mar.model.mar import MAR, num_hidden_of
from mar.model.masking import DrawnMask, evaluation_mask
from mar.model.pixels import to_pixels
from mar.visualization.charts import save

_GREY = 0.5
"""Value of hidden pixels in the masked video, from 0 to 1."""
_LABEL_IN = 0.3
"""Width of the labels beside the frames, in inches."""


@torch.no_grad()
def rebuilt(
    settings: TrainingConfig,
    model: MAR,
    pixels: Float[Tensor, "B C T H W"],
    drawn: DrawnMask,
) -> tuple[Float[Tensor, "B C T H W"], Float[Tensor, "B C T H W"]]:
    """Return the masked videos and the reconstructed ones.

    Hidden patches are grey in the masked videos, and predicted by the model in the others.
    """
    tubelet = settings.encoder.tubelet
    channels = pixels.shape[1]
    patches = patchify(pixels, tubelet)
    hidden = model.masked(drawn, patches)
    _, indices = model.indices(hidden, patches, num_hidden_of(drawn))
    # gather and scatter need an index for each of the P values of a patch.
    index = indices[..., None].expand(-1, -1, patches.shape[-1])
    original = patches.gather(1, index)
    # The model predicts patches with the channel last; patchify() has it first.
    predicted = (
        model.reconstruct(pixels, hidden).float().unflatten(-1, (-1, channels)).transpose(-1, -2)
    )
    # Predictions of normalised patches (Table VIII) have no mean and deviation. They are taken from
    # the original, and undo the normalisation of reconstruction_target().
    if settings.reconstruction.normalize_target:
        values = original.unflatten(-1, (channels, -1))
        predicted = predicted * (values.std(dim=-1, keepdim=True) + 1e-6) + values.mean(
            dim=-1, keepdim=True
        )
    lines = (
        patches.scatter(1, index, part)
        for part in (torch.full_like(original, _GREY), predicted.flatten(-2))
    )
    masked, redrawn = (unpatchify(line, settings.grid, tubelet) for line in lines)
    # A prediction can be outside of the range of pixels.
    return masked, redrawn.clamp(0, 1)


def draw_reconstructions(
    settings: TrainingConfig, model: MAR, videos: list[Video], file: Path, num_frames: int = 8
) -> None:
    """Draw three lines for each video: original, masked, rebuilt.

    Raises:
        UserError: the model has no reconstruction branch, nothing is hidden, or matplotlib does not
            write that format.
        Failure: a video cannot be decoded.
    """
    if not settings.redraws_in_testing:
        raise UserError(
            "no reconstruction: this model has no reconstruction branch, or nothing is hidden in "
            "testing"
        )
    check(settings.data, videos)
    clips = EvaluationClips(settings, videos, 1, 1, shuffled=False)
    batch = collate([clips[number] for number in range(len(videos))])
    if batch.broken:
        raise Failure(str(batch.broken[0]))
    pixels = to_pixels(batch.clips[:, 0].to(model.device))
    # The caller may be in the middle of a training, so the model's mode is restored below.
    was_training = model.training
    model.eval()
    lines = (
        pixels,
        *rebuilt(
            settings, model, pixels, evaluation_mask(settings).expand(len(pixels), -1, -1, -1)
        ),
    )
    model.train(was_training)
    shown = torch.linspace(0, pixels.shape[2] - 1, num_frames).long()
    # B 3 C frames H W, where 3 are the lines of a video.
    tiled = torch.stack([line[:, :, shown].cpu() for line in lines], dim=1)
    # All frames become one image with white gaps: much faster than a matplotlib panel for each.
    height, width = tiled.shape[-2:]
    gap = max(1, width // 32)
    tiled = pad(tiled, (0, gap, 0, gap), value=1.0)
    # -> (B 3 H) × (frames W) × C. The last gap of each side is cut off.
    picture = tiled.permute(0, 1, 4, 3, 5, 2).flatten(0, 2).flatten(1, 2)[:-gap, :-gap]
    figure = Figure(figsize=(_LABEL_IN + 1.1 * num_frames, 1.1 * height / width * 3 * len(videos)))
    panel: Any = figure.add_axes(
        (_LABEL_IN / figure.get_figwidth(), 0, 1 - _LABEL_IN / figure.get_figwidth(), 1)
    )
    panel.imshow(picture.numpy(), aspect="auto")
    # A label in the middle of each line of frames, in pixels.
    rows = [(height + gap) * row + height / 2 for row in range(3 * len(videos))]
    panel.set_yticks(
        rows, ["original", "masked", "rebuilt"] * len(videos), fontsize=8, rotation=90, va="center"
    )
    panel.set_xticks([])
    panel.tick_params(length=0)
    panel.set_frame_on(False)
    save(figure, file)
