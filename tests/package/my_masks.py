"""A mask of stripes, annotations as lines of ``label -> path``, an encoder and a classifier."""

from math import prod
from pathlib import Path

import torch
from pydantic import BaseModel, PositiveInt
from torch import nn

from mar.config.input_settings import DataConfig
from mar.data.annotation_files import Annotations, Row, Split
from mar.plugins import ClassifierFactory, EncoderFactory, MaskStrategy


class Options(BaseModel, extra="forbid"):
    width: PositiveInt = 1


def draw(
    options: Options,
    grid: tuple[int, int, int],
    num_hidden: int,
    num_clips: int,
    generator: torch.Generator,
) -> torch.Tensor:
    t, h, w = grid
    stripe = torch.arange(w) // options.width
    start = torch.randint(2, (num_clips, 1), generator=generator)
    hidden = (stripe + start) % 2 == 0
    return hidden[:, None, None, :].expand(num_clips, t, h, w)


stripes = MaskStrategy(draw, Options)
bright = MaskStrategy(score=lambda options, tubelets: tubelets.mean(dim=-1))
misshapen = MaskStrategy(score=lambda options, tubelets: tubelets[..., 0, 0])
broken = MaskStrategy(lambda options, grid, *rest: torch.zeros(1, *grid))


def read_pairs(data: DataConfig, split: Split) -> Annotations:
    file = Path(data.root) / f"{split}.pairs"
    pairs = [line.split(" -> ") for line in file.read_text().splitlines()]
    rows = [Row(path, int(label), str(file)) for label, path in pairs]
    return Annotations(rows, ["right", "left"])


class MixerOptions(BaseModel, extra="forbid"):
    width: PositiveInt = 16
    depth: PositiveInt = 2


class Mixer(nn.Module):
    """Mixes each token with its clip's average: an encoder that is no ViT."""

    def __init__(self, options: MixerOptions, num_tokens: int, patch_values: int) -> None:
        super().__init__()
        self.embed = nn.Linear(patch_values, options.width)
        self.place = nn.Embedding(num_tokens, options.width)
        self.blocks = nn.ModuleList(
            nn.Linear(2 * options.width, options.width) for _ in range(options.depth)
        )

    def forward(self, tubelets: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(tubelets) + self.place(visible)
        for block in self.blocks:
            mean = tokens.mean(dim=1, keepdim=True).expand_as(tokens)
            tokens = tokens + block(torch.cat([tokens, mean], dim=-1)).relu()
        return tokens


mixer = EncoderFactory(
    lambda options, grid, patch_values: Mixer(options, prod(grid), patch_values),
    lambda options: options.width,
    MixerOptions,
)


class MaxPool(nn.Module):
    """The largest value of each channel over the tokens, and a linear layer."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(width, num_classes)

    def forward(self, tokens: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        return self.head(tokens.amax(dim=1))


max_pool = ClassifierFactory(lambda _, width, grid, num_classes: MaxPool(width, num_classes))
transposed = ClassifierFactory(lambda _, width, grid, num_classes: nn.Bilinear(width, 1, 1))
too_narrow = EncoderFactory(mixer.build, lambda options: options.width + 1, MixerOptions)
