"""The encoder's features of a data set, in files that an interrupted run continues; probes of them.

A folder has a file for each thousand videos of a split (of all tokens, for fewer), and
``features.json``, which says what they are of. Each file is written in one piece: what is there is
whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save
from torch import Tensor

from mar import distributed
from mar.atomic_dir import atomic_write
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.token_cache import bytes_per_view
from mar.errors import Failure, UserError
from mar.evaluation.evaluator import Evaluator
from mar.model.mar import MAR
from mar.safe_text import printable

_VIDEOS_PER_FILE = 1024
_BYTES_PER_FILE = 2**30
"""All tokens of all views of a thousand videos would take gigabytes of memory: fewer then."""
_DESCRIPTION = "features.json"
_NEIGHBOURS = 20
"""k of the nearest neighbours."""


@dataclass(frozen=True)
class Features:
    """Features of those videos of a split that could be decoded."""

    videos: Int[Tensor, " n"]
    """Each video's index in the split."""
    labels: Int[Tensor, " n"]
    values: Float[Tensor, "n ..."]
    """``n D``, or by token ``n views K D``."""


@dataclass(frozen=True)
class FeatureOptions:
    """What features are written, and how."""

    per_token: bool = False
    """All tokens of all views, instead of their mean."""
    is_cache: bool = False
    """For a training on them: computed as it would, and kept in half precision."""
    may_be_broken: bool = True
    """Whether videos that cannot be decoded are left out, or are an error."""
    loader_processes: int = 0
    """Processes that decode."""


def write_features(
    network: MAR,
    settings: TrainingConfig,
    videos: Sequence[Video],
    folder: Path,
    description: Mapping[str, Any],
    options: FeatureOptions = FeatureOptions(),
    *,
    progress: Callable[[int, int], None] = lambda done, count: None,
    alive: Callable[[], None] = lambda: None,
) -> int:
    """Write the features of a split's videos; files that are there already are kept.

    Args:
        network: The model, on its device.
        settings: Clips, crops and the mask are those of its test.
        videos: The split, in its order.
        folder: Where to write; made if it does not exist.
        description: What the features are of: model, data and settings.
        options: What is written.
        progress: Called with the number of videos that are done, and of all.
        alive: Called for every batch.

    Returns:
        The number of videos that could not be decoded.

    Raises:
        UserError: the folder has features of something else.
        Failure: a video could not be decoded, and may not be left out, or not one could be; or the
            values are not finite.
    """
    # In ASCII: a file name need not be UTF-8.
    text = json.dumps({**description, "per_token": options.per_token}, indent=1)
    # One worker decides and writes: another could read what is half written.
    if not distributed.broadcast_from_rank0(lambda: _describe(folder, text)):
        raise UserError(
            f"{folder}: it has features of another model, of other data or settings "
            f"({_DESCRIPTION} says which): choose another folder, or remove it"
        )
    num_broken = 0
    per_file = _videos_per_file(settings, options)
    for first in range(0, len(videos), per_file):
        part = list(videos[first : first + per_file])
        file = folder / f"features_{first:07}.safetensors"
        # Of several workers each measures a part, so they agree that the file is to be made.
        if not all(distributed.all_gather(file.is_file())):
            tensors = _measured(network, settings, part, first, options, alive)
            atomic_write(file, save(tensors))
        num_broken += len(part) - len(load_file(file)["videos"])
        progress(first + len(part), len(videos))
    if videos and num_broken == len(videos):
        raise Failure(f"{folder}: not one of {num_broken} videos could be decoded", "data")
    return num_broken


def _videos_per_file(settings: TrainingConfig, options: FeatureOptions) -> int:
    if not options.per_token:
        return _VIDEOS_PER_FILE
    views = settings.evaluation.clips * settings.evaluation.crops
    return min(_VIDEOS_PER_FILE, max(1, _BYTES_PER_FILE // (views * bytes_per_view(settings))))


def _measured(
    network: MAR,
    settings: TrainingConfig,
    part: list[Video],
    first: int,
    options: FeatureOptions,
    alive: Callable[[], None],
) -> dict[str, Tensor]:
    """Return the content of one file: the features of a part of a split, from video ``first`` on.

    Raises:
        Failure: see :func:`write_features`.
    """
    evaluation = settings.evaluation
    evaluator = Evaluator(
        settings,
        part,
        network.device,
        clips=evaluation.clips,
        crops=evaluation.crops,
        loader_processes=options.loader_processes,
        first_video=first,
        alive=alive,
    )
    numbers, labels, values = evaluator.features(network, options.per_token, options.is_cache)
    if len(numbers) < len(part) and not options.may_be_broken:
        broken = sorted({*range(first, first + len(part))} - {*numbers.tolist()})
        raise Failure(
            f"{part[broken[0] - first].path}: it cannot be decoded ({len(broken)} in this part). "
            "Repair or remove it, or set data.broken: skip to leave such videos out",
            "data",
        )
    if not values.isfinite().all():
        reason = "some features are not finite"
        if options.is_cache:
            reason += ", or beyond the range of half precision"
        raise Failure(reason, "non_finite")
    return {"videos": numbers, "labels": labels, "features": values}


def _describe(folder: Path, text: str) -> bool:
    """Write what the features are of; false if the folder has those of something else."""
    said = folder / _DESCRIPTION
    if said.is_file():
        return said.read_text(encoding="utf-8") == text
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(said, text.encode())
    return True


def read_features(folder: Path) -> Features:
    """Read the features of a split.

    Raises:
        UserError: the folder has none.
    """
    files = sorted(folder.glob("features_*.safetensors"))
    if not files:
        raise UserError(f"{folder}: no features in it; mar features makes them")
    parts = [load_file(file) for file in files]
    videos, labels, values = (
        torch.cat([part[name] for part in parts]) for name in ("videos", "labels", "features")
    )
    return Features(videos, labels, values)


def write_parquet(folder: Path, videos: Sequence[Video], classes: Sequence[str]) -> Path:
    """Write the pooled features of a split as one Parquet file beside its folder.

    Its columns are the video's name, the number and the name of its class, and the feature.

    Returns:
        The file.

    Raises:
        Failure: the disk refuses.
    """
    import io

    import pyarrow
    from pyarrow import parquet

    found = read_features(folder)
    labels = found.labels.tolist()
    table = pyarrow.table(
        {
            # Parquet's texts are UTF-8, and a file's name need not be.
            "video": [printable(videos[number].name) for number in found.videos.tolist()],
            "label": labels,
            "class": [classes[label] if label < len(classes) else "" for label in labels],
            "feature": pyarrow.FixedSizeListArray.from_arrays(
                pyarrow.array(found.values.float().flatten().numpy()), found.values.shape[1]
            ),
        }
    )
    stream = io.BytesIO()
    parquet.write_table(table, stream)
    file = folder.with_suffix(".parquet")
    atomic_write(file, stream.getvalue())
    return file


def nearest_neighbours(train: Features, test: Features) -> float:
    """Return the top-1 accuracy, percent, of a vote of the 20 nearest training videos.

    Nearness is the cosine of pooled features; each neighbour votes with exp(cosine / 0.07), as in
    DINO (Caron et al., 2021).
    """
    reference = torch.nn.functional.normalize(train.values.float(), dim=1)
    asked = torch.nn.functional.normalize(test.values.float(), dim=1)
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    hits = 0
    # In pieces: all pairs of a large data set would not fit into memory.
    for values, labels in zip(asked.split(1024), test.labels.split(1024), strict=True):
        cosines, nearest = (values @ reference.T).topk(min(_NEIGHBOURS, len(reference)), dim=1)
        votes = torch.zeros(len(values), num_classes)
        votes.scatter_add_(1, train.labels[nearest], (cosines / 0.07).exp())
        hits += int((votes.argmax(dim=1) == labels).sum())
    return 100 * hits / len(test.labels)


def linear_probe(train: Features, test: Features) -> float:
    """Return the top-1 accuracy, percent, of scikit-learn's logistic regression on the features.

    Features are scaled to mean 0 and deviation 1 over the training videos.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model: Any = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    model.fit(train.values.numpy(), train.labels.numpy())
    return 100 * float(model.score(test.values.numpy(), test.labels.numpy()))
