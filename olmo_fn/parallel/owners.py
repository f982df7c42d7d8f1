"""Dealing out: of a round of sharded parameters, the i-th goes whole to rank i, and what became of it back to all.

Each way is one exchange of bytes. What a parameter brings along may be of any shape: a tensor with a `Shard` travels in chunks,
one without is on every rank already, and comes back whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.layout import Owners
from olmo_fn.mesh.axis import Axis, chunk
from olmo_fn.parallel.buckets import Shard, chunk_of, pack, row_bytes, unpack
from olmo_fn.parallel.sharded_placement import ShardedPlacement

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True, eq=False)
class MatrixOwners(Owners):
    """Updates that need whole parameters: rank i of an axis does the i-th of each round of those that the axis shards."""

    placement: ShardedPlacement

    def update(self, paths: Iterable[str], task: Callable[[str], Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Do the updates, round by round; yields each path with this rank's shards of the new parameter and slots."""
        scattered: dict[Axis, list[str]] = {}
        for path in paths:
            scattered.setdefault(self.placement.gather_axis(path), []).append(path)
        for path in scattered.pop(Axis(), []):  # on every rank of the axis
            yield path, *self._everywhere(path, task(path))
        for axis, those in scattered.items():
            for i in range(0, len(those), axis.size):
                yield from self._round(axis, {path: task(path) for path in those[i : i + axis.size]})

    def _everywhere(self, path: str, one: Any) -> tuple[Tensor, dict[str, Tensor]]:
        def full(x: Tensor) -> Tensor:
            return self.placement.full_tensor(path, x)

        slots = {name: x if name in one.leaf.unlike else full(x) for name, x in one.slots.items()}
        new_p, new_slots = one.run(full(one.p), full(one.g), slots, one.numbers)

        def local(x: Tensor) -> Tensor:
            return self.placement.local_shard(path, x)

        return local(new_p), {name: x if name in one.leaf.unlike else local(x) for name, x in new_slots.items()}

    def _round(self, axis: Axis, tasks: dict[str, Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """One exchange brings each rank its parameter whole, with its gradient and slots; another one brings all back."""
        names = {path: [name for name in one.slots if name not in one.leaf.unlike] for path, one in tasks.items()}
        shards = {path: self.placement.bucket_shard(path) for path in tasks}
        parts = [[one.p, one.g, *(one.slots[name] for name in names[path])] for path, one in tasks.items()]
        wholes = scatter_to_owners(parts, [[shards[path]] * (2 + len(names[path])) for path in tasks], axis)
        results: list[Tensor] | None = None
        if wholes is not None:
            path = list(tasks)[axis.index]
            one, rest = tasks[path], [a for a, _ in self.placement.placed[path].dims if a != axis.name]
            p, g, *slots = (self.placement.over(path, x, rest) for x in wholes)
            new_p, new = one.run(p, g, {**one.slots, **dict(zip(names[path], slots, strict=True))}, one.numbers)
            own = {"": new_p, **{name: new[name] for name in one.slots}}
            results = [x if name in one.leaf.unlike else self._part_in_use(path, x, axis) for name, x in own.items()]
        like = [[one.p, *one.slots.values()] for one in tasks.values()]
        kinds = [
            [shards[path], *(None if name in one.leaf.unlike else shards[path] for name in one.slots)]
            for path, one in tasks.items()
        ]
        for (path, one), (new_p, *new_slots) in zip(tasks.items(), gather_from_owners(results, like, kinds, axis), strict=True):
            yield path, new_p, dict(zip(one.slots, new_slots, strict=True))

    def _part_in_use(self, path: str, full: Tensor, axis: Axis) -> Tensor:
        """This rank's part of a whole tensor along the axes that shard it besides ``axis``."""
        for name, dim in self.placement.placed[path].dims:
            if name != axis.name:
                other = self.placement.axis(name)
                full = full.narrow(dim, *chunk(full.shape[dim], other.index, other.size))
        return full


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
