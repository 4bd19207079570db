"""Helper processes that end with their parent, and a pool that survives crashes of a helper."""

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
    """Return the multiprocessing context that starts helper processes.

    They are forks of a server process that has imported PyTorch once. The server has one thread, so
    forking it is safe, unlike forking a trainer.
    """
    context = multiprocessing.get_context("forkserver")
    # With these imports in the server, a helper starts in 0.1 s and not in 2.5 s.
    context.set_forkserver_preload(["__main__", "mar.data.loaders"])
    return context


def end_with_parent() -> None:
    """End this helper process when the process that started it has ended or was killed.

    The fork server and its helpers keep each other's pipes open, so otherwise they never end.
    """
    threading.Thread(target=_end_after_parent, name="parent", daemon=True).start()


def _end_after_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        # join() waits on a pipe whose other end is open in the parent alone.
        parent.join()
        # Not sys.exit(), which would end this thread only.
        os._exit(1)


def each(
    work: Callable[[Item], Result],
    items: Iterable[Item],
    processes: int,
    crashed: Callable[[Item], Result],
) -> Iterator[Result]:
    """Yield the result of ``work`` for each item, in order.

    The error output of the processes is discarded. A decoder may crash and end its process. Then
    each unfinished item is tried again in a process of its own. For an item that crashes again, the
    result of ``crashed`` is yielded instead.
    """
    waiting = iter(items)
    pending = deque[tuple[Item, Future[Result]]]()
    pool = _pool(processes)
    try:
        while True:
            # Two items for each process: none is idle, and few are repeated after a crash.
            while len(pending) < 2 * processes and (item := next(waiting, None)) is not None:
                pending.append((item, _submitted(pool, work, item)))
            if not pending:
                return
            item, future = pending.popleft()
            try:
                yield future.result()
            # A crash breaks the whole pool and does not tell which item caused it.
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
    """Submit an item; if the pool is broken already, return a future that failed with it."""
    try:
        return pool.submit(work, item)
    except BrokenProcessPool as error:
        lost = Future[Result]()
        lost.set_exception(error)
        return lost


def _alone(work: Callable[[Item], Result], item: Item, crashed: Callable[[Item], Result]) -> Result:
    """Return the result of one item in a process of its own."""
    with _pool(1) as pool:
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool:
            return crashed(item)


def _pool(processes: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(processes, forkserver(), initializer=_begin_helper)


def _begin_helper() -> None:
    """Prepare a new helper process: it ends with its parent, has one thread, prints no errors."""
    end_with_parent()
    # The helpers run in parallel already; more threads would compete for the cores.
    torch.set_num_threads(1)
    # FFmpeg and decord print to the file descriptor, not to sys.stderr.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
