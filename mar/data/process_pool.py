"""Helper processes: they end with the one that started them.

And work on many files, in order, whatever dies over one.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def forkserver() -> multiprocessing.context.ForkServerContext:
    """Return the context that starts helper processes.

    They are forks of a server that has loaded PyTorch and the decoders once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", "mar.data.loaders"])
    return context


def end_with_parent() -> None:
    """End this helper process when the process that started it is gone, even if it was killed.

    The fork server's processes hold each other's pipes open, so without this they stay for ever.
    """
    threading.Thread(target=_end_after_parent, name="parent", daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()  # waits on a pipe whose other end that process alone has
        os._exit(1)


def each(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    crashed: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yield what ``work`` returns for each item, in order.

    What decoders print in those processes is dropped.

    A decoder may end its process. Then the items that were being worked on are tried again one by
    one, each alone, and what ``crashed`` returns stands for the one that does it again.
    """
    waiting = iter(items)
    pending = deque[tuple[Item, Future[Result]]]()
    pool = _pool(processes)
    try:
        while True:
            while len(pending) < 2 * processes and (item := next(waiting, None)) is not None:
                pending.append((item, _submitted(pool, work, item)))
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield future.result()
            except BrokenProcessPool:
                suspects = [item, *(other for other, _ in pending)]
                pending.clear()
                for suspect in suspects:
                    yield _alone(work, suspect, crashed)
                pool = _pool(processes)
    finally:
        pool.shutdown(cancel_futures=True)


def _submitted(
    pool: ProcessPoolExecutor, work: Callable[[Item], Result], item: Item
) -> Future[Result]:
    """Submit an item; to a pool that has died meanwhile too, as one that failed with it."""
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        lost = Future[Result]()
        lost.set_exception(error)
        return lost


def _alone(work: Callable[[Item], Result], item: Item, crashed: Callable[[Item], Result]) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            return crashed(item)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, forkserver(), initializer=_hush)


def _hush() -> None:
    end_with_parent()
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
