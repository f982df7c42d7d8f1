"""Arithmetic of boxes: where they overlap, whether they fill a tensor, and which bytes of a stored box a part needs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import product

from olmo_fn.spec import Box


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes share; None if they share no element.

    >>> overlap(Box((0, 0), (4, 3)), Box((2, 1), (4, 9)))
    Box(offset=(2, 1), shape=(2, 2))
    """
    start = tuple(max(x, y) for x, y in zip(a.offset, b.offset, strict=True))
    stop = tuple(min(x + m, y + n) for x, m, y, n in zip(*a, *b, strict=True))
    shape = tuple(j - i for i, j in zip(start, stop, strict=True))
    return Box(start, shape) if all(n > 0 for n in shape) else None


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Elements from one index to the next in row-major order.

    >>> strides((2, 3, 4))
    (12, 4, 1)
    """
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def covering(part: Box, box: Box) -> tuple[int, int]:
    """The range of elements of ``box``, in row-major order, from the first one of ``part`` to its last.

    >>> covering(Box((1, 1), (2, 2)), Box((0, 0), (4, 4)))
    (5, 11)
    """
    step = strides(box.shape)
    start = sum((i - j) * n for i, j, n in zip(part.offset, box.offset, step, strict=True))
    return start, start + sum((n - 1) * s for n, s in zip(part.shape, step, strict=True)) + 1


def contiguous(part: Box, box: Box) -> bool:
    """Whether the elements of ``part`` lie side by side in ``box``."""
    start, stop = covering(part, box)
    return stop - start == math.prod(part.shape)


def bands(part: Box, box: Box, limit: int, sparse: int) -> Iterator[Box]:
    """``part`` cut into slices that each cover at most ``limit`` elements of ``box``, unless a single row covers more.

    Rows that begin ``sparse`` or more elements apart come one by one, so that what lies between them is not read.

    >>> [band.shape for band in bands(Box((0, 0), (5, 2)), Box((0, 0), (5, 4)), limit=8, sparse=99)]
    [(2, 2), (2, 2), (1, 2)]
    """
    start, stop = covering(part, box)
    dim = next((i for i, n in enumerate(part.shape) if n > 1), None)
    step = strides(box.shape)[dim] if dim is not None else 0
    if dim is None or contiguous(part, box) or (stop - start <= limit and step < sparse):
        yield part
        return
    rows = 1 if step >= sparse else max(1, limit // step)
    for i in range(0, part.shape[dim], rows):
        offset, shape = list(part.offset), list(part.shape)
        offset[dim] += i
        shape[dim] = min(rows, shape[dim] - i)
        band = Box(tuple(offset), tuple(shape))
        yield from bands(band, box, limit, sparse) if rows == 1 else (band,)


def tiles(boxes: Sequence[Box], shape: tuple[int, ...]) -> bool:
    """Whether the boxes fill a tensor of ``shape`` and hold no element twice. They may cut it along 16 dims at most.

    >>> tiles([Box((0,), (2,)), Box((2,), (2,))], (4,)), tiles([Box((0,), (2,)), Box((1,), (2,))], (4,))
    (True, False)
    """
    if not boxes or any(not len(i) == len(n) == len(shape) or min(n, default=0) < 0 for i, n in boxes):
        return False
    if 0 in shape:
        return all(0 in box.shape for box in boxes)
    cut = [dim for dim, n in enumerate(shape) if any((box.offset[dim], box.shape[dim]) != (0, n) for box in boxes)]
    if len(cut) > 16:
        return False
    # Σ 1_box = 1_tensor exactly where their mixed differences agree, and those are not zero at corners only.
    corners: Counter[tuple[int, ...]] = Counter()
    for sign, (offset, lengths) in [(-1, Box.whole(shape)), *((1, box) for box in boxes)]:
        for ends in product((0, 1), repeat=len(cut)):
            corner = tuple(offset[dim] + end * lengths[dim] for dim, end in zip(cut, ends, strict=True))
            corners[corner] += sign * (-1) ** sum(ends)
    return not any(corners.values())
