"""The roofline of a step: the least time that the arithmetic or memory of each operation needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mar.bench.machine import Machine


@dataclass(frozen=True)
class Work:
    """One operation of a step."""

    name: str
    operations: float
    """Two for each multiply-add of a matrix product or of attention; none for other operations."""
    bytes: float
    """Its inputs read once and its outputs written once."""


class Recorder(TorchDispatchMode):
    """Records the work of every operation that runs in it, backward pass and optimiser included."""

    def __init__(self) -> None:
        super().__init__()
        self.work: list[Work] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and record its work."""
        out = func(*args, **(kwargs or {}))
        # Views and allocations of memory ("empty") read and write no values.
        if not func.is_view and "empty" not in str(func):
            name = func._overloadpacket
            moved = 0
            for leaf in tree_leaves((args, kwargs, out)):
                if isinstance(leaf, Tensor):
                    moved += leaf.numel() * leaf.element_size()
            self.work.append(Work(str(name), _operations(name, args, kwargs or {}, out), moved))
        return out


def _operations(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    """Return an operation's arithmetic, by PyTorch's counter where it knows the operation."""
    count: Callable[..., int] | None = flop_registry.get(name)
    if count is not None:
        return count(*args, **kwargs, out_val=out)
    # PyTorch's counter does not know attention's fused kernel for the CPU.
    if "flash_attention_for_cpu" in str(name):
        if "backward" in str(name):
            # The first argument is the output's gradient. Five matrix products: QKᵀ once more, and
            # the gradients of softmax(QKᵀ), V, Q and K.
            query = args[1]
            key = args[2]
            products = 5
        else:
            # Two matrix products: QKᵀ, and its softmax with V.
            query = args[0]
            key = args[1]
            products = 2
        return 2.0 * products * query.numel() * key.shape[-2]
    return 0.0


@dataclass(frozen=True)
class Floor:
    """The least time of a step whose operations run one after another."""

    arithmetic_s: float
    """The time of the operations that arithmetic limits."""
    memory_s: float
    """The time of the operations that memory limits."""
    bytes: float
    """Memory traffic of all operations."""

    @property
    def seconds(self) -> float:
        """The time of all operations."""
        return self.arithmetic_s + self.memory_s


def floor(work: list[Work], machine: Machine) -> Floor:
    """Return the least time of the work on a machine, at the rates that were measured on it."""
    arithmetic_s = 0.0
    memory_s = 0.0
    for each in work:
        # An operation computes while it moves data, so the slower of the two is its least time.
        computing_s = each.operations / machine.matmul_tflops / 1e12
        moving_s = each.bytes / machine.copy_gb_s / 1e9
        if computing_s > moving_s:
            arithmetic_s += computing_s
        else:
            memory_s += moving_s
    return Floor(arithmetic_s, memory_s, sum(each.bytes for each in work))
