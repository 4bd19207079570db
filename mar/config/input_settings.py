"""Settings of what a model sees: data, clips, augmentation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from mar import plugins
from mar.config.node import Node
from mar.config.randaugment_policy import RandAugmentPolicy
from mar.config.types import Area, ClassCount, Fraction, FrameCount, PixelCount, Scale

ANNOTATION_FORMATS = (
    "list", "folders", "ssv2", "kinetics", "ucf101", "hmdb51", "diving48", "jester",
)  # fmt: skip
"""``data.format`` without what packages add."""
AUTO_CACHE = "auto"
"""``data.cache``: the frames are packed into the store (``mar.data.auto_cache``)."""


class DataConfig(Node):
    """The data set: its videos and their labels."""

    format: Annotated[str, Field(json_schema_extra={"enum": list(ANNOTATION_FORMATS)})] = "list"
    """Format of the annotations. ``list``: a path and a class number on each line; ``folders``: a
    folder for each class; the format in which a benchmark is distributed; or one that an installed
    package adds."""
    root: str = "data"
    """Folder of the data set. It is not part of a trial's identity; the data's fingerprint is."""
    videos: str = "."
    """Folder of the videos; relative to ``root``."""
    train: str | None = None
    """Annotation file of the training split; relative to ``root``, or absolute; none: the file with
    the official name."""
    val: str | None = None
    """Annotation file of the evaluation split; relative to ``root``, or absolute; none: the file
    with the official name."""
    labels: str | None = None
    """File of the class names, where the format has one; relative to ``root``, or absolute; none:
    the file with the official name."""
    split: Annotated[int, Field(ge=1, le=3)] = 1
    """Number of the split of UCF101 or HMDB51, which have three."""
    cache: str | None = None
    """Where frames are read instead of from the videos: the folder of a frame cache (``mar data
    pack``), or ``auto``: a cache in the store, packed before the first epoch with the videos' own
    pixels; none: the videos are decoded for every clip."""
    decoder: Literal["auto", "decord", "torchcodec", "pyav"] = "auto"
    """Library that decodes; ``auto``: torchcodec, or decord where torchcodec does not work. PyAV
    decodes the files for which the two would return wrong frames."""
    num_classes: ClassCount = 174
    """Number of classes C."""
    missing: Literal["error", "skip"] = "error"
    """``error``: a missing video is treated as one that cannot be decoded; ``skip``: it is left out
    of its split (in Kinetics some videos are always missing)."""
    broken: Literal["error", "skip"] = "error"
    """``error``: a training video that cannot be decoded stops the trial; ``skip``: it is left out
    and counted."""

    @field_validator("format")
    @classmethod
    def _is_known(cls, name: str) -> str:
        return plugins.check_name(plugins.FORMATS, name, ANNOTATION_FORMATS)

    @property
    def cache_folder(self) -> str | None:
        """The folder of the frame cache; None where there is none, or none yet (``auto``)."""
        return None if self.cache == AUTO_CACHE else self.cache


class ClipConfig(Node):
    """How a clip is taken from a video: frames, size and sampling."""

    frames: FrameCount = 16
    """Frames T in a clip (section IV-A)."""
    size: PixelCount = 224
    """Height and width of a clip, pixels (section IV-A); 112 is "D.S. 2x" of Table II."""
    sampling: Literal["segments", "dense"] = "segments"
    """``segments``: one frame from each of T equal segments (SSv2). ``dense``: T frames, ``stride``
    apart."""
    stride: PositiveInt = 4
    """Distance between two sampled frames, when ``dense`` (Kinetics: 4)."""
    fps: PositiveFloat | None = None
    """Frame rate for which ``stride`` is meant, when ``dense``: for a video with another rate the
    stride is converted (release: 30); none: not converted."""
    antialias: bool = True
    """Resize with antialiasing; the release resizes without it."""
    round_frames: bool = False
    """With ``segments``, in training: round the drawn position to the nearest frame (release),
    instead of down."""


class AugmentConfig(Node):
    """Training-time augmentation (Table I)."""

    crop_scale: Area = (0.08, 1.0)
    """Range of the random-resized crop's area, as a share of the frame."""
    # Written out, because the value is part of every trial's identity: 4 / 3 as a float.
    crop_aspect: Scale = (0.75, 1.3333333333333333)
    """Range of the random-resized crop's aspect ratio."""
    repeats: PositiveInt = 1
    """Clips of each video in a batch, repeated sampling (Table I: 2 on Kinetics)."""
    repeat: Literal["clips", "frames"] = "clips"
    """Repeats are clips of other frames (release), or the same frames augmented anew (VideoMAE)."""
    randaugment: str | None = None
    """RandAugment's policy in timm's notation, as ``rand-m9-mstd0.5-inc1``; none: no RandAugment
    (Tables I, X)."""
    randaugment_interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    """Interpolation of RandAugment's operations that move pixels (release: bicubic)."""
    randaugment_before_crop: bool = False
    """Apply RandAugment before the crop, to whole frames in the loader (release, on Kinetics); or
    after it, on the device."""
    erasing: Fraction = 0.0
    """Share of clips in which a box, the same in all frames, is erased with noise (Table X)."""
    erasing_attempts: PositiveInt = 10
    """Most boxes tried until one fits; the release tries 100 on Kinetics."""
    flip: bool = False
    """Mirror half of the clips. If classes differ in left and right, set ``flip_swaps`` too."""
    flip_swaps: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Pairs of classes that are swapped in a mirrored clip (Something-Something: left and
    right)."""
    mixup: NonNegativeFloat = 0.8
    """Beta parameter of mixup; 0 switches it off (Table X)."""
    cutmix: NonNegativeFloat = 1.0
    """Beta parameter of cutmix, one box for all frames; 0 switches it off (Table X)."""
    smoothing: Fraction = 0.1
    """Label smoothing."""

    @field_validator("randaugment")
    @classmethod
    def _is_a_policy(cls, text: str | None) -> str | None:
        # Parsed here only to be checked: a wrong policy is reported while studies are planned, and
        # not by a worker.
        if text is not None:
            RandAugmentPolicy.parse(text)
        return text
