"""Reading ahead in a thread, so that the step never waits for the data."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


def prefetch(data: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T]:
    """Yield ``data(start), ..., data(stop - 1)``, computed at most ``depth`` ahead in a background thread.

    What ``data`` raises is raised here, with its own traceback, after the batches before it. Closing the iterator ends and
    joins the thread.

    >>> list(prefetch(lambda step: step * step, 2, 5))
    [4, 9, 16]
    """
    pool = ThreadPoolExecutor(1, "prefetch")
    try:
        ahead = deque(pool.submit(data, step) for step in range(start, min(start + depth, stop)))
        for step in range(start, stop):
            item = ahead.popleft().result()
            if step + depth < stop:
                ahead.append(pool.submit(data, step + depth))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
