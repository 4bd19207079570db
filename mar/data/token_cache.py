"""The cached tokens of a frozen encoder, which a classifier trains on (``encoder.cached``).

``mar.evaluation.features`` writes the files: one for each thousand videos of a split, with all
tokens of all their test views in half precision. Here they are read: a clip is one view's tokens,
``K × D``, in the place of its pixels.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float16
from safetensors import safe_open
from torch import Tensor
from torch.utils.data import Dataset

from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.dataset import Sample
from mar.data.video.sequential_reader import BrokenVideo
from mar.rng import Stream, rng

BYTES_PER_VALUE = 2
"""Of half precision, which has three digits; values beyond its range are refused when written."""


class TokenCache:
    """The tokens of one split's videos.

    Broken videos have none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, tuple[str, int]] = {}
        """Index of a video in the split -> its file, and its row there."""
        for file in sorted(folder.glob("features_*.safetensors")):
            numbers = _opened(str(file)).get_tensor("videos").tolist()
            self.rows |= {number: (str(file), row) for row, number in enumerate(numbers)}

    def views(self, video: int) -> Float16[Tensor, "views K D"] | None:
        """Return the tokens of a video's views; None if it could not be decoded."""
        if video not in self.rows:
            return None
        file, row = self.rows[video]
        return _opened(file).get_slice("features")[row]


@lru_cache(maxsize=4096)
def _opened(file: str) -> Any:
    """Return an open file: it is mapped, so only the rows that are asked for are read."""
    return safe_open(file, framework="pt")


class TrainingTokens(Dataset[Sample]):
    """One view of a video, drawn by chance for each epoch; the key is (video, epoch)."""

    def __init__(self, settings: TrainingConfig, videos: list[Video], cache: TokenCache) -> None:
        self.settings = settings
        self.videos = videos
        self.cache = cache

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        index, epoch = key
        evaluation = self.settings.evaluation
        draw = rng(self.settings.seed, Stream.CLIP, epoch, index)
        view = int(draw.integers(evaluation.clips * evaluation.crops))
        sample = _sample(self.settings, self.videos, self.cache, index)
        return sample._replace(clips=sample.clips[view : view + 1])


class EvaluationTokens(Dataset[Sample]):
    """All views of a video; the key is the video's index."""

    def __init__(self, settings: TrainingConfig, videos: list[Video], cache: TokenCache) -> None:
        self.settings = settings
        self.videos = videos
        self.cache = cache

    def __getitem__(self, index: int) -> Sample:
        return _sample(self.settings, self.videos, self.cache, index)


def _sample(settings: TrainingConfig, videos: list[Video], cache: TokenCache, index: int) -> Sample:
    label = videos[index].label
    tokens = cache.views(index)
    if tokens is not None:
        return Sample(tokens, label, index)
    evaluation = settings.evaluation
    views = evaluation.clips * evaluation.crops
    empty = torch.zeros(views, *view_shape(settings), dtype=torch.float16)
    reason = f"it could not be decoded when its tokens were cached; {cache.folder} has them"
    return Sample(empty, label, index, BrokenVideo(videos[index].path, reason))


def view_shape(settings: TrainingConfig) -> tuple[int, int]:
    """Return the number of visible tokens of a view, and their width."""
    t, h, w = settings.grid
    visible = t * h * w - settings.test_mask.num_hidden(settings.grid)
    return visible, settings.encoder.dimensions[0]


def bytes_per_view(settings: TrainingConfig) -> int:
    """Return the size of one view's tokens."""
    visible, width = view_shape(settings)
    return visible * width * BYTES_PER_VALUE
