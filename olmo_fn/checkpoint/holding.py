"""What one rank brings to a checkpoint, and what of it the ranks agree that it writes."""

from __future__ import annotations

import heapq
import json
import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from olmo_fn.checkpoint.index import BrokenCheckpoint, Entry, Index
from olmo_fn.checkpoint.leaves import take_apart
from olmo_fn.checkpoint.ranks import Ranks
from olmo_fn.checkpoint.shards import box_of, layout_of, writers
from olmo_fn.checkpoint.tensorfile import DTYPE_NAMES, Piece


@dataclass(frozen=True)
class Holding:
    """The boxes that this rank writes unless other ranks do, and the names of all that it holds.

    ``names`` has for each tensor the first rank of its mesh (None for a plain tensor) and its bytes in all:
    ranks of one pipeline stage hold the same.
    """

    pieces: tuple[Piece, ...]
    names: dict[str, tuple[int | None, int]]
    empty: tuple[str, ...] = ()

    def dumps(self, step: int) -> bytes:
        """What this rank tells the others."""
        return zlib.compress(json.dumps([step, self.names, self.empty]).encode(), 1)


def hold(tree: Mapping[str, Any], ranks: Ranks) -> Holding:
    """The holding of this rank in ``tree``; ValueError that names the first leaf a checkpoint cannot hold."""
    leaves = take_apart(tree)
    names: dict[str, tuple[int | None, int]] = {}
    for path, leaf in leaves.by_path.items():
        _check_storable(path, leaf, ranks)
        mesh = int(leaf.device_mesh.mesh.flatten()[0]) if isinstance(leaf, DTensor) else None
        names[path] = (mesh, leaf.numel() * leaf.element_size())
    sharded = {path: layout_of(leaf) for path, leaf in leaves.by_path.items() if isinstance(leaf, DTensor)}
    by = writers(sharded)
    pieces = [_piece(path, leaf) for path, leaf in leaves.by_path.items() if path not in by or ranks.rank in by[path]]
    return Holding(tuple(pieces), names, leaves.empty)


@dataclass(frozen=True)
class Plan:
    """Who holds what: the holdings that differ, each with its ranks, ordered by the first of them."""

    holdings: tuple[tuple[dict[str, tuple[int | None, int]], tuple[int, ...]], ...]
    empty: tuple[str, ...]

    @staticmethod
    def of(told: Sequence[bytes]) -> Plan:
        """The plan from what all ranks told; ValueError if they are not at the same step."""
        members: dict[bytes, list[int]] = {}
        for rank, text in enumerate(told):
            members.setdefault(text, []).append(rank)
        read = [(json.loads(zlib.decompress(text)), tuple(ranks)) for text, ranks in members.items()]
        if len({step for (step, _, _), _ in read}) > 1:
            spelt = ", ".join(f"rank {ranks[0]} at step {step}" for (step, _, _), ranks in read)
            raise ValueError(f"the ranks save different steps: {spelt}; all must save the same ones in the same order")
        names = [name for (_, held, _), _ in read for name in held]
        empty = dict.fromkeys(path for (_, _, empty), _ in read for path in empty)
        inner = {name[:i] for name in names for i, letter in enumerate(name) if letter == "."} if len(read) > 1 else set()
        return Plan(tuple((held, ranks) for (_, held, _), ranks in read), tuple(path for path in empty if path not in inner))

    @property
    def tensors(self) -> dict[str, int]:
        """Names and bytes of all tensors, in the order of the first rank that holds them."""
        return {name: nbytes for held, _ in self.holdings for name, (_, nbytes) in held.items()}

    def dumps(self, partial: str) -> bytes:
        """What rank 0 answers."""
        return zlib.compress(json.dumps([partial, self.holdings, self.empty]).encode(), 1)

    @staticmethod
    def loads(data: bytes) -> tuple[str, Plan]:
        """The inverse of `dumps`."""
        partial, holdings, empty = json.loads(zlib.decompress(data))
        return partial, Plan(tuple((held, tuple(ranks)) for held, ranks in holdings), tuple(empty))

    def written_by(self, rank: int) -> set[str]:
        """The tensors of which ``rank`` writes what it holds.

        What several holdings have (tied weights, the step) the first one's ranks write; a plain tensor one
        of them does, so that bytes are even.
        """
        taken: set[str] = set()
        mine: set[str] = set()
        for held, ranks in self.holdings:
            load = [(0, member) for member in ranks]
            for name, (mesh, nbytes) in sorted(held.items(), key=lambda item: -item[1][1]):
                if name in taken:
                    continue
                writer = rank if rank in ranks else None
                if mesh is None:
                    written, writer = load[0]
                    heapq.heapreplace(load, (written + nbytes, writer))
                if writer == rank:
                    mine.add(name)
            taken |= held.keys()
        return mine


def merge(plan: Plan, parts: Collection[Index], step: int, meta: dict[str, Any], where: str) -> Index:
    """One index of the ranks' parts; `BrokenCheckpoint` if the boxes do not make up every tensor exactly once."""
    entries: dict[str, list[Entry]] = {name: [] for name in plan.tensors}
    for part in parts:
        for name, entry in part.tensors.items():
            entries[name].append(entry)
    tensors = {}
    for name, found in entries.items():
        if len({(entry.dtype, entry.shape) for entry in found}) != 1:
            what = " and ".join(sorted({f"{entry.dtype} {list(entry.shape)}" for entry in found})) or "written by no rank"
            raise BrokenCheckpoint(f"{where}: {name} is {what}")
        boxes = sorted((box for entry in found for box in entry.boxes), key=lambda box: box.offset)
        tensors[name] = Entry(found[0].dtype, found[0].shape, tuple(boxes))
    files = {name: file for part in parts for name, file in part.files.items()}
    index = Index(step=step, tensors=tensors, files=files, empty=plan.empty, meta=meta)
    index.check_tiles(where)
    return index


def _piece(path: str, leaf: torch.Tensor) -> Piece:
    box, local = box_of(leaf), _local(leaf)
    if tuple(local.shape) != box.shape:
        raise ValueError(f"{path} holds {list(local.shape)} here, its placements say {list(box.shape)} of {list(leaf.shape)}")
    return Piece(path, local, tuple(leaf.shape), box.offset)


def _local(leaf: torch.Tensor) -> torch.Tensor:
    detached = leaf.detach()
    return detached.to_local() if isinstance(detached, DTensor) else leaf


def _check_storable(path: str, leaf: Any, ranks: Ranks) -> None:
    if isinstance(leaf, DTensor):
        mesh, at = leaf.device_mesh.mesh, leaf.device_mesh.get_coordinate()
        if at is None or int(mesh[tuple(at)]) != ranks.rank or int(mesh.max()) >= ranks.size:
            here = "not in it" if at is None else f"its rank {int(mesh[tuple(at)])}"
            raise ValueError(
                f"{path} is a DTensor on the ranks {mesh.flatten().tolist()}, this process is {here}, and saves as "
                f"rank {ranks.rank} of {ranks.size}; pass ranks=Ranks(rank, world size, store)"
            )
        try:
            box_of(leaf)
        except ValueError as error:
            raise ValueError(f"{path} is {error}") from None
        leaf = _local(leaf)
    plain = type(leaf) in (torch.Tensor, torch.nn.Parameter)
    if not plain or leaf.layout != torch.strided or leaf.is_meta:
        kind = f"Tensor ({leaf.layout}, {leaf.device})" if plain else type(leaf).__name__
        raise ValueError(f"{path} is a {kind}; a checkpoint holds dense tensors, other values go into meta")
    if leaf.dtype not in DTYPE_NAMES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise ValueError(f"{path} is {leaf.dtype}; a checkpoint holds {known}")
