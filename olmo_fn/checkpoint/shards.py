"""Which part of each tensor a rank holds, and the plan of which rank writes what."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, cast

import torch
from torch.distributed.tensor import DTensor, Replicate, Shard

from olmo_fn.checkpoint.format import DTYPE_NAMES
from olmo_fn.checkpoint.ranks import Ranks
from olmo_fn.mesh.axis import chunk
from olmo_fn.spec import Box

PLAIN: set[type] = {torch.Tensor, torch.nn.Parameter}
"""Kinds of tensors whose bytes are their values."""


@dataclass(frozen=True)
class Deferred:
    """A dense tensor that ``make`` makes when it is written, and that is let go then; in the place of a leaf of a saved tree.

    So a tree is saved that is larger than the memory, with ``threads=1`` one tensor at a time.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def itemsize(self) -> int:
        """Bytes of an entry."""
        return self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.itemsize * math.prod(self.shape)


class LocalShard(NamedTuple):
    """The part of one tensor that this rank holds: its data, the whole tensor's shape, and the box of it that the data is."""

    data: torch.Tensor | Deferred
    shape: tuple[int, ...]
    box: Box

    def tensor(self) -> torch.Tensor:
        """The data, made now if it is not there yet."""
        if not isinstance(self.data, Deferred):
            return self.data
        made = self.data.make()
        assert (made.dtype, tuple(made.shape)) == (self.data.dtype, self.data.shape), (made.dtype, made.shape, self.data)
        return made


Held: TypeAlias = tuple[dict[str, tuple[Box, int, int]], tuple[str, ...]]
"""What a rank tells of its `LocalState`: of each tensor the box, its bytes and those of the whole; branches without leaves."""


@dataclass(frozen=True)
class LocalState:
    """What one rank brings to a checkpoint: its shards by path, the paths of branches without leaves, and the caller's JSON."""

    step: int
    shards: dict[str, LocalShard]
    empty: tuple[str, ...]
    meta: dict[str, Any]

    def held(self) -> Held:
        """What the ranks need to know to agree on a `Plan`."""
        return {
            name: (x.box, x.data.nbytes, x.data.itemsize * math.prod(x.shape)) for name, x in self.shards.items()
        }, self.empty


@dataclass(frozen=True)
class Plan:
    """The ranks that write each tensor, in the tensors' order; branches without leaves; the bytes of all tensors."""

    writers: dict[str, list[int]]
    empty: tuple[str, ...]
    nbytes: int

    def written_by(self, rank: int, shards: Mapping[str, LocalShard]) -> dict[str, LocalShard]:
        """Those of the rank's ``shards`` that it writes."""
        return {name: shard for name, shard in shards.items() if rank in self.writers[name]}


def local_state(tree: Mapping[str, Any], step: int, meta: Mapping[str, Any] | None, ranks: Ranks) -> LocalState:
    """This rank's part of ``tree``; ValueError that names the first thing that a checkpoint cannot hold."""
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r}: must be an int, 0 or more")
    leaves = dict(leaves_of(tree))
    empty = tuple(path for path, leaf in leaves.items() if isinstance(leaf, Mapping))
    shards = {}
    for path, leaf in leaves.items():
        try:
            if not isinstance(leaf, Mapping):
                shards[path] = _local_shard(leaf, ranks)
        except ValueError as error:
            raise ValueError(f"{path} {error}") from None
    return LocalState(step, shards, empty, _checked_meta(meta or {}))


def leaves_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """As `olmo_fn.tree.items`, but with a branch without leaves as a leaf; ValueError for a key that makes paths ambiguous.

    >>> dict(leaves_of({"a": {"x": 1}, "b": {}}))
    {'a.x': 1, 'b': {}}
    """
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if not isinstance(key, str) or not key or not key.isprintable() or "." in key or path == "__metadata__":
            where = f"in {prefix[:-1]}" if prefix else "at the root"
            raise ValueError(f"key {key!r} {where} of the tree: must be a printable str, not empty, without dots")
        if isinstance(value, Mapping) and value:
            yield from leaves_of(value, f"{path}.")
        else:
            yield path, value


def local_box(leaf: torch.Tensor) -> Box:
    """The box of ``leaf`` that this rank holds: all of a plain tensor, of a DTensor what its placements say.

    ValueError for a placement that is neither Replicate nor Shard, and for a mesh that this rank is no part of.

    >>> local_box(torch.ones(2, 3))
    Box(offset=(0, 0), shape=(2, 3))
    """
    if not isinstance(leaf, DTensor):
        return Box.whole(leaf.shape)
    if (coordinate := leaf.device_mesh.get_coordinate()) is None:
        raise ValueError(f"is a DTensor on the mesh {leaf.device_mesh}, which this rank is not in")
    offset, shape = [0] * leaf.ndim, list(leaf.shape)
    for placement, index, size in zip(leaf.placements, coordinate, leaf.device_mesh.shape, strict=True):
        if type(placement) not in (Replicate, Shard):
            raise ValueError(f"is placed as {placement}; a checkpoint holds Replicate and Shard: redistribute it first")
        if isinstance(placement, Shard):
            start, shape[placement.dim] = chunk(shape[placement.dim], index, size)
            offset[placement.dim] += start
    return Box(tuple(offset), tuple(shape))


def assign(held: Sequence[Held]) -> Plan:
    """The plan from what all ranks hold: of every distinct box that is not empty, one of the ranks that hold it is the writer.

    Greedy: the largest box first, to the holder with the fewest bytes so far. DTensors and plain tensors are alike: a plain
    tensor is a box that every rank holds. Of an empty tensor one rank writes its box.

    >>> shards = {"a": (Box((0,), (2,)), 8, 8), "b": (Box((0,), (2,)), 8, 8)}
    >>> assign([(shards, ()), (shards, ())]).writers
    {'a': [0], 'b': [1]}
    """
    holders: dict[tuple[int, str, Box | None], list[int]] = {}
    sizes: dict[str, int] = {}
    for rank, (shards, _) in enumerate(held):
        for name, (box, nbytes, sizes[name]) in shards.items():
            if nbytes or not sizes[name]:
                holders.setdefault((nbytes, name, box if nbytes else None), []).append(rank)
    writers: dict[str, list[int]] = {name: [] for name in sizes}
    written = [0] * len(held)
    for (nbytes, name, _), ranks in sorted(holders.items(), key=lambda item: -item[0][0]):
        writer = min(ranks, key=written.__getitem__)
        written[writer] += nbytes
        writers[name].append(writer)
    # A branch that is empty on one pipeline stage may have leaves on another.
    branches = {name[:i] for name in sizes for i, letter in enumerate(name) if letter == "."}
    empty = tuple(dict.fromkeys(path for _, paths in held for path in paths if path not in branches))
    return Plan(writers, empty, sum(sizes.values()))


def _local_shard(leaf: Any, ranks: Ranks) -> LocalShard:
    data: Any = leaf
    if isinstance(leaf, DTensor):
        mesh, coordinate = leaf.device_mesh.mesh, leaf.device_mesh.get_coordinate()
        mesh_rank = None if coordinate is None else int(mesh[tuple(coordinate)])
        if mesh_rank != ranks.rank or int(mesh.max()) >= ranks.size:
            which = "not in it" if mesh_rank is None else f"its rank {mesh_rank}"
            raise ValueError(
                f"is a DTensor on the ranks {mesh.flatten().tolist()}, this process is {which}, and saves as "
                f"rank {ranks.rank} of {ranks.size}; pass ranks=Ranks(rank, world size, store)"
            )
        data = cast(DTensor, leaf.detach()).to_local()
    plain = type(data) in PLAIN
    if not isinstance(data, Deferred) and (not plain or data.layout != torch.strided or data.is_meta):
        kind = f"Tensor ({data.layout}, {data.device})" if plain else type(data).__name__
        raise ValueError(f"is a {kind}; a checkpoint holds dense tensors, other values go into meta")
    if data.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"is {data.dtype}; a checkpoint holds {known}")
    shape, box = tuple(leaf.shape), local_box(leaf)
    if tuple(data.shape) != box.shape:
        raise ValueError(f"holds {list(data.shape)} here, its placements say {list(box.shape)} of {list(shape)}")
    return LocalShard(data, shape, box)


def _checked_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``meta``; ValueError if JSON would not give it back as it is."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(dict(meta), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"meta is not JSON: {error}; use str, int, finite float, bool, None, list, dict") from None
    for name, value in meta.items():
        if name not in copy or copy[name] != value:
            raise ValueError(
                f"meta[{name!r}] is {value!r}, JSON gives back {copy.get(str(name))!r}; use lists for tuples and str for keys"
            )
    return copy
