"""One contestant's step, timed in a process of its own.

``python -m mar.bench.steps CASE``, with the case as JSON.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mar.augmentation.augment import soft_labels
from mar.bench.machine import Machine, synchronise
from mar.bench.peers import Released, videomae
from mar.bench.roofline import Recorder, floor
from mar.config.overrides import build
from mar.config.schema import TrainingConfig
from mar.data.dataset import Batch
from mar.distributed import default_device
from mar.model.flops import cost
from mar.model.layers import set_execution_mode
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask, training_mask
from mar.model.pixels import to_pixels
from mar.training.allocator import keep_freed_memory
from mar.training.checkpoint import Progress
from mar.training.optim import build_optimizer
from mar.training.step import RuntimeConfig, TrainState, train_step

Contestant = Literal["mar", "standard", "released", "videomae", "videomae-fp32"]
CONTESTANTS: dict[Contestant, str] = {
    "mar": "MAR",
    "standard": "standard training: no mask, linear head",
    "released": "our reconstruction of MAR's released step: embed all, explicit softmax(QKᵀ)",
    "videomae": "transformers' VideoMAE, all tokens",
    "videomae-fp32": "transformers' VideoMAE, as it comes (float32)",
}
_CLASSES = 174


@dataclass(frozen=True)
class Case:
    """What to time."""

    contestant: Contestant
    training: bool = True
    size: str = "base"
    frames: int = 16
    pixels: int = 224
    ratio: float = 0.5
    precision: str = "bf16"
    clips: int = 2
    device: str = "cpu"
    steps: int = 3
    warm_up: int = 1
    keeps_memory: bool = False
    """CPU: keep freed memory, as our trials do
    (:func:`mar.training.allocator.keep_freed_memory`)."""
    compiles: Literal["", "default", "reduce-overhead"] = ""
    recomputes: bool = False

    @property
    def settings(self) -> TrainingConfig:
        """The model.

        No augmentation but label smoothing, so that every contestant does the same.
        """
        is_masked = self.contestant in ("mar", "released")
        return build(
            {
                "data": {"num_classes": _CLASSES},
                "clip": {"frames": self.frames, "size": self.pixels},
                "encoder": {"size": self.size},
                "mask": {"ratio": self.ratio if is_masked else 0.0},
                "classifier": {} if is_masked else {"kind": "linear", "norm": "pooled"},
                "reconstruction": _decoder(self.size) if is_masked else {"weight": 0.0},
                "augment": {"mixup": 0.0, "cutmix": 0.0, "flip": False},
                "recipe": {"batch_size": self.clips, "precision": self.precision},
            }
        )


def case_of(size: str, ratio: float, clips: int | None, precision: str, steps: int | None) -> Case:
    """Return our case on this machine's device, with what fits it where nothing is said.

    Raises:
        UserError: a size or ratio that no settings have.
    """
    device = default_device().type
    is_cpu = device == "cpu"
    case = Case(
        "mar",
        size=size,
        ratio=ratio,
        precision=precision,
        clips=clips or (2 if is_cpu else 32),
        device=device,
        steps=steps or (3 if is_cpu else 10),
        warm_up=1 if is_cpu else 3,
    )
    _ = case.settings  # is checked
    return case


def _decoder(size: str) -> dict[str, Any]:
    """Return the reconstruction decoder that the recipes have for that size."""
    return {"width": 512, "depth": 12, "heads": 8} if size == "large" else {}


@dataclass(frozen=True)
class Timed:
    """What came of a case."""

    case: Case
    seconds: list[float]
    """Of each step."""
    first_s: float
    """Of the first step, compiling included."""
    peak_gib: float
    """CUDA: the most that PyTorch held. CPU: the most that the process held, less what it held
    before the model was built."""
    useful_operations: float
    """Of one step: two for each multiply-add of the paper's formula."""
    floor_s: float = 0.0
    """The roofline's least time of a step; 0: not asked for."""
    memory_share: float = 0.0
    """How much of that is limited by memory."""
    bytes: float = 0.0
    """Memory traffic of a step, each operation's inputs read and outputs written once."""


def time_case(case: Case, machine: Machine | None = None) -> Timed:
    """Time a contestant's steps in this process.

    With a machine, also find its roofline (one more step).

    Raises:
        ImportError: the contestant's package is not installed.
    """
    device = torch.device(case.device)
    if case.keeps_memory:
        keep_freed_memory()
    before_gib = _forget_peak()
    torch.manual_seed(0)
    step = (_training if case.training else _inference)(case, device)
    times: list[float] = []
    for _ in range(1 + case.warm_up + case.steps):
        synchronise(device)
        started = time.perf_counter()
        step()
        synchronise(device)
        times.append(time.perf_counter() - started)
    peak = (
        torch.cuda.max_memory_allocated(device) / 2**30
        if device.type == "cuda"
        else _held_gib("VmHWM") - before_gib
    )
    costs = cost(case.settings)
    useful = 2e9 * case.clips * (costs.train_gflops if case.training else costs.gflops)
    timed = Timed(case, times[1 + case.warm_up :], times[0], peak, useful)
    if machine is None:
        return timed
    with Recorder() as recorder:
        step()
    least = floor(recorder.work, machine)
    return replace(
        timed, floor_s=least.seconds, memory_share=least.memory_s / least.seconds, bytes=least.bytes
    )


def _training(case: Case, device: torch.device) -> Callable[[], object]:
    batch = random_batch(case, device)
    if case.contestant in ("mar", "standard"):
        learner = train_state_of(case)
        return lambda: train_step(learner, batch)
    losses = _losses(case, MAR(case.settings), device)
    optimizer = torch.optim.AdamW(
        losses.parameters(), lr=1e-4, weight_decay=0.05, fused="videomae" in case.contestant
    )

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with _autocast(case):
            loss = losses(batch.clips.flatten(0, 1), batch.labels)
        loss.mean().backward()
        optimizer.step()

    return step


def train_state_of(case: Case) -> TrainState:
    """Return our own model of a case, ready for its first step."""
    settings, device = case.settings, torch.device(case.device)
    model = MAR(settings).to(device)
    learner = TrainState(
        settings, RuntimeConfig(device), model, build_optimizer(model, settings.recipe), Progress()
    )
    set_execution_mode(model, case.compiles, case.recomputes)
    return learner


class _Losses(nn.Module):
    """From uint8 clips to losses, for those whose training loop is not ours."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        return self.loss(to_pixels(clips), labels)


def _losses(case: Case, model: MAR, device: torch.device) -> nn.Module:
    settings, generator = case.settings, torch.Generator().manual_seed(0)
    if case.contestant == "released":
        released = Released(model).to(device)

        def loss(pixels: Tensor, labels: Tensor) -> Tensor:
            hidden = training_mask(settings.mask, settings.grid, len(pixels), generator)
            return released(pixels, hidden, soft_labels(labels, _CLASSES, 0.1))

        return _Losses(released, loss)
    theirs, mean, std = (
        videomae(model, settings).to(device),
        model.mean.to(device),
        model.std.to(device),
    )

    def loss_of(pixels: Tensor, labels: Tensor) -> Tensor:
        return theirs(pixel_values=((pixels - mean) / std).transpose(1, 2), labels=labels).loss

    return _Losses(theirs.train(), loss_of)


def _inference(case: Case, device: torch.device) -> Callable[[], object]:
    settings, clips = case.settings, random_batch(case, device).clips.flatten(0, 1)
    model = MAR(settings).to(device).eval()
    set_execution_mode(model, case.compiles)
    hidden = evaluation_mask(settings).expand(case.clips, -1, -1, -1)
    classify: Callable[[Tensor], Tensor] = partial(model.classify, hidden=hidden)
    if case.contestant == "released":
        classify = partial(Released(model).classify, hidden=hidden)
    elif "videomae" in case.contestant:
        peer = videomae(model, settings).to(device).eval()

        def classify_by_peer(pixels: Tensor) -> Tensor:
            normalised = (pixels - model.mean) / model.std
            return peer(pixel_values=normalised.transpose(1, 2)).logits

        classify = classify_by_peer

    @torch.no_grad()
    def step() -> None:
        with _autocast(case):
            classify(to_pixels(clips)).float().softmax(dim=1)

    return step


def _forget_peak() -> float:
    """Have Linux count this process's peak memory anew; returns what it holds now, GiB."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _held_gib("VmRSS")


def _held_gib(field: str) -> float:
    status = Path("/proc/self/status")
    found = (
        re.search(rf"{field}:\s+(\d+) kB", status.read_text(encoding="utf-8"))
        if status.exists()
        else None
    )
    return int(found[1]) / 2**20 if found else 0.0


def _autocast(case: Case) -> Any:
    is_on = case.precision == "bf16" and case.contestant != "videomae-fp32"
    return (
        torch.autocast(torch.device(case.device).type, torch.bfloat16) if is_on else nullcontext()
    )


def random_batch(case: Case, device: torch.device) -> Batch:
    """Return clips of random pixels, on the device."""
    shape = (case.clips, 1, case.frames, case.pixels, case.pixels, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    labels = (torch.arange(case.clips) % _CLASSES).to(device)
    return Batch(
        clips,
        labels,
        torch.arange(case.clips),
        torch.ones(case.clips, dtype=torch.bool, device=device),
    )


def main() -> None:
    """Time the case that the command line gives; print what came of it, in JSON."""
    request = json.loads(sys.argv[1])
    machine = Machine(**request["machine"]) if request["machine"] else None
    try:
        print(json.dumps(asdict(time_case(Case(**request["case"]), machine))))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
    except torch.OutOfMemoryError:
        print(json.dumps({"missing": "not enough memory on the device"}))


if __name__ == "__main__":
    main()
