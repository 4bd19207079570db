"""Collective operations of data-parallel workers. With one worker they return at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def worker_rank() -> WorkerRank:
    """Return this worker's rank and the number of workers."""
    # PyTorch can be built without torch.distributed; without Ray Train no process group exists.
    if dist.is_available() and dist.is_initialized():
        return WorkerRank(dist.get_rank(), dist.get_world_size())
    return WorkerRank()


def all_reduce_sum(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over all workers."""
    # dist.all_reduce works in place; the caller's tensor must not change.
    if worker_rank().world > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


def all_reduce_max(value: int, device: torch.device) -> int:
    """Return the greatest of all workers' values."""
    if worker_rank().world == 1:
        return value
    # A tensor on the device, because the backend NCCL takes no others.
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
    """Call ``find`` on the first worker and return its result on every worker; the others wait."""
    # all_gather instead of dist.broadcast, because the result can be any object.
    return all_gather(find() if worker_rank().rank == 0 else None)[0]


def default_device() -> torch.device:
    """Return this process's accelerator, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


@dataclass(frozen=True)
class WorkerRank:
    """The rank of a worker among ``world`` workers, and its part of a batch or split."""

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> range:
        """Return this worker's indices among ``count``, one of ``world`` contiguous parts."""
        # Parts start at even indices: mixup and cutmix mix clip 2k with clip 2k + 1, and both must
        # be on the same worker.
        edge = [2 * (part * count // (2 * self.world)) for part in range(self.world)] + [count]
        return range(edge[self.rank], edge[self.rank + 1])
