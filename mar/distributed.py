"""The few things that data-parallel workers say to each other.

With one worker they cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def worker_rank() -> WorkerRank:
    """Return which worker this is, of how many."""
    if dist.is_available() and dist.is_initialized():
        return WorkerRank(dist.get_rank(), dist.get_world_size())
    return WorkerRank()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all workers."""
    if worker_rank().world > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int, device: torch.device) -> int:
    """Return the greatest of all workers' values."""
    if worker_rank().world == 1:
        return value
    values = torch.tensor(value, device=device)
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return int(values)


def all_gather(item: Any) -> list[Any]:
    """Return every worker's ``item``, in the order of ranks."""
    workers = worker_rank()
    if workers.world == 1:
        return [item]
    items: list[Any] = [None] * workers.world
    dist.all_gather_object(items, item)
    return items


def broadcast_from_rank0(find: Callable[[], T]) -> T:
    """Return what the first worker finds, on every worker; the others wait for it."""
    return all_gather(find() if worker_rank().rank == 0 else None)[0]


def default_device() -> torch.device:
    """Return this process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class WorkerRank:
    """Return this worker's part of a batch or split.

    The ``rank``-th of ``world`` contiguous parts.
    """

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Return this worker's places among ``count``.

        Parts start at even places, so that pairs stay together.
        """
        edge = [2 * (part * count // (2 * self.world)) for part in range(self.world)] + [count]
        return range(edge[self.rank], edge[self.rank + 1])
