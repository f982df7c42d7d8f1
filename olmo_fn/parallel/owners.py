"""Dealing out: of a round of sharded parameters, the i-th goes whole to rank i, and what became of it back to all.

Each way is one exchange of bytes. What a parameter brings along may be of any shape: a tensor with a `Shard` travels in chunks,
one without is on every rank already, and comes back whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.parallel.buckets import Shard, chunk_of, pack, row_bytes, unpack

_c10d = torch.ops._c10d_functional


def scatter_to_owners(parts: Sequence[Sequence[Tensor]], shards: Sequence[Sequence[Shard]], axis: Axis) -> list[Tensor] | None:
    """The whole tensors of this rank's item, given the chunks that it has of every item's; None if there is none for it."""
    sent = [pack(own, shard, axis.size) for own, shard in zip(parts, shards, strict=True)]
    lengths = [len(data) for data in sent] + [0] * (axis.size - len(sent))
    came = _c10d.all_to_all_single(torch.cat(sent), [lengths[axis.index]] * axis.size, lengths, axis.group)
    if axis.index >= len(parts):
        _c10d.wait_tensor(came)
        return None
    mine, theirs = shards[axis.index], parts[axis.index]
    wholes = [part.new_empty(shard.shape) for part, shard in zip(theirs, mine, strict=True)]
    unpack(came, wholes, mine, axis)
    return wholes


def gather_from_owners(
    mine: Sequence[Tensor] | None,
    like: Sequence[Sequence[Tensor]],
    shards: Sequence[Sequence[Shard | None]],
    axis: Axis,
) -> list[list[Tensor]]:
    """This rank's chunks of every item's tensors, in the dtypes of ``like``, given the whole ones of its own item.

    Those without a `Shard` come whole, in the shapes of ``like``.
    """
    n = axis.size
    lengths = [sum(row_bytes(x, shard, n) for x, shard in zip(*item, strict=True)) for item in zip(like, shards, strict=True)]
    every = lengths + [0] * (n - len(like))
    rows = [] if mine is None else [_row(mine, shards[axis.index], rank, n) for rank in range(n)]
    sent = torch.cat([like[0][0].new_empty(0, dtype=torch.uint8), *rows])
    came = _c10d.wait_tensor(_c10d.all_to_all_single(sent, every, [every[axis.index]] * n, axis.group))
    return [_unpacked(*item, n) for item in zip(came.split(lengths), like, shards, strict=True)]


def _row(whole: Sequence[Tensor], shards: Sequence[Shard | None], rank: int, n: int) -> Tensor:
    """What ``rank`` gets of an item."""
    return pack([x if s is None else chunk_of(x, s, rank, n) for x, s in zip(whole, shards, strict=True)], shards, n)


def _unpacked(row: Tensor, like: Sequence[Tensor], shards: Sequence[Shard | None], n: int) -> list[Tensor]:
    offset, found = 0, []
    for x, shard in zip(like, shards, strict=True):
        shape = x.shape if shard is None else torch.Size(shard.chunk(n))
        part = row[offset : offset + shape.numel() * x.element_size()].view(x.dtype).view(shape)
        own = part if shard is None else part.narrow(shard.dim, 0, x.shape[shard.dim])
        found.append(own.clone(memory_format=torch.contiguous_format))  # not a view, which would keep the row
        offset += row_bytes(x, shard, n)
    return found
