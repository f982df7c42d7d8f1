"""Threads that read and write: a few at a time, results in order."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, wait
from typing import TypeVar

T = TypeVar("T")


def in_order(pool: Executor, jobs: Iterable[Callable[[], T]], window: int = 16) -> Generator[T]:
    """Results of ``jobs`` in their order, at most ``window`` of them under way; none runs on at the end."""
    pending: deque[Future[T]] = deque()
    try:
        for job in jobs:
            pending.append(pool.submit(job))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
        wait(pending)


def default_threads() -> int:
    """Threads that read or write: as many as this process may use cores, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(8, cores)
