"""The weights of a segment in use: whole for as long as they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.layout import EXACT, Quantise, compute_copy
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import gather_each
from olmo_fn.parallel import buckets
from olmo_fn.parallel.buckets import Shard
from olmo_fn.tree import Tree

SCALES = " scales"  # behind a path: the scales of the parameter, which travel with its entries where it is quantised


class Gathered:
    """The weights of one segment: gathered, freed when the forward sweep has passed, gathered again for the backward one.

    Freeing gives back the storage and keeps the tensors: what autograd saved for backward are these, or views of them, so that
    they hold the values again once `refetch` has refilled the storage. The tape thus never owns a gathered weight.

    Even rows of matrices arrive straight in their place, everything else in a bucket, out of which it is copied.

    ``subtrees`` are local shards by path; ``gathers`` says over which axis which of their leaves are gathered; what arrives is
    in ``dtype``, or what ``quantise`` makes of it. ``keep``: `free` frees nothing.
    """

    def __init__(
        self,
        subtrees: Mapping[str, Tree],
        gathers: Mapping[Axis, Mapping[str, Shard]],
        dtype: torch.dtype,
        keep: bool,
        quantise: Quantise = EXACT,
    ) -> None:
        self.keep, self.dtype, self.subtrees, self.quantise = keep, dtype, subtrees, quantise
        self.local = {path: leaf for top, subtree in subtrees.items() for path, leaf in tree.items(subtree, top)}
        self.gathers = {axis: self._with_scales(shards, axis.size) for axis, shards in gathers.items()}
        self.outs: dict[str, Tensor] = {}
        self.tensors: dict[str, Tree] = {}
        self.pending: list[Callable[[], None]] = []
        self.refetch()

    def refetch(self) -> None:
        """Begin to gather, unless the weights are there."""
        if not self.pending and not self._arrived():
            self.pending = [self._gather(axis, shards) for axis, shards in self.gathers.items()]

    def _gather(self, axis: Axis, shards: Mapping[str, Shard]) -> Callable[[], None]:
        """Begin to gather over one axis; the result waits until all is in its place."""
        parts = self._parts(shards)
        placed = [path for path, shard in shards.items() if shard.in_place(axis.size) and not path.endswith(SCALES)]
        rest = {path: shard for path, shard in shards.items() if path not in placed}
        outs = [self._whole(path, shards[path]) for path in placed]
        xs = [parts[path] if path in self.quantise.forms else compute_copy(parts[path], self.dtype) for path in placed]
        if rest:
            dtypes = [self._dtype(path) for path in rest]
            xs.append(buckets.pack([parts[path] for path in rest], [*rest.values()], axis.size, dtypes))
            outs.append(xs[-1].new_empty(axis.size * len(xs[-1])))
        del parts
        unseen = self._unseen(placed)  # from here on: gloo's threads count the writes when they like
        with torch.no_grad():
            wait = gather_each(outs, xs, axis)
        bucket = outs.pop() if rest else None

        def arrive() -> None:
            with torch.no_grad(), unseen:
                wait()
            if bucket is not None:
                wholes = [self._whole(path, shard) for path, shard in rest.items()]
                with torch.no_grad(), self._unseen(rest):
                    buckets.unpack(bucket, wholes, [*rest.values()], axis)

        return arrive

    def ready(self) -> dict[str, Tree]:
        """Wait for the gathers; the tensors are the same ones each time."""
        while self.pending:
            self.pending.pop(0)()
        if not self.tensors:
            self.tensors = {top: tree.map_with_path(self._leaf, subtree, prefix=top) for top, subtree in self.subtrees.items()}
        return self.tensors

    def free(self) -> None:
        """Give the memory of the whole weights back, unless the rules keep them gathered."""
        if not self.keep:
            for out in self.outs.values():
                out.untyped_storage().resize_(0)

    def _arrived(self) -> bool:
        return bool(self.tensors) and all(out.untyped_storage().size() for out in self.outs.values() if out.numel())

    def _with_scales(self, shards: Mapping[str, Shard], n: int) -> dict[str, Shard]:
        """What travels. ValueError for a parameter whose parts cannot be quantised each by itself."""
        found: dict[str, Shard] = {}
        for path, shard in shards.items():
            found[path] = shard
            if form := self.quantise.forms.get(path):
                form.check_part(path, shard.dim, shard.chunk(n)[shard.dim])
                found[path + SCALES] = Shard(form.scale_shape(shard.shape), shard.dim)
        return found

    def _parts(self, paths: Iterable[str]) -> dict[str, Tensor]:
        """This rank's parts of what travels: as they are stored, or quantised."""
        found: dict[str, Tensor] = {}
        for path in paths:
            if path in self.quantise.forms:
                found[path], found[path + SCALES] = self.quantise.parts(path, self.local[path])
            elif not path.endswith(SCALES):
                found[path] = self.local[path]
        return found

    def _dtype(self, path: str) -> torch.dtype:
        """In what something travels."""
        if path.endswith(SCALES):
            return torch.float32
        return torch.uint8 if path in self.quantise.forms else compute_copy(self.local[path][:0], self.dtype).dtype

    def _whole(self, path: str, shard: Shard) -> Tensor:
        """The whole weight, with memory and without values."""
        if path not in self.outs:
            self.outs[path] = self.local[path.removesuffix(SCALES)].new_empty(shard.shape, dtype=self._dtype(path))
        out = self.outs[path]
        out.untyped_storage().resize_(out.numel() * out.element_size())
        return out

    def _leaf(self, path: str, p: Tensor) -> Any:
        if path + SCALES in self.outs:
            return self.quantise.whole(path, self.outs[path], self.outs[path + SCALES])
        return self.outs[path] if path in self.outs else self.quantise(path, p) or compute_copy(p, self.dtype)

    def _unseen(self, paths: Iterable[str]) -> AbstractContextManager[None]:
        """Once it is left, autograd has not noticed that these weights were written: they hold the same values again."""
        return torch.autograd._unsafe_preserve_version_counter(tuple(self.outs[path] for path in paths))
