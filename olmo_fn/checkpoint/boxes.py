"""Arithmetic of boxes: where they overlap, whether they fill a tensor, and which bytes of a stored box a part needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

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
    """Whether the boxes fill a tensor of ``shape`` and hold no element twice.

    >>> tiles([Box((0,), (2,)), Box((2,), (2,))], (4,)), tiles([Box((0,), (2,)), Box((1,), (2,))], (4,))
    (True, False)
    """
    if not boxes or any(not len(box.offset) == len(box.shape) == len(shape) for box in boxes):
        return False
    # All borders together cut the tensor into cells: for the grids that meshes make, these are the boxes themselves.
    cuts = []
    for size, *sides in zip(shape, *(box.slices for box in boxes), strict=True):
        cuts.append(sorted({0, size, *(side.start for side in sides), *(side.stop for side in sides)}))
        if cuts[-1][0] < 0 or cuts[-1][-1] > size:
            return False
    cells = [{position: i for i, position in enumerate(cut)} for cut in cuts]
    count = np.zeros([len(cut) - 1 for cut in cuts], dtype=np.int64)
    for box in boxes:
        count[tuple(slice(cell[side.start], cell[side.stop]) for cell, side in zip(cells, box.slices, strict=True))] += 1
    return bool((count == 1).all())
