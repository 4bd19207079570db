"""A trained model for use from Python: what ``mar.load`` returns.

It takes videos as files or as arrays of frames, and prepares them as a test does: the frames, the
crops and the mask are those of the model's settings. ``mar predict`` and ``mar reconstruct`` are
made of it.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.dataset import FrameSource, evaluation_views
from mar.data.decoders import check as check_decoder
from mar.data.frame_cache import open_video
from mar.data.video.paths import is_video
from mar.data.video.sequential_reader import BrokenVideo, Frames
from mar.distributed import default_device
from mar.errors import Failure, UserError
from mar.evaluation.evaluator import class_probabilities
from mar.model.mar import MAR
from mar.model.masking import DrawnMask, evaluation_mask
from mar.model.pixels import to_pixels
from mar.visualization.reconstructions import rebuilt
from mar.weights.pretrained import EVERYTHING, load, model_settings
from mar.weights.reading import Weights, read_weights

VideoInput = str | Path | Frames
"""A video file, or its frames as an array of uint8, T × H × W × 3 (red, green, blue)."""
_DEFAULT_FPS = 25.0
"""Frame rate of a video whose file states none, and of an array: frames per second."""


class Prediction(NamedTuple):
    """One class of a video."""

    name: str
    """The class's name; its number where the model has no names."""
    probability: float
    """From 0 to 1, averaged over the test views."""


class Window(NamedTuple):
    """A part of a video, and its most probable classes."""

    start_s: float
    end_s: float
    predictions: list[Prediction]


class Reconstruction(NamedTuple):
    """A test clip three times, pixel values from 0 to 1."""

    original: Float[Tensor, "C T H W"]
    masked: Float[Tensor, "C T H W"]
    """Hidden patches are grey."""
    rebuilt: Float[Tensor, "C T H W"]
    """Hidden patches are the model's."""


class Model(nn.Module):
    """A trained model, its settings and the names of its classes; in evaluation mode."""

    def __init__(
        self, network: MAR, settings: TrainingConfig, classes: Sequence[str], parts: frozenset[str]
    ) -> None:
        super().__init__()
        self.network = network
        self.settings = settings
        self.classes = tuple(classes)
        """The classes' names by number; empty where the file has none."""
        self.parts = parts
        """The parts that were loaded: ``encoder``, ``classifier``, ``decoder``."""
        self.eval()

    @classmethod
    def of(cls, weights: Weights, overrides: Mapping[str, Any] | None = None) -> Self:
        """Return the model of a checkpoint, with every part that the file has.

        Raises:
            UserError: the file does not fit the settings, or does not state its number of heads.
        """
        # Without a frame cache: it has the data set's videos, and a video here may be any.
        settings = model_settings(weights, {"data.cache": None, **(overrides or {})})
        network = MAR(settings)
        # Settings may describe a branch that the file does not have, such as the decoder of a
        # fine-tuned model from elsewhere: it stays random, and ``parts`` says so. And where nothing
        # is hidden, the model has no decoder, though the file may have one.
        parts = [
            part for part in EVERYTHING if any(key.startswith(part) for key in weights.tensors)
        ]
        if network.decoder is None and "decoder." in parts:
            parts.remove("decoder.")
        load(network, weights, settings, parts)
        names = frozenset(part.removesuffix(".") for part in parts)
        return cls(network, settings, weights.classes, names)

    def __repr__(self) -> str:
        """Say what the model is, in one line: the modules of ``network`` are printed by it."""
        clip = self.settings.clip
        classes = ""
        if "classifier" in self.parts:
            classes = f", {self.settings.data.num_classes} classes"
        return (
            f"Model({self.settings.encoder.size} encoder{classes}, clips of {clip.frames} × "
            f"{clip.size} × {clip.size}, {self.settings.test_ratio:.0%} hidden in testing; has "
            f"{', '.join(sorted(self.parts))})"
        )

    @property
    def device(self) -> torch.device:
        """Where the model is; ``to`` moves it."""
        return self.network.device

    def forward(
        self, pixels: Float[Tensor, "B C T H W"], hidden: DrawnMask | None = None
    ) -> Float[Tensor, "B classes"]:
        """Return class scores of clips with pixel values from 0 to 1.

        ``hidden`` is True where a token is hidden; by default it is the mask of testing.

        Raises:
            UserError: the model was pre-trained only, and has no classifier.
        """
        self.require("classifier")
        if hidden is None:
            # Each is a clip of its own, and not a view among several.
            hidden = evaluation_mask(self.settings).expand(len(pixels), -1, -1, -1)
        return self.network.classify(pixels, hidden)

    @torch.no_grad()
    def probabilities(self, video: VideoInput) -> Float[Tensor, " classes"]:
        """Return the probability of each class, averaged over the test views.

        Raises:
            UserError: no such file, or the model has no classifier.
            Failure: the video cannot be decoded.
        """
        self.require("classifier")
        with _opened(video, self.settings) as source:
            return self._probabilities_of(source)

    def predict(self, video: VideoInput, top: int = 5) -> list[Prediction]:
        """Return a video's most probable classes, the most probable first.

        Raises:
            UserError: no such file, or the model has no classifier.
            Failure: the video cannot be decoded.
        """
        return self._best(self.probabilities(video), top)

    @torch.no_grad()
    def predict_windows(
        self, video: VideoInput, window_s: float, stride_s: float | None = None, top: int = 5
    ) -> Iterator[Window]:
        """Yield the most probable classes of each window of a long video.

        Args:
            video: A file, or an array of frames at 25 frames per second.
            window_s: Length of a window, seconds.
            stride_s: From the start of one window to the next; by default ``window_s``.
            top: The number of classes.

        Raises:
            UserError: no such file, a length that is not positive, or the model has no classifier.
            Failure: the video cannot be decoded.
        """
        self.require("classifier")
        stride = window_s if stride_s is None else stride_s
        if not (window_s > 0 and stride > 0):
            raise UserError(f"windows of {window_s} s every {stride} s: both must be more than 0")
        with _opened(video, self.settings) as source:
            fps = source.fps or _DEFAULT_FPS
            length = max(1, round(window_s * fps))
            step = max(1, round(stride * fps))
            # The last window may begin so that it ends with the video, and not be cut short: fewer
            # frames than the model was trained on would be repeated.
            firsts = list(range(0, max(len(source) - length, 0) + 1, step))
            if firsts[-1] + length < len(source):
                firsts.append(len(source) - length)
            for first in firsts:
                part = _Part(source, first, min(length, len(source) - first))
                best = self._best(self._probabilities_of(part), top)
                yield Window(first / fps, (first + len(part)) / fps, best)

    @torch.no_grad()
    def features(self, video: VideoInput, pooled: bool = True) -> Tensor:
        """Return the encoder's tokens F_v under the mask of testing.

        Returns:
            With ``pooled`` their mean over all tokens and test views, [D]; otherwise all of them,
                [views, K, D], in the order t, h, w of the visible tokens.

        Raises:
            UserError: no such file.
            Failure: the video cannot be decoded.
        """
        with _opened(video, self.settings) as source:
            pixels = self._pixels(source)
        masks = evaluation_mask(self.settings, views=len(pixels))
        tokens = self.network.features(pixels, masks)
        return tokens.mean(dim=(0, 1)) if pooled else tokens

    @torch.no_grad()
    def reconstruct(self, video: VideoInput) -> Reconstruction:
        """Return a test clip, what its mask leaves visible, and the model's reconstruction.

        Raises:
            UserError: no such file, the model has no decoder, or nothing is hidden in testing.
            Failure: the video cannot be decoded.
        """
        if not self.settings.test_ratio:
            raise UserError("nothing is hidden in testing: set mask.ratio, as mask.ratio=0.5")
        self.require("decoder")
        with _opened(video, self.settings) as source:
            # One clip, the centre crop: further views would show the same.
            views = evaluation_views(self.settings, source, 1, 1)
        pixels = to_pixels(views.to(self.device))
        masked, redrawn = rebuilt(
            self.settings, self.network, pixels, evaluation_mask(self.settings)
        )
        return Reconstruction(pixels[0], masked[0], redrawn[0])

    def require(self, part: str) -> None:
        """Raise a UserError if the file had no such part: ``classifier`` or ``decoder``."""
        if part not in self.parts:
            raise UserError(
                f"this model has no {part}: its file has {', '.join(sorted(self.parts))} alone"
            )

    def _pixels(self, source: FrameSource) -> Float[Tensor, "views C T H W"]:
        evaluation = self.settings.evaluation
        views = evaluation_views(self.settings, source, evaluation.clips, evaluation.crops)
        return to_pixels(views.to(self.device))

    def _probabilities_of(self, source: FrameSource) -> Float[Tensor, " classes"]:
        pixels = self._pixels(source)
        probabilities = class_probabilities(self.network, pixels, self.settings)
        return probabilities.mean(dim=0).cpu()

    def _best(self, probabilities: Float[Tensor, " classes"], top: int) -> list[Prediction]:
        best = probabilities.topk(min(top, len(probabilities)))
        return [
            Prediction(self.class_name(label), probability)
            for label, probability in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def class_name(self, label: int) -> str:
        """Return the name of a class; its number where the model has no name for it."""
        if label < len(self.classes):
            return self.classes[label]
        return str(label)


def load_model(name: str | Path, overrides: Mapping[str, Any] | None = None) -> Model:
    """Return a trained model, on this machine's accelerator if it has one.

    Args:
        name: A file or folder of weights of any known layout (such as a trial's ``result``),
            ``organisation/model`` on Hugging Face, a timm model, or ``mini``, which ships with mar.
        overrides: Settings to use instead of the model's, by path: ``{"mask.ratio": 0.75}``.

    Raises:
        UserError: there is no such model, it is not of a known layout, or does not fit.
    """
    return Model.of(read_weights(str(name)), overrides).to(default_device())


class FrameArray:
    """Frames in memory, as a source of clips."""

    fps = None

    def __init__(self, frames: Frames) -> None:
        self._frames = frames

    def __len__(self) -> int:
        return len(self._frames)

    def frames(self, indices: Sequence[int]) -> Frames:
        """Return the frames with these numbers; those past the end are the last one."""
        last = len(self) - 1
        return self._frames[[min(index, last) for index in indices]]


class _Part:
    """Some consecutive frames of a video, as a source of clips."""

    def __init__(self, source: FrameSource, first: int, length: int) -> None:
        self.source = source
        self.first = first
        self.length = length
        self.fps = source.fps

    def __len__(self) -> int:
        return self.length

    def frames(self, indices: Sequence[int]) -> Frames:
        last = self.length - 1
        return self.source.frames([self.first + min(index, last) for index in indices])


@contextmanager
def _opened(video: VideoInput, settings: TrainingConfig) -> Generator[FrameSource]:
    """Open a video, or take its frames.

    Raises:
        UserError: no such file, or the array is not one of frames.
        Failure: the video cannot be decoded, here or while it is read.
    """
    if not isinstance(video, str | Path):
        yield FrameArray(_checked_frames(video))
        return
    path = Path(video).expanduser()
    if not is_video(path):
        raise UserError(f"no such video: {path}")
    check_decoder(settings.data.decoder)
    try:
        # Label 0 is a placeholder: no accuracy is computed.
        with open_video(settings.data, Video(str(path), path, 0)) as reader:
            yield reader
    except BrokenVideo as broken:
        raise Failure(str(broken), "data") from None


def _checked_frames(frames: Any) -> UInt8[np.ndarray, "T H W 3"]:
    """Return frames as an array of uint8.

    Raises:
        UserError: they have another shape or type.
    """
    array = np.asarray(frames)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        raise UserError(
            f"frames of shape {array.shape} and type {array.dtype}: expected uint8, T × H × W × 3 "
            "(red, green, blue)"
        )
    return array
