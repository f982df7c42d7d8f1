"""Buckets: the shards of many parameters in one collective.

A parameter of whole shape (…, L, …) sharded along a dim of length L over n ranks has chunks of ceil(L / n), the last ones
smaller or empty; in a bucket every chunk is padded to the first one's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from olmo_fn.mesh.axis import Axis, chunk
from olmo_fn.mesh.collectives import gather_into

_c10d = torch.ops._c10d_functional
ALIGN = 16  # bytes: a part of a bucket can then be viewed as any dtype


class Shard(NamedTuple):
    """A sharded parameter as a bucket sees it: the shape that is whole on this axis, and the dim that is not at rest."""

    shape: tuple[int, ...]
    dim: int

    def chunk(self, n: int) -> tuple[int, ...]:
        """The padded shape of one of ``n`` chunks."""
        return (*self.shape[: self.dim], -(-self.shape[self.dim] // n), *self.shape[self.dim + 1 :])

    def in_place(self, n: int) -> bool:
        """Whether ``n`` chunks, one behind the other, are the whole: then a gather can write straight into it.

        True of even rows of a matrix. Vectors are too small for a collective of their own.

        >>> Shard((4, 6), 0).in_place(2), Shard((4, 6), 1).in_place(2), Shard((5, 6), 0).in_place(2), Shard((4,), 0).in_place(2)
        (True, False, False, False)
        """
        return len(self.shape) > 1 and self.dim == 0 and self.shape[0] % n == 0


def all_gather(parts: Sequence[Tensor], shards: Sequence[Shard], axis: Axis) -> Tensor:
    """Begin to gather chunks of any dtypes as bytes, one collective; give the result to `unpack`."""
    packed = pack(parts, shards, axis.size)
    return gather_into(packed.new_empty(axis.size * len(packed)), packed, axis.size, axis.group)


def pack(
    parts: Sequence[Tensor], shards: Sequence[Shard | None], n: int, dtypes: Sequence[torch.dtype] | None = None
) -> Tensor:
    """Chunks of any dtypes, padded, one behind the other as bytes; a tensor without a `Shard` as it is.

    ``dtypes``: what they become on the way. What stands in the padding is not said.
    """
    dtypes = [part.dtype for part in parts] if dtypes is None else dtypes
    shapes = [part.shape if shard is None else torch.Size(shard.chunk(n)) for part, shard in zip(parts, shards, strict=True)]
    sizes = [_padded_bytes(shape.numel() * dtype.itemsize) for shape, dtype in zip(shapes, dtypes, strict=True)]
    bucket = parts[0].new_empty(sum(sizes), dtype=torch.uint8)
    for part, row, shape, dtype in zip(parts, bucket.split(sizes), shapes, dtypes, strict=True):
        target = row[: shape.numel() * dtype.itemsize].view(dtype).view(shape)
        for dim, length in enumerate(part.shape):
            target = target.narrow(dim, 0, length)
        target.copy_(part)
    return bucket


def unpack(gathered: Tensor, outs: Sequence[Tensor], shards: Sequence[Shard], axis: Axis) -> None:
    """Wait for a gather and write the whole parameters into ``outs``."""
    rows = _c10d.wait_tensor(gathered).view(axis.size, -1)
    offset = 0
    for out, shard in zip(outs, shards, strict=True):
        shape = shard.chunk(axis.size)
        length = torch.Size(shape).numel() * out.element_size()
        if not length:
            continue
        part = rows[:, offset : offset + length].view(out.dtype).unflatten(1, shape)  # (n, *shape)
        target = _by_chunks(out, shard, axis.size)
        if target is not None:
            target.copy_(part)
        else:
            whole = part.movedim(0, shard.dim).flatten(shard.dim, shard.dim + 1)
            out.copy_(whole.narrow(shard.dim, 0, shard.shape[shard.dim]))
        offset += _padded_bytes(length)


def reduce_scatter(grads: Sequence[Tensor], shards: Sequence[Shard], axis: Axis, dtype: torch.dtype) -> Tensor:
    """Begin to sum gradients over the axis in ``dtype``, each rank keeping its chunks; give the result to `split`."""
    sizes = [torch.Size(shard.chunk(axis.size)).numel() for shard in shards]
    bucket = grads[0].new_empty(axis.size, sum(sizes), dtype=dtype)
    for grad, shard, part in zip(grads, shards, bucket.split(sizes, dim=1), strict=True):
        shape = shard.chunk(axis.size)
        source = _by_chunks(grad, shard, axis.size)
        if source is None:
            long = (*shard.shape[: shard.dim], shape[shard.dim] * axis.size, *shard.shape[shard.dim + 1 :])
            source = _by_chunks(_padded(grad, long), Shard(long, shard.dim), axis.size)
        assert source is not None
        part.unflatten(1, shape).copy_(source)
    return _c10d.reduce_scatter_tensor(bucket.view(-1), "sum", axis.size, axis.group)


def split(reduced: Tensor, shards: Sequence[Shard], axis: Axis) -> list[Tensor]:
    """This rank's chunks, without padding, out of the (waited for) result of `reduce_scatter`."""
    sizes = [torch.Size(shard.chunk(axis.size)).numel() for shard in shards]
    found = []
    for part, shard in zip(reduced.split(sizes), shards, strict=True):
        _, length = chunk(shard.shape[shard.dim], axis.index, axis.size)
        found.append(part.view(shard.chunk(axis.size)).narrow(shard.dim, 0, length).contiguous())
    return found


def chunk_of(whole: Tensor, shard: Shard, index: int, n: int) -> Tensor:
    """Chunk ``index`` of ``n``, without padding, a view.

    >>> chunk_of(torch.arange(5), Shard((5,), 0), index=2, n=3)
    tensor([4])
    """
    start, length = chunk(shard.shape[shard.dim], index, n)
    return whole.narrow(shard.dim, start, length)


def row_bytes(x: Tensor, shard: Shard | None, n: int) -> int:
    """What a tensor, or a chunk of it, takes in a row."""
    size = x.numel() if shard is None else torch.Size(shard.chunk(n)).numel()
    return _padded_bytes(size * x.element_size())


def _padded_bytes(size: int) -> int:
    return size + -size % ALIGN


def _padded(part: Tensor, shape: Sequence[int]) -> Tensor:
    """``part`` with zeros behind it in every dim, up to ``shape``."""
    if tuple(part.shape) == tuple(shape):
        return part
    widths = [w for have, want in zip(reversed(part.shape), reversed(shape), strict=True) for w in (0, want - have)]
    return pad(part, widths)


def _by_chunks(whole: Tensor, shard: Shard, n: int) -> Tensor | None:
    """The whole as (n, *chunk), a view; None if the chunks are uneven."""
    if shard.shape[shard.dim] % n:
        return None
    return whole.unflatten(shard.dim, (n, -1)).movedim(shard.dim, 0)
