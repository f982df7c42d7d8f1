"""What segments keep for the backward sweep, in host memory: copied there and back beside the computation.

A *stash* is a function for one sweep. It is given what a segment keeps, a list of tensors, and gives a function that gives them
back. They are asked for in reverse order, so a stash that has given some back can fetch those before them ahead of time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

Kept: TypeAlias = Sequence[Any]
"""Tensors, or None: before the first stage of a chain there is none."""
Stash: TypeAlias = Callable[[Kept], Callable[[], Kept]]


def stay(kept: Kept) -> Callable[[], Kept]:
    """A stash that leaves tensors where they are."""
    return lambda: kept


def no_stash() -> Stash:
    """`stay`, for one sweep."""
    return stay


class Link(NamedTuple):
    """The way between a device and its host: ``host(x)`` is memory for a tensor there, ``copy(to, source)`` begins to copy
    tensors, and gives a function that makes what is computed next wait until that is done.
    """

    host: Callable[[Tensor], Tensor]
    copy: Callable[[Sequence[Tensor], Sequence[Tensor]], Callable[[], None]]


def pinned(x: Tensor) -> Tensor:
    """Host memory for a tensor, which its GPU can read and write by itself."""
    return torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)


def copy_beside(to: Sequence[Tensor], source: Sequence[Tensor]) -> Callable[[], None]:
    """Copy on a stream of its own, after what is on its way on the current one; on a CPU at once."""
    devices = {x.device for x in (*to, *source) if x.is_cuda}
    if not devices:
        for a, b in zip(to, source, strict=True):
            a.copy_(b)
        return lambda: None
    (device,) = devices
    stream, current = copy_stream(device), torch.cuda.current_stream(device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for a, b in zip(to, source, strict=True):
            a.copy_(b, non_blocking=True)
        done = stream.record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(done)


@cache
def copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of a device on which it copies."""
    return torch.cuda.Stream(device)


LINK = Link(pinned, copy_beside)


class HostStash:
    """A stash in host memory.

    What was kept last leaves the device when the next comes, by when it has been copied; so the last of all stays. Once some
    are given back, those before them are on their way.

    >>> stash = HostStash()
    >>> first, second = stash([torch.ones(2)]), stash([torch.zeros(2)])
    >>> second(), first()
    ([tensor([0., 0.])], [tensor([1., 1.])])
    """

    def __init__(self, link: Link = LINK) -> None:
        self.link = link
        self.last: _Away | None = None

    def __call__(self, kept: Kept) -> Callable[[], Kept]:
        if self.last is not None:
            self.last.leave()
        self.last = _Away(kept, self.last, self.link)
        return self.last.take


class _Away:
    """What one segment keeps. Memory on the device is held until a copy from it is waited for: no stream frees another's."""

    def __init__(self, kept: Kept, before: _Away | None, link: Link) -> None:
        self.is_none, self.before, self.link = [x is None for x in kept], before, link
        self.here: list[Tensor] = [x for x in kept if x is not None]
        self.device = self.here[0].device if self.here else None
        self.away = [link.host(x) for x in self.here]
        self.copied = link.copy(self.away, self.here)

    def leave(self) -> None:
        self.copied()
        self.here = []

    def come(self) -> None:
        if self.away and not self.here:
            self.here = [torch.empty_like(x, device=self.device, pin_memory=False) for x in self.away]
            self.copied = self.link.copy(self.here, self.away)

    def take(self) -> Kept:
        self.come()  # nothing, if a later one has made it come or it never left
        self.copied()
        if self.before is not None:
            self.before.come()
        found = iter(self.here)
        self.here, self.away, self.before = [], [], None
        return [None if none else next(found) for none in self.is_none]
