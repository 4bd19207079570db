"""The roofline of a step: the least time that its arithmetic and its memory traffic need.

Counted for each operation.
"""

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
    """Two for each multiply-add of a matrix product or of attention; other operations count
    none."""
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
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in str(func):
            name = func._overloadpacket
            tensors = [
                each for each in tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)
            ]
            moved = sum(each.numel() * each.element_size() for each in tensors)
            self.work.append(Work(str(name), _operations(name, args, kwargs or {}, out), moved))
        return out


def _operations(name: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> float:
    count: Callable[..., int] | None = flop_registry.get(name)
    if count is not None:
        return count(*args, **kwargs, out_val=out)
    if "flash_attention_for_cpu" in str(name):  # that PyTorch's counter does not know
        query, key = (args[1], args[2]) if "backward" in str(name) else (args[0], args[1])
        products = 5 if "backward" in str(name) else 2
        return 2.0 * products * query.numel() * key.shape[-2]
    return 0.0


@dataclass(frozen=True)
class Floor:
    """The least time of a step whose operations run one after another."""

    arithmetic_s: float
    """Of those that arithmetic limits."""
    memory_s: float
    """Of those that memory limits."""
    bytes: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.arithmetic_s + self.memory_s


def floor(work: list[Work], machine: Machine) -> Floor:
    """Return the least time on a machine, at the rates that were measured on it."""
    arithmetic_s = memory_s = 0.0
    for each in work:
        computing, moving = (
            each.operations / machine.matmul_tflops / 1e12,
            each.bytes / machine.copy_gb_s / 1e9,
        )
        if computing > moving:
            arithmetic_s += computing
        else:
            memory_s += moving
    return Floor(arithmetic_s, memory_s, sum(each.bytes for each in work))
