"""Arithmetic of boxes: where they overlap, and which bytes of a stored box an overlap needs."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple


class Span(NamedTuple):
    """A box in the global shape of a tensor."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]


def overlap(a: Span, b: Span) -> Span | None:
    """What two boxes share; None if that is nothing.

    >>> overlap(Span((0, 0), (4, 3)), Span((2, 1), (4, 9)))
    Span(offset=(2, 1), shape=(2, 2))
    """
    start = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    stop = tuple(min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True))
    shape = tuple(j - i for i, j in zip(start, stop, strict=True))
    return Span(start, shape) if all(n > 0 for n in shape) else None


def strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Elements from one index to the next, row-major.

    >>> strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def covering(part: Span, box: Span) -> tuple[int, int]:
    """The elements of ``box``, row-major, from the first of ``part`` to behind its last.

    >>> covering(Span((1, 1), (2, 2)), Span((0, 0), (4, 4)))
    (5, 11)
    """
    step = strides(box.shape)
    start = sum((i - j) * n for i, j, n in zip(part.offset, box.offset, step, strict=True))
    return start, start + sum((n - 1) * s for n, s in zip(part.shape, step, strict=True)) + 1


def contiguous(part: Span, box: Span) -> bool:
    """Whether the elements of ``part`` lie side by side in ``box``."""
    start, stop = covering(part, box)
    return stop - start == math.prod(part.shape)


def bands(part: Span, box: Span, most: int, sparse: int) -> Iterator[Span]:
    """``part`` in slices that each cover at most ``most`` elements of ``box``, if more than one row does.

    Rows that begin ``sparse`` elements apart, or more, come one by one, so that what lies between is not read.

    >>> [band.shape for band in bands(Span((0, 0), (5, 2)), Span((0, 0), (5, 4)), most=8, sparse=99)]
    [(2, 2), (2, 2), (1, 2)]
    """
    start, stop = covering(part, box)
    dim = next((i for i, n in enumerate(part.shape) if n > 1), None)
    step = strides(box.shape)[dim] if dim is not None else 0
    if dim is None or contiguous(part, box) or (stop - start <= most and step < sparse):
        yield part
        return
    rows = 1 if step >= sparse else max(1, most // step)
    for i in range(0, part.shape[dim], rows):
        offset, shape = list(part.offset), list(part.shape)
        offset[dim] += i
        shape[dim] = min(rows, shape[dim] - i)
        band = Span(tuple(offset), tuple(shape))
        yield from bands(band, box, most, sparse) if rows == 1 else (band,)


def tiles(boxes: list[Span], shape: tuple[int, ...]) -> bool:
    """Whether the boxes fill ``shape`` and nothing twice.

    >>> tiles([Span((0,), (2,)), Span((2,), (2,))], (4,)), tiles([Span((0,), (2,)), Span((1,), (2,))], (4,))
    (True, False)
    """
    if any(not len(box.offset) == len(box.shape) == len(shape) for box in boxes):
        return False
    if any(i < 0 or n < 0 or i + n > size for box in boxes for i, n, size in zip(*box, shape, strict=True)):
        return False
    volume = sum(math.prod(box.shape) for box in boxes)
    return bool(boxes) and volume == math.prod(shape) and (volume == 0 or not _any_overlap(boxes))


def _any_overlap(boxes: list[Span], dim: int = 0) -> bool:
    """Cut at all borders along ``dim``, then look into each slice: quick for the grids that meshes make."""
    if len(boxes) < 2:
        return False
    if dim == len(boxes[0].shape):
        return True
    cuts = sorted({cut for box in boxes for cut in (box.offset[dim], box.offset[dim] + box.shape[dim])})
    at = {cut: i for i, cut in enumerate(cuts)}
    slices: dict[int, list[Span]] = defaultdict(list)
    for box in boxes:
        for cut in range(at[box.offset[dim]], at[box.offset[dim] + box.shape[dim]]):
            slices[cut].append(box)
    return any(_any_overlap(inside, dim + 1) for inside in slices.values())
