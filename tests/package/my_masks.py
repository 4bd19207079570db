"""A mask of stripes, and annotations as lines of ``label -> path``."""

from pathlib import Path

import torch
from pydantic import BaseModel, PositiveInt

from mar.config.schema import DataConfig
from mar.data.annotation_files import Annotations, Row, Split
from mar.plugins import MaskStrategy


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
broken = MaskStrategy(lambda options, grid, *rest: torch.zeros(1, *grid))


def read_pairs(data: DataConfig, split: Split) -> Annotations:
    file = Path(data.root) / f"{split}.pairs"
    pairs = [line.split(" -> ") for line in file.read_text().splitlines()]
    rows = [Row(path, int(label), str(file)) for label, path in pairs]
    return Annotations(rows, ["right", "left"])
