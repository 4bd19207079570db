"""The metrics that a study's table and figure may name: their sources and their format."""

from __future__ import annotations

from dataclasses import dataclass

from mar.model.flops import Cost


@dataclass(frozen=True)
class Metric:
    """A metric: where its value comes from and how it is printed."""

    title: str
    source: str
    """The name of a metric in MLflow; ``cost.`` and a field of ``mar.model.flops.Cost``; or
    ``views``."""
    digits: int = 2
    """Decimals."""
    higher_is_better: bool | None = None
    """None: neither, so rows are not ranked by it."""
    scale: float = 1.0
    offset: float = 0.0
    """The printed value is scale × source + offset."""
    is_ratio: bool = False
    """Whether the printed value is divided by that of the table's reference row."""


# The names are those of study files, the sources those of MLflow: both are frozen.
METRICS = {
    "top1": Metric("Top-1 (%)", "test/top1", higher_is_better=True),
    "top5": Metric("Top-5 (%)", "test/top5", higher_is_better=True),
    "mean_class_top1": Metric(
        "Mean-class top-1 (%)", "test/mean_class_top1", higher_is_better=True
    ),
    "shuffled_top1": Metric("Top-1, shuffled frames (%)", "test/top1_shuffled_frames"),
    "gflops": Metric("GFLOPs", "cost.gflops", digits=4),
    "params": Metric("Param (M)", "cost.params_m"),
    "loss": Metric("Loss", "train/loss", digits=4, higher_is_better=False),
    "reconstruction_loss": Metric(
        "L_r", "train/reconstruction_loss", digits=4, higher_is_better=False
    ),
    "test_reconstruction_loss": Metric(
        "L_r, test", "test/reconstruction_loss", digits=4, higher_is_better=False
    ),
    "clips_per_s": Metric("Clips/s", "throughput/clips_per_s", digits=1, higher_is_better=True),
    "clips_per_s_ratio": Metric(
        "Clips/s, × reference", "throughput/clips_per_s", higher_is_better=True, is_ratio=True
    ),
    "train_gflops": Metric("Training GFLOPs/clip", "cost.train_gflops", digits=4),
    "train_gflops_ratio": Metric(
        "Training GFLOPs/clip, × reference", "cost.train_gflops", digits=3, is_ratio=True
    ),
    # A trial logs its accuracy alone: error = 100 − top-1.
    "error": Metric("Error (%)", "test/top1", higher_is_better=False, scale=-1.0, offset=100.0),
    "views": Metric("Crops × clips", "views", digits=0),
    "memory_gib": Metric("GPU Mem. (GiB)", "memory/batch_of_1_gib", higher_is_better=False),
    "time_h": Metric("Training time (h)", "time/elapsed_s", higher_is_better=False, scale=1 / 3600),
    "time_s": Metric("Training time (s)", "time/elapsed_s", digits=0, higher_is_better=False),
}


def cost_figure(figures: Cost, source: str) -> float:
    """Return the field of a cost that ``cost.NAME`` names."""
    return float(getattr(figures, source.removeprefix("cost.")))
