"""Work side by side on threads of one BLAS thread each, with memory that follows the largest piece."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

__all__ = ["run_all", "run_ordered", "run_unordered"]

T = TypeVar("T")


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Workers side by side with a thread each finish earlier than one with all threads, and always the same."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            yield
    finally:
        torch.set_num_threads(threads)


def run_all(
    work: Callable[[str], T],
    names: Sequence[str],
    workers: int,
    size: Callable[[str], int] = lambda name: 1,
) -> list[T]:
    """`work` of every name, the largest first; results in the order given. The first error stops what has not begun.

    Side by side run only as many as are together no larger than twice the largest, so that memory follows the largest.
    """
    order = sorted(names, key=lambda name: (-size(name), name))
    results = dict(run_ordered(work, order, workers, size, ahead=len(order)))
    return [results[name] for name in names]


def run_unordered(
    work: Callable[[str], T],
    names: Sequence[str],
    workers: int,
    size: Callable[[str], int] = lambda name: 1,
) -> Iterator[tuple[str, T]]:
    """(name, `work` of it) as they get ready, the largest first, computed side by side as `run_all` says."""
    room = _Room(2 * max(map(size, names), default=0))

    def one(name: str) -> tuple[str, T]:
        with room.taken(size(name)):
            return name, work(name)

    order = iter(sorted(names, key=lambda name: (-size(name), name)))
    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        waiting = {pool.submit(one, name) for name in islice(order, 2 * workers)}
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                waiting |= {pool.submit(one, name) for name in islice(order, len(done))}
                for future in done:
                    yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def run_ordered(
    work: Callable[[str], T],
    names: Sequence[str],
    workers: int,
    size: Callable[[str], int] = lambda name: 1,
    ahead: int | None = None,  # results that may wait for their turn; twice the workers where None
) -> Iterator[tuple[str, T]]:
    """(name, `work` of it) in the order given, computed side by side as `run_all` says."""
    room = _Room(2 * max(map(size, names), default=0))

    def one(name: str) -> T:
        with room.taken(size(name)):
            return work(name)

    with one_thread_each(), ThreadPoolExecutor(workers) as pool:
        waiting: deque[tuple[str, Future[T]]] = deque()
        try:
            for name in names:
                waiting.append((name, pool.submit(one, name)))
                if len(waiting) > (2 * workers if ahead is None else ahead):
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class _Room:
    def __init__(self, limit: int) -> None:
        self._free, self._changed = limit, threading.Condition()

    @contextmanager
    def taken(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= size)
            self._free -= size
        try:
            yield
        finally:
            with self._changed:
                self._free += size
                self._changed.notify_all()
