"""Reading ahead in a thread, so that the step never waits for the data."""

from __future__ import annotations

from collections.abc import Callable, Generator
from queue import SimpleQueue
from threading import Event, Semaphore, Thread
from typing import TypeVar

T = TypeVar("T")


def prefetch(data: Callable[[int], T], start: int, stop: int, depth: int = 2) -> Generator[T]:
    """Yield ``data(start), ..., data(stop - 1)``, computed at most ``depth`` ahead in a background thread.

    What ``data`` raises is raised here, with its own traceback, after the batches before it. Closing the
    iterator ends and joins the thread.

    >>> list(prefetch(lambda step: step * step, 2, 5))
    [4, 9, 16]
    """
    ready: SimpleQueue[tuple[bool, T | BaseException]] = SimpleQueue()
    free = Semaphore(depth)
    closed = Event()

    def read() -> None:
        for step in range(start, stop):
            free.acquire()
            if closed.is_set():
                return
            try:
                ready.put((True, data(step)))
            except BaseException as e:
                return ready.put((False, e))

    thread = Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(start, stop):
            ok, item = ready.get()
            if not ok:
                raise item  # type: ignore[misc]
            free.release()
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        free.release()
        thread.join()
