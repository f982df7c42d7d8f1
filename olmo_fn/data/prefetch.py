"""Reading ahead in a thread, so that the step never waits for the data; and bringing it to a GPU meanwhile."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import TypeVar

import torch

from olmo_fn.core.chain import Batch

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


def arriving(data: Callable[[int], Batch], start: int, stop: int, device: torch.device) -> Generator[Batch]:
    """`prefetch` of batches in host memory, each yielded on ``device``.

    To a GPU they are copied by the background thread, from pinned memory and on a stream of their own, beside the steps before:
    what a step launches waits for its batch there, and no host waits.
    """
    if device.type != "cuda":
        yield from prefetch(lambda step: {name: x.to(device) for name, x in data(step).items()}, start, stop)
        return
    stream = torch.cuda.Stream(device)
    with closing(prefetch(lambda step: Sent.of(data(step), stream), start, stop)) as all_sent:
        for sent in all_sent:
            yield sent.received(torch.cuda.current_stream(device))


@dataclass(frozen=True)
class Sent:
    """A batch on its way to a GPU, and the event of its arrival."""

    batch: Batch
    arrived: torch.cuda.Event

    @classmethod
    def of(cls, batch: Batch, stream: torch.cuda.Stream) -> Sent:
        """Send a batch on a stream. The pinned copies live as long as it takes: their allocator sees to that."""
        with torch.cuda.stream(stream):  # this makes the stream's device that of the thread, too
            there = {name: x.pin_memory().to(stream.device, non_blocking=True) for name, x in batch.items()}
            return cls(there, stream.record_event())

    def received(self, stream: torch.cuda.Stream) -> Batch:
        """The batch, for what is launched on ``stream`` from now on; its memory is used anew only after that."""
        stream.wait_event(self.arrived)
        for x in self.batch.values():
            x.record_stream(stream)
        return self.batch
