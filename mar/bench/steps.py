"""The step of one contestant, timed in a process of its own.

``python -m mar.bench.steps CASE``, with the case and the machine in JSON, prints the times in JSON.
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
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mar.augmentation.augment import soft_labels
from mar.bench.machine import Machine
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
"""The number of classes of Something-Something v2."""
_SMOOTHING = 0.1
"""Label smoothing, the default of ``augment.smoothing``."""


@dataclass(frozen=True)
class Case:
    """What to time: a contestant, its settings, and how it runs."""

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
    """Steps between the first one, which is timed apart, and the timed ones."""
    keeps_memory: bool = False
    """CPU: keep freed memory, as trials do (:func:`mar.training.allocator.keep_freed_memory`)."""
    compiles: Literal["", "default", "reduce-overhead"] = ""
    """The mode of ``torch.compile`` for the blocks; empty: not compiled."""
    recomputes: bool = False
    """Recompute activations in the backward pass."""

    @property
    def settings(self) -> TrainingConfig:
        """The settings of the model, without augmentation but label smoothing.

        So every contestant does the same work on its input.
        """
        # Standard training and VideoMAE see all tokens and have a linear classifier.
        ratio = 0.0
        classifier: dict[str, Any] = {"kind": "linear", "norm": "pooled"}
        reconstruction: dict[str, Any] = {"weight": 0.0}
        if self.contestant in ("mar", "released"):
            ratio = self.ratio
            classifier = {}
            reconstruction = _decoder(self.size)
        return build(
            {
                "data": {"num_classes": _CLASSES},
                "clip": {"frames": self.frames, "size": self.pixels},
                "encoder": {"size": self.size},
                "mask": {"ratio": ratio},
                "classifier": classifier,
                "reconstruction": reconstruction,
                "augment": {"mixup": 0.0, "cutmix": 0.0, "flip": False},
                "recipe": {"batch_size": self.clips, "precision": self.precision},
            }
        )


def case_of(size: str, ratio: float, clips: int | None, precision: str, steps: int | None) -> Case:
    """Return our case for this machine's device.

    Clips and steps that are not given have a default for the device.

    Raises:
        UserError: the settings do not allow the size or the ratio.
    """
    device = default_device().type
    # A step of ViT-B takes seconds on a CPU and a fraction of one on a GPU (benchmarks/).
    if device == "cpu":
        default_clips = 2
        default_steps = 3
        warm_up = 1
    else:
        default_clips = 32
        default_steps = 10
        warm_up = 3
    case = Case(
        "mar",
        size=size,
        ratio=ratio,
        precision=precision,
        clips=clips or default_clips,
        device=device,
        steps=steps or default_steps,
        warm_up=warm_up,
    )
    # Building the settings checks them.
    _ = case.settings
    return case


def _decoder(size: str) -> dict[str, Any]:
    """Return the reconstruction decoder that the recipes have for an encoder size."""
    if size == "large":
        return {"width": 512, "depth": 12, "heads": 8}
    return {}


@dataclass(frozen=True)
class Timed:
    """The measurements of a case."""

    case: Case
    seconds: list[float]
    """The time of each timed step."""
    first_s: float
    """The time of the first step, compiling included."""
    peak_gib: float
    """CUDA: the most memory that PyTorch held. CPU: by how much the process grew at most.

    The growth is counted from before the model was built.
    """
    useful_operations: float
    """Of one step: two for each multiply-add of the paper's formula."""
    floor_s: float = 0.0
    """The least time of a step by the roofline; 0: not measured."""
    memory_share: float = 0.0
    """The share of ``floor_s`` that is limited by memory."""
    bytes: float = 0.0
    """Memory traffic of a step: each operation's inputs read and outputs written once."""


def time_case(case: Case, machine: Machine | None = None) -> Timed:
    """Time the steps of a contestant in this process.

    With a machine, one more step finds the roofline.

    Raises:
        ImportError: the contestant's package is not installed.
    """
    device = torch.device(case.device)
    # Before the first allocation of a tensor, as in a trial.
    if case.keeps_memory:
        keep_freed_memory()
    before_gib = _reset_peak_memory()
    # Contestants of the same settings start from the same clips and weights.
    torch.manual_seed(0)
    if case.training:
        step = _training(case, device)
    else:
        step = _inference(case, device)
    (first_s,) = _step_seconds(step, 1, device)
    _step_seconds(step, case.warm_up, device)
    seconds = _step_seconds(step, case.steps, device)
    if device.type == "cuda":
        peak_gib = torch.cuda.max_memory_allocated(device) / 2**30
    else:
        peak_gib = _process_memory_gib("VmHWM") - before_gib
    costs = cost(case.settings)
    gflops = costs.train_gflops if case.training else costs.gflops
    # The paper counts a multiply-add as one operation, data sheets and this benchmark as two.
    useful_operations = 2e9 * case.clips * gflops
    timed = Timed(case, seconds, first_s, peak_gib, useful_operations)
    if machine is None:
        return timed
    # The peak was read before this step: recording is not part of what is measured.
    with Recorder() as recorder:
        step()
    least = floor(recorder.work, machine)
    memory_share = least.memory_s / least.seconds
    return replace(timed, floor_s=least.seconds, memory_share=memory_share, bytes=least.bytes)


def _step_seconds(step: Callable[[], object], number: int, device: torch.device) -> list[float]:
    """Take steps as a training does, one after another; return the time of each.

    A GPU works asynchronously: while it runs a step, the processor prepares the next one. So the
    GPU's own clock is read between steps, and nothing waits for it before the last one has ended.
    """
    if device.type != "cuda":
        times: list[float] = []
        for _ in range(number):
            started = time.perf_counter()
            step()
            times.append(time.perf_counter() - started)
        return times
    torch.cuda.synchronize(device)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(number + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    # elapsed_time() is in milliseconds.
    return [before.elapsed_time(after) / 1e3 for before, after in pairwise(marks)]


def _training(case: Case, device: torch.device) -> Callable[[], object]:
    """Return the training step of a contestant: ours is the trainer's own step."""
    batch = random_batch(case, device)
    if case.contestant in ("mar", "standard"):
        state = train_state_of(case)
        return lambda: train_step(state, batch)
    losses = _losses(case, MAR(case.settings), device)
    # The values of the rate and of the decay do not change the time of a step.
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
    settings = case.settings
    device = torch.device(case.device)
    model = MAR(settings).to(device)
    optimizer = build_optimizer(model, settings.recipe)
    state = TrainState(settings, RuntimeConfig(device), model, optimizer, Progress())
    # After the state, which sets the mode of a trial: a case has modes that trials do not have.
    set_execution_mode(model, case.compiles, case.recomputes)
    return state


class _Losses(nn.Module):
    """From uint8 clips to losses, for contestants whose training loop is not ours."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        # The model is an attribute so that ``parameters`` finds its weights.
        self.model = model
        self.loss = loss

    def forward(self, clips: Tensor, labels: Tensor) -> Tensor:
        return self.loss(to_pixels(clips), labels)


def _losses(case: Case, model: MAR, device: torch.device) -> nn.Module:
    """Return the module that computes a peer's losses with the weights of ``model``."""
    settings = case.settings
    if case.contestant == "released":
        generator = torch.Generator().manual_seed(0)
        released = Released(model).to(device)

        def released_loss(pixels: Tensor, labels: Tensor) -> Tensor:
            hidden = training_mask(settings.mask, settings.grid, len(pixels), generator)
            return released(pixels, hidden, soft_labels(labels, _CLASSES, _SMOOTHING))

        return _Losses(released, released_loss)
    peer = videomae(model, settings).to(device)
    mean = model.mean.view(3, 1, 1, 1).to(device)
    std = model.std.view(3, 1, 1, 1).to(device)

    def videomae_loss(pixels: Tensor, labels: Tensor) -> Tensor:
        # transformers expects (B, T, C, H, W).
        normalised = (pixels - mean) / std
        return peer(pixel_values=normalised.transpose(1, 2), labels=labels).loss

    return _Losses(peer.train(), videomae_loss)


def _inference(case: Case, device: torch.device) -> Callable[[], object]:
    """Return the inference step of a contestant: from uint8 clips to class probabilities."""
    settings = case.settings
    clips = random_batch(case, device).clips.flatten(0, 1)
    model = MAR(settings).to(device).eval()
    # Nothing is recomputed: there is no backward pass.
    set_execution_mode(model, case.compiles)
    hidden = evaluation_mask(settings).expand(case.clips, -1, -1, -1)
    classify: Callable[[Tensor], Tensor] = partial(model.classify, hidden=hidden)
    if case.contestant == "released":
        classify = partial(Released(model).classify, hidden=hidden)
    elif "videomae" in case.contestant:
        peer = videomae(model, settings).to(device).eval()
        mean = model.mean.view(3, 1, 1, 1)
        std = model.std.view(3, 1, 1, 1)

        def classify_by_peer(pixels: Tensor) -> Tensor:
            normalised = (pixels - mean) / std
            return peer(pixel_values=normalised.transpose(1, 2)).logits

        classify = classify_by_peer

    @torch.no_grad()
    def step() -> None:
        with _autocast(case):
            classify(to_pixels(clips)).float().softmax(dim=1)

    return step


def _reset_peak_memory() -> float:
    """Reset this process's peak memory (Linux); returns the memory that it holds now, GiB."""
    # Writing 5 to this file sets VmHWM, the peak, to VmRSS, the current value.
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return _process_memory_gib("VmRSS")


def _process_memory_gib(field: str) -> float:
    """Return a memory figure of this process, GiB; 0 where the system has no such figure."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0.0
    found = re.search(rf"{field}:\s+(\d+) kB", status.read_text(encoding="utf-8"))
    if found is None:
        return 0.0
    return int(found[1]) / 2**20


def _autocast(case: Case) -> Any:
    """Return the context in which a contestant's forward pass runs."""
    if case.precision == "bf16" and case.contestant != "videomae-fp32":
        return torch.autocast(torch.device(case.device).type, torch.bfloat16)
    return nullcontext()


def random_batch(case: Case, device: torch.device) -> Batch:
    """Return clips of random pixels, on the device."""
    # One view of each video; the last dimension has the three colours, as decoders give them.
    shape = (case.clips, 1, case.frames, case.pixels, case.pixels, 3)
    clips = torch.randint(0, 256, shape, dtype=torch.uint8).to(device)
    labels = (torch.arange(case.clips) % _CLASSES).to(device)
    videos = torch.arange(case.clips)
    good = torch.ones(case.clips, dtype=torch.bool, device=device)
    return Batch(clips, labels, videos, good)


def main() -> None:
    """Time the case that the command line gives; print its measurements in JSON."""
    request = json.loads(sys.argv[1])
    machine = None
    if request["machine"]:
        machine = Machine(**request["machine"])
    # The caller reads standard output: a case that cannot run is an answer, not an error.
    try:
        print(json.dumps(asdict(time_case(Case(**request["case"]), machine))))
    except ImportError as error:
        print(json.dumps({"missing": str(error)}))
    except torch.OutOfMemoryError:
        print(json.dumps({"missing": "not enough memory on the device"}))


if __name__ == "__main__":
    main()
