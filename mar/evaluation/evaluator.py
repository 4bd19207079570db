"""Multi-view evaluation: probabilities averaged over clips and crops; accuracies in percent."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Float16, Int, UInt8
from torch import Tensor

from mar import distributed
from mar.config.schema import TrainingConfig
from mar.data.annotations import Video
from mar.data.dataset import EvaluationClips, bytes_per_clip
from mar.data.frame_cache import check
from mar.data.loaders import loader
from mar.data.token_cache import EvaluationTokens, TokenCache, bytes_per_view
from mar.errors import Failure
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask, evaluation_masks
from mar.model.pixels import to_pixels
from mar.safe_text import cell

# Views and not videos, so that the memory of a batch does not grow with the number of views.
_CLIPS_PER_BATCH = 64


@dataclass(frozen=True)
class Predictions:
    """A model's predictions for the videos that could be decoded."""

    videos: Int[Tensor, " n"]
    """Each video's index in the split."""
    labels: Int[Tensor, " n"]
    probabilities: Float[Tensor, "n classes"]
    broken: tuple[str, ...]
    """Videos that could not be decoded, with the reason; accuracies do not count them."""

    def accuracy(self, k: int) -> float:
        """Return top-k accuracy in percent.

        A video counts if its label is among the k most probable classes.
        """
        # A data set can have fewer than k classes; topk would fail.
        best = self.probabilities.topk(min(k, self.probabilities.shape[1]), dim=1).indices
        return 100 * (best == self.labels[:, None]).any(dim=1).double().mean().item()

    def class_accuracies(self) -> Float[Tensor, " classes"]:
        """Return the top-1 accuracy of each class in percent; nan for a class without a video."""
        counts = self.confusion().double()
        return 100 * counts.diagonal() / counts.sum(dim=1)

    def confusion(self) -> Int[Tensor, "classes classes"]:
        """Return the number of videos of each class (rows) by predicted class (columns)."""
        num_classes = self.probabilities.shape[1]
        taken_for = self.probabilities.argmax(dim=1)
        # bincount has one dimension, so a pair of classes is counted under one number. minlength
        # gives a cell also to pairs that never occur.
        return torch.bincount(self.labels * num_classes + taken_for, minlength=num_classes**2).view(
            num_classes, -1
        )

    def metrics(self, stage: str) -> dict[str, float]:
        """Return accuracies and counts, named ``stage/…``."""
        counts = {
            f"{stage}/num_videos": float(len(self.labels)),
            f"{stage}/num_broken": float(len(self.broken)),
        }
        return {
            f"{stage}/top1": self.accuracy(1),
            f"{stage}/top5": self.accuracy(5),
            # Over the classes that have a video: each counts the same, however few it has.
            f"{stage}/mean_class_top1": self.class_accuracies().nanmean().item(),
            **counts,
        }


@dataclass(frozen=True)
class Reconstruction:
    """How well a pre-trained model reconstructs hidden patches."""

    losses: Float[Tensor, " n"]
    """L_r (Eq. 3) of each video that could be decoded, averaged over its views."""
    broken: tuple[str, ...]

    def metrics(self, stage: str) -> dict[str, float]:
        """Return the mean loss and counts, named ``stage/…``."""
        counts = {
            f"{stage}/num_videos": float(len(self.losses)),
            f"{stage}/num_broken": float(len(self.broken)),
        }
        return {f"{stage}/reconstruction_loss": self.loss, **counts}

    @property
    def loss(self) -> float:
        """The mean of L_r over videos."""
        return self.losses.double().mean().item()


class Evaluator:
    """Evaluates a model on one split; may be called several times.

    With ``is_kept`` its loader processes live as long as it does. ``alive`` is called for every
    batch. Where ``videos`` are a part of a split, ``first_video`` is the number of its first one.
    With ``tokens`` the classifier alone runs, on all views that are cached.

    Raises:
        UserError: the frame cache lacks a video or is stale, or the decoder that the settings name
            does not work.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        videos: list[Video],
        device: torch.device,
        *,
        clips: int = 1,
        crops: int = 1,
        shuffled: bool = False,
        loader_processes: int = 0,
        is_kept: bool = False,
        alive: Callable[[], None] = lambda: None,
        first_video: int = 0,
        tokens: TokenCache | None = None,
    ) -> None:
        # Checked before any video is opened: with a stale cache or a decoder that does not work,
        # every video would be reported as broken.
        check(settings.data, videos)
        # Every world-th video: the workers have equally many, within one. The split's order is
        # restored when their parts are gathered.
        worker_rank = distributed.worker_rank()
        mine = list(range(worker_rank.rank, len(videos), worker_rank.world))
        size = max(1, _CLIPS_PER_BATCH // (clips * crops))
        batches = [mine[first : first + size] for first in range(0, len(mine), size)]
        self.settings = settings
        self.device = device
        self.alive = alive
        self.first_video = first_video
        self.has_tokens = tokens is not None
        if tokens is None:
            dataset = EvaluationClips(settings, videos, clips, crops, shuffled)
            bytes_per_batch = size * clips * crops * bytes_per_clip(settings)
        else:
            dataset = EvaluationTokens(settings, videos, tokens)
            bytes_per_batch = size * clips * crops * bytes_per_view(settings)
        self.loader = loader(dataset, batches, loader_processes, device, bytes_per_batch, is_kept)

    @torch.no_grad()
    def __call__(self, model: MAR) -> Predictions:
        """Return the predictions for the whole split, on every worker.

        Raises:
            Failure: not one video could be decoded.
        """
        measure = self._token_probabilities if self.has_tokens else self._probabilities
        (videos, labels, probabilities), failed = self._gathered(model, measure)
        order = videos.argsort()
        return Predictions(videos[order], labels[order], probabilities[order], failed)

    @torch.no_grad()
    def reconstruction(self, model: MAR) -> Reconstruction:
        """Return the reconstruction losses under the mask of evaluation, on every worker.

        Raises:
            Failure: not one video could be decoded.
        """
        (videos, _, losses), failed = self._gathered(model, self._reconstruction)
        return Reconstruction(losses[videos.argsort()], failed)

    @torch.no_grad()
    def features(
        self, model: MAR, per_token: bool = False, as_trained: bool = False
    ) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"], Float[Tensor, "n ..."]]:
        """Return the numbers and labels of the videos, and the encoder's features.

        Features are the mean of the encoder's tokens over all views, ``n D``; with ``per_token``
        the tokens themselves, ``n views K D``. Broken videos are left out; if all are, the tensors
        are empty. They are computed in float32; ``as_trained``, in the recipe's precision, and
        returned in half precision.
        """

        def measure(
            model: MAR, clips: UInt8[Tensor, "B views T H W C"], videos: Sequence[int]
        ) -> Float[Tensor, "B ..."]:
            views = clips.shape[1]
            pixels = to_pixels(clips.flatten(0, 1).to(self.device, non_blocking=True))
            is_bf16 = as_trained and self.settings.recipe.precision == "bf16"
            with torch.autocast(self.device.type, torch.bfloat16, enabled=is_bf16):
                tokens = model.features(pixels, evaluation_masks(self.settings, views, videos))
            tokens = tokens.half() if as_trained else tokens.float()
            tokens = tokens.unflatten(0, (-1, views)).cpu()
            return tokens if per_token else tokens.mean(dim=(1, 2))

        # A part of a data set may be broken as a whole, and the rest is not.
        try:
            (videos, labels, values), _ = self._gathered(model, measure)
        except Failure as failure:
            if failure.kind != "data":
                raise
            return torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0)
        order = videos.argsort()
        return videos[order], labels[order], values[order]

    def _gathered(
        self, model: MAR, measure: Callable[[MAR, Tensor, Sequence[int]], Tensor]
    ) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[str, ...]]:
        """Return videos, labels and measures of all workers, and the reasons of broken videos."""
        # Without dropout and stochastic depth.
        model.eval()
        seen: list[tuple[Tensor, Tensor, Tensor]] = []
        broken: list[str] = []
        for batch in self.loader:
            self.alive()
            broken.extend(str(video) for video in batch.broken)
            # A broken video has black clips in its position. They must not be measured.
            if batch.good.any():
                chosen = batch.good
                numbers = batch.videos[chosen] + self.first_video
                seen.append(
                    (
                        numbers,
                        batch.labels[chosen],
                        measure(model, batch.clips[chosen], numbers.tolist()),
                    )
                )
        model.train()
        # Every worker gets all parts, also one whose videos are all broken: a worker that skipped
        # this call would block the others.
        parts = distributed.all_gather((seen, broken))
        rows = [row for part, _ in parts for row in part]
        failed = tuple(sorted(reason for _, part in parts for reason in part))
        if not rows:
            raise Failure(
                f"not one video of the evaluation split could be decoded; the first: {failed[0]}",
                "data",
            )
        videos, labels, measured = (torch.cat(column) for column in zip(*rows, strict=True))
        return (videos, labels, measured), failed

    def _reconstruction(
        self, model: MAR, clips: UInt8[Tensor, "B views T H W C"], videos: Sequence[int]
    ) -> Float[Tensor, " B"]:
        num_videos, views = clips.shape[:2]
        pixels = to_pixels(clips.flatten(0, 1).to(self.device, non_blocking=True))
        hidden = evaluation_masks(self.settings, views, videos)
        # A pre-training has no labels, but the model's forward() takes some.
        labels = torch.zeros(len(pixels), self.settings.data.num_classes, device=self.device)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.recipe.precision == "bf16"
        ):
            losses = model(pixels, hidden, labels).reconstruction
        return losses.view(num_videos, views).mean(dim=1).cpu()

    def _probabilities(
        self, model: MAR, clips: UInt8[Tensor, "B views T H W C"], videos: Sequence[int]
    ) -> Float[Tensor, "B classes"]:
        num_videos, views = clips.shape[:2]
        pixels = to_pixels(clips.flatten(0, 1).to(self.device, non_blocking=True))
        # Probabilities and not scores are averaged over the views.
        probabilities = class_probabilities(model, pixels, self.settings, videos)
        return probabilities.view(num_videos, views, -1).mean(dim=1).cpu()

    def _token_probabilities(
        self, model: MAR, clips: Float16[Tensor, "B views K D"], videos: Sequence[int]
    ) -> Float[Tensor, "B classes"]:
        num_videos, views = clips.shape[:2]
        tokens = clips.flatten(0, 1).to(self.device, non_blocking=True).float()
        hidden = evaluation_masks(self.settings, views, videos)
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.settings.recipe.precision == "bf16"
        ):
            scores = model.classify_tokens(tokens, hidden)
        probabilities = scores.float().softmax(dim=1)
        return probabilities.view(num_videos, views, -1).mean(dim=1).cpu()


def class_probabilities(
    model: MAR,
    pixels: Float[Tensor, "B C T H W"],
    settings: TrainingConfig,
    videos: Sequence[int] | None = None,
) -> Float[Tensor, "B classes"]:
    """Return the probability of each class under the mask of testing, in float32.

    ``pixels`` have the test views of each video, one video after another; ``videos`` are the
    numbers of these in their split. Without them they are of one video that is in no split.
    """
    if videos is None:
        hidden = evaluation_mask(settings, views=len(pixels))
    else:
        hidden = evaluation_masks(settings, len(pixels) // len(videos), videos)
    with torch.autocast(
        pixels.device.type, torch.bfloat16, enabled=settings.recipe.precision == "bf16"
    ):
        scores = model.classify(pixels, hidden)
    return scores.float().softmax(dim=1)


def write_class_accuracies(predictions: Predictions, names: Sequence[str], file: Path) -> None:
    """Write a row for each class: its number, name, number of videos and top-1 accuracy."""
    counts = predictions.confusion().sum(dim=1).tolist()
    accuracies = predictions.class_accuracies().tolist()
    with file.open("w", newline="", encoding="utf-8") as output:
        writer = csv.writer(output)
        writer.writerow(["class", "name", "videos", "top1"])
        for label, (count, accuracy) in enumerate(zip(counts, accuracies, strict=True)):
            name = names[label] if label < len(names) else ""
            # A class without a video has no accuracy.
            shown = f"{accuracy:.4f}" if count else ""
            writer.writerow([label, cell(name), count, shown])


def write_predictions(predictions: Predictions, videos: list[Video], file: Path) -> None:
    """Write a row for each video: its label, the label's probability, and the top five classes."""
    best = predictions.probabilities.topk(min(5, predictions.probabilities.shape[1]), dim=1)
    header = ["video", "label", "probability_of_label"]
    for rank in range(1, best.indices.shape[1] + 1):
        header += [f"class_{rank}", f"probability_{rank}"]
    # A file name need not be UTF-8. Python keeps such bytes as surrogates, and surrogateescape
    # writes the same bytes back.
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as output:
        writer = csv.writer(output)
        writer.writerow(header)
        for row, (index, label) in enumerate(
            zip(predictions.videos.tolist(), predictions.labels.tolist(), strict=True)
        ):
            own = f"{predictions.probabilities[row, label].item():.6f}"
            line: list[object] = [cell(videos[index].name), label, own]
            for name, probability in zip(
                best.indices[row].tolist(), best.values[row].tolist(), strict=True
            ):
                line += [name, f"{probability:.6f}"]
            writer.writerow(line)
