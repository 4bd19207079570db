"""The step: as fast as it may be, it is the same step."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mar.bench import run
from mar.bench.contest import step_cases
from mar.bench.machine import this_machine
from mar.bench.peers import Released, videomae
from mar.bench.roofline import Recorder
from mar.bench.steps import Case, time_case
from mar.config.schema import TrainingConfig
from mar.data.dataset import Batch
from mar.model import mar as model_module
from mar.model.encoder import patchify, take
from mar.model.flops import cost
from mar.model.layers import attention, explicit_attention, set_execution_mode, transformer_blocks
from mar.model.mar import MAR
from mar.model.masking import evaluation_mask, training_mask
from mar.training.checkpoint import Progress
from mar.training.optim import build_optimizer
from mar.training.step import RuntimeConfig, TrainState, train_step
from orchestration.cli import bench

CPU = torch.device("cpu")
AUGMENTED = {
    "augment.flip": True,
    "augment.mixup": 0.8,
    "augment.cutmix": 1.0,
    "augment.randaugment": "rand-m7-n4-mstd0.5-inc1",
    "recipe.batch_size": 4,
    "recipe.clip_grad": 1.0,
}


def batch_of(settings: TrainingConfig, device: str = "cpu") -> Batch:
    torch.manual_seed(0)
    size = settings.recipe.batch_size
    shape = (size, 1, settings.clip.frames, settings.clip.size, settings.clip.size, 3)
    columns = (
        torch.arange(size) % settings.data.num_classes,
        torch.arange(size),
        torch.ones(size, dtype=torch.bool),
    )
    clips = torch.randint(0, 256, shape, dtype=torch.uint8)
    return Batch(*(column.to(device) for column in (clips, *columns)))


def stepped(
    settings: TrainingConfig, runtime: RuntimeConfig, steps: int = 3
) -> tuple[list[Any], dict[str, Any]]:
    torch.manual_seed(0)
    model = MAR(settings)
    state = TrainState(
        settings, runtime, model, build_optimizer(model, settings.recipe), Progress()
    )
    sums: list[Any] = []
    for step in range(steps):
        state.progress.step = step
        sums.append(train_step(state, batch_of(settings)))
    return sums, model.state_dict()


class _NoWaiting(TorchDispatchMode):
    """Refuses copies between devices that the host waits for; keeps the names of all operations."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and not kwargs.get("non_blocking"):
            target = kwargs.get("device")
            if target is not None and torch.device(target).type != args[0].device.type:
                raise AssertionError(f"a copy that waits: {tuple(args[0].shape)} to {target}")
        self.seen.append(str(func))
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "mask",
    [
        {},
        {"mask.strategy": "motion"},
        {"mask.strategy": "redundancy"},
        {"mask.strategy": "static"},
        {"mask.choice": "motion", "mask.content": 0.5},
    ],
)
def test_a_step_never_waits_for_its_device(
    tiny: Callable[..., TrainingConfig], monkeypatch: pytest.MonkeyPatch, mask: dict[str, object]
) -> None:
    """All but the backward pass, on a device that does not exist: reading a number there fails.

    ``benchmarks/device.py`` has a device that is there say so of the whole step.
    """
    settings = tiny({**AUGMENTED, **mask})
    number = settings.mask.num_hidden(settings.grid)
    # It looks at the mask, while it is on the CPU.
    monkeypatch.setattr(model_module, "num_hidden_of", lambda drawn: number)
    monkeypatch.setattr(
        torch.nn.init, "trunc_normal_", lambda tensor, **_: tensor
    )  # looks at numbers, at the start
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = MAR(settings)
        state = TrainState(
            settings,
            RuntimeConfig(torch.device("cuda")),
            model,
            build_optimizer(model, settings.recipe),
            Progress(),
        )
        batch = batch_of(settings, "cuda")

        def backward(loss: torch.Tensor) -> None:  # autograd asks CUDA itself for its device
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)

        monkeypatch.setattr(torch.Tensor, "backward", backward)
        with _NoWaiting() as mode:
            sums = train_step(state, batch)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            sums[0].item()
    assert sums.device.type == "cuda"
    assert any("_fused_adamw" in name for name in mode.seen)


def test_recomputing_activations_changes_no_bit_of_a_training(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({**AUGMENTED, "encoder.depth": 3})
    (sums, weights), (others, same) = (
        stepped(settings, RuntimeConfig(CPU, activation_checkpointing=each))
        for each in (False, True)
    )
    assert all(torch.equal(*pair) for pair in zip(sums, others, strict=True))
    assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_recomputing_activations_keeps_fewer_of_them(tiny: Callable[..., TrainingConfig]) -> None:
    settings = tiny({"encoder.depth": 4, "encoder.width": 64})
    model = MAR(settings)
    hidden = training_mask(settings.mask, settings.grid, 4, torch.Generator().manual_seed(0))
    labels = torch.full((4, 2), 0.5)

    def kept_bytes() -> int:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda each: sizes.append(each.nbytes) or each, lambda each: each
        ):
            model(torch.rand(4, 3, 8, 16, 16), hidden, labels)
        return sum(sizes)

    everything = kept_bytes()
    set_execution_mode(model, activation_checkpointing=True)
    assert kept_bytes() < everything / 3


COMPILED = """
import torch
from mar.bench.steps import Case, train_state_of, random_batch
from mar.training.step import train_step
from torch._dynamo.utils import counters
sums = []
for mode in ("", "default"):
    torch.manual_seed(0)
    case = Case("mar", size="tiny", frames=4, pixels=32, precision="fp32", clips=4, compiles=mode)
    state = train_state_of(case)
    batch = random_batch(case, torch.device("cpu"))
    sums.append(torch.stack([train_step(state, batch) for _ in range(2)]))
torch.testing.assert_close(*sums, rtol=1e-4, atol=1e-5)
assert not counters["graph_break"] and not counters["recompile_limit"], counters
assert counters["stats"]["unique_graphs"] == 5, counters
"""


def test_compiled_blocks_give_the_same_losses() -> None:
    """Five graphs for eighteen blocks: the encoder's with and without stochastic depth, the
    decoder's and its last, the classifier's."""
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILED_BY_RATIO = """
import torch
from mar.bench.steps import Case, random_batch, train_state_of
from mar.config.overrides import build, merge
from mar.model.mar import MAR
from mar.training.step import RuntimeConfig, TrainState, train_step
from mar.training.optim import build_optimizer
from mar.training.checkpoint import Progress
compile_ = torch.compile
torch.compile = lambda part, mode, dynamic: compile_(part, backend="eager", dynamic=dynamic)
case = Case("mar", size="tiny", frames=4, pixels=64, precision="fp32", clips=4)
ratios = [0.5, 0.25, 0.75, 0.625]
settings = build(merge(case.settings.model_dump(mode="json"), {"mask.ratio": ratios}))
model = MAR(settings)
runtime = RuntimeConfig(torch.device("cpu"), compile=True)
state = TrainState(settings, runtime, model, build_optimizer(model, settings.recipe), Progress())
with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
    for step in range(24):
        state.progress.step = step
        train_step(state, random_batch(case, torch.device("cpu")))
"""


def test_several_ratios_are_each_compiled_and_none_runs_uncompiled() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED_BY_RATIO], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


COMPILED_IN_TURN = """
import torch
from mar.model.layers import set_execution_mode, transformer_blocks
compile_ = torch.compile
torch.compile = lambda part, mode, dynamic: compile_(part, backend="eager", dynamic=dynamic)
with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
    for width in range(8, 8 * 12, 8):
        model = transformer_blocks(width, 1, 2)
        set_execution_mode(model, "default")
        model(torch.rand(1, 4, width))
"""


def test_a_process_that_trains_one_model_after_another_compiles_each() -> None:
    done = subprocess.run([sys.executable, "-c", COMPILED_IN_TURN], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_softmax_of_the_scaled_products_forward_and_backward(
    dtype: torch.dtype,
) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(2, 3, 20, 8) for _ in range(3)]
    gradient = torch.randn(2, 3, 20, 8)

    def results(function: Callable[..., Any], kind: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.to(kind, copy=True).requires_grad_() for part in parts]
        out = function(*leaves)
        out.backward(gradient.to(kind))
        return [
            out.detach().double(),
            *(leaf.grad.double() for leaf in leaves if leaf.grad is not None),
        ]

    with sdpa_kernel(SDPBackend.MATH):
        exact = results(F.scaled_dot_product_attention, torch.float64)
    fused = results(F.scaled_dot_product_attention, dtype)
    allowed = [
        4 * (one - other).abs().max() + 1e-6 for one, other in zip(fused, exact, strict=True)
    ]
    for ours, other, limit in zip(results(attention, dtype), exact, allowed, strict=True):
        assert (ours - other).abs().max() <= limit


def test_the_fused_kernel_is_the_one_that_runs_in_float32(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny()
    model, pixels = MAR(settings).eval(), torch.rand(1, 3, 8, 16, 16)
    with Recorder() as recorder, torch.no_grad():
        model.classify(pixels, evaluation_mask(settings))
    names = [each.name for each in recorder.work]
    assert any("flash_attention" in name for name in names)
    assert not any("softmax" in name for name in names)


def test_the_last_tokens_alone_come_out_as_they_do_among_all() -> None:
    torch.manual_seed(0)
    blocks, tokens = transformer_blocks(16, 3, 2), torch.randn(2, 10, 16)
    torch.testing.assert_close(blocks(tokens, num_out=4), blocks(tokens)[:, -4:])


def test_tubelets_that_are_taken_are_those_of_all_tubelets() -> None:
    torch.manual_seed(0)
    video, batch_indices = (
        torch.rand(2, 3, 4, 8, 12),
        torch.stack([torch.randperm(12)[:7] for _ in range(2)]),
    )
    index = batch_indices[..., None].expand(-1, -1, 96)
    assert torch.equal(
        take(patchify(video, (2, 4, 4)), batch_indices), patchify(video, (2, 4, 4)).gather(1, index)
    )


def test_the_peer_that_computes_as_the_released_code_has_the_same_loss_and_gradient(
    tiny: Callable[..., TrainingConfig],
) -> None:
    settings = tiny({"encoder.drop_path": 0.0, "classifier.dropout": 0.0, "encoder.depth": 2})
    torch.manual_seed(0)
    model, pixels = MAR(settings), torch.rand(3, 3, 8, 16, 16)
    hidden = training_mask(settings.mask, settings.grid, 3, torch.Generator().manual_seed(0))
    labels = torch.full((3, 2), 0.5)
    losses: list[torch.Tensor] = []
    gradients: list[dict[str, torch.Tensor]] = []
    for total in (
        lambda: model(pixels, hidden, labels).total,
        lambda: Released(model)(pixels, hidden, labels),
    ):
        model.zero_grad()
        losses.append(total())
        losses[-1].sum().backward()
        gradients.append(
            {
                name: each.grad.clone()
                for name, each in model.named_parameters()
                if each.grad is not None
            }
        )
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(
            Released(model).classify(pixels, hidden), model.classify(pixels, hidden)
        )


def test_the_peer_from_transformers_has_the_same_weights() -> None:
    settings = Case("standard", size="tiny", frames=4, pixels=32, precision="fp32").settings
    torch.manual_seed(0)
    model, pixels = MAR(settings).eval(), torch.rand(2, 3, 4, 32, 32)
    theirs = videomae(model, settings).eval()
    with torch.no_grad():
        mean = model.mean.view(3, 1, 1, 1)
        std = model.std.view(3, 1, 1, 1)
        scores = theirs(pixel_values=((pixels - mean) / std).transpose(1, 2)).logits
        torch.testing.assert_close(
            scores,
            model.classify(pixels, evaluation_mask(settings).expand(2, -1, -1, -1)),
            rtol=1e-4,
            atol=1e-5,
        )


def test_the_roofline_counts_the_operations_that_pytorch_counts() -> None:
    x, weight = torch.randn(4, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
    with Recorder() as recorder:
        F.linear(x, weight).sum().backward()
    with FlopCounterMode(display=False) as counter:
        F.linear(x, weight).sum().backward()
    assert (
        sum(each.operations for each in recorder.work)
        == counter.get_total_flops()
        == 2 * 3 * 4 * 8 * 16
    )


def test_the_benchmark_of_the_step_says_how_each_contestant_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "step_cases", lambda case: step_cases(case)[::3])
    # Without AVX-512, bf16 on a CPU is some twenty times slower than float32.
    case = Case("mar", size="tiny", frames=4, pixels=32, steps=1, precision="fp32")
    file = tmp_path / "bench.md"
    run.measure("step", case, this_machine(CPU, "fp32"), 1, None, file, "mar bench")
    text = file.read_text()
    assert text.count("x as fast") == 3
    assert "MFU: useful operations" in text and "torch 2" in text
    assert "transformers' VideoMAE" in text
    timed = time_case(case)
    assert timed.useful_operations == pytest.approx(2 * 2 * 1e9 * cost(case.settings).train_gflops)


def test_attention_without_gradients_goes_through_a_batch_in_pieces_to_the_same_end() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(9, 2, 12, 8).bfloat16() for _ in range(3)]
    with torch.no_grad():
        assert torch.equal(attention(*parts), explicit_attention(*parts))


def test_the_commands_parts_are_those_there_are() -> None:
    assert tuple(run.PARTS) == bench.PARTS
