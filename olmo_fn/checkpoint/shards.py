"""Which part of a tensor a rank holds, and which rank writes it: placements in, boxes out, no communication."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.tensor import DTensor, Replicate, Shard

from olmo_fn.checkpoint.spans import Span


@dataclass(frozen=True)
class Layout:
    """How one tensor lies on a mesh: ``ranks`` has the mesh's shape, ``dims`` the tensor dim that each of its dims shards."""

    shape: tuple[int, ...]
    itemsize: int
    ranks: NDArray[np.int64]
    dims: tuple[int | None, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.itemsize


def box_of(leaf: torch.Tensor) -> Span:
    """The box of ``leaf`` that this rank holds: all of a plain tensor, of a DTensor what its placements say.

    As DTensor has it: chunks are rounded up, so the last ones are smaller or empty. ValueError for a
    placement that is neither Replicate nor Shard, and for a mesh that this rank is no part of.

    >>> box_of(torch.ones(2, 3))
    Span(offset=(0, 0), shape=(2, 3))
    """
    shape = tuple(leaf.shape)
    if not isinstance(leaf, DTensor):
        return Span((0,) * len(shape), shape)
    mesh = leaf.device_mesh
    if (coordinate := mesh.get_coordinate()) is None:
        raise ValueError(f"this rank is not in the mesh {mesh} of its own DTensor")
    offset, size = span_at(shape, tuple(mesh.shape), shard_dims(leaf), coordinate)
    return Span(tuple(map(int, offset)), tuple(map(int, size)))


def span_at(
    shape: Sequence[int], degrees: Sequence[int], dims: Sequence[int | None], coordinate: Iterable[Any]
) -> tuple[list[Any], list[Any]]:
    """Offset and shape of the box at ``coordinate`` of a mesh; for arrays of coordinates, arrays of them.

    >>> offset, size = span_at((5, 2), (2, 4), (None, 0), (np.array(1), np.arange(4)))
    >>> offset[0].tolist(), size[0].tolist()
    ([0, 2, 4, 5], [2, 2, 1, 0])
    """
    offset: list[Any] = [0] * len(shape)
    size: list[Any] = list(shape)
    for degree, dim, at in zip(degrees, dims, coordinate, strict=True):
        if dim is not None:
            chunk = -(-size[dim] // degree)
            start = np.minimum(at * chunk, size[dim])
            offset[dim] = offset[dim] + start
            size[dim] = np.minimum(size[dim] - start, chunk)
    return offset, size


def shard_dims(leaf: DTensor) -> tuple[int | None, ...]:
    """The dim that each mesh dim shards, None where it replicates; ValueError for any other placement."""
    for placement in leaf.placements:
        if type(placement) not in (Replicate, Shard):
            raise ValueError(f"placed as {placement}; a checkpoint holds Replicate and Shard: redistribute it first")
    return tuple(p.dim % leaf.ndim if isinstance(p, Shard) else None for p in leaf.placements)


def layout_of(leaf: DTensor) -> Layout:
    """The layout of a DTensor, the same on all ranks of its mesh."""
    return Layout(tuple(leaf.shape), leaf.dtype.itemsize, leaf.device_mesh.mesh.numpy(), shard_dims(leaf))


def writers(layouts: Mapping[str, Layout]) -> dict[str, NDArray[np.int64]]:
    """The ranks that write each tensor: for every distinct box that is not empty, one of those that hold it.

    Greedy: the largest tensor first, of each box the holder with the fewest bytes so far. All ranks of a mesh
    get the same answer from the same layouts. Of an empty tensor one rank writes the whole.

    >>> replicated = Layout((4,), 4, np.arange(2), (None,))
    >>> {name: ranks.tolist() for name, ranks in writers({"a": replicated, "b": replicated}).items()}
    {'a': [0], 'b': [1]}
    """
    written = np.zeros(1 + max((int(layout.ranks.max()) for layout in layouts.values()), default=0), dtype=np.int64)
    result = {}
    for name, layout in sorted(layouts.items(), key=lambda item: -item[1].nbytes):
        degrees = layout.ranks.shape
        _, size = span_at(layout.shape, degrees, layout.dims, np.indices(degrees))
        nbytes = np.broadcast_to(np.asarray(math.prod(size) * layout.itemsize), degrees)
        order = sorted(range(len(degrees)), key=lambda i: layout.dims[i] is None)
        boxes = math.prod(n for n, dim in zip(degrees, layout.dims, strict=True) if dim is not None)
        holders = layout.ranks.transpose(order).reshape(boxes, -1)
        weight = nbytes.transpose(order).reshape(boxes, -1)[:, 0]
        writer = holders[np.arange(boxes), written[holders].argmin(axis=1)]
        written[writer] += weight
        result[name] = writer[weight > 0] if layout.nbytes else writer[:1]
    return result
