"""The weights of a segment in use: whole for as long as they are needed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.layout import EXACT, Quantise, compute_copy
from olmo_fn.mesh.axis import Axis
from olmo_fn.parallel import buckets
from olmo_fn.parallel.buckets import Shard
from olmo_fn.tree import Tree

SCALES = " scales"  # behind a path: the scales of the parameter, which travel with its entries where it is quantised


class Gathered:
    """The weights of one segment: gathered, freed when the forward sweep has passed, gathered again for the backward one.

    Freeing gives back the storage and keeps the tensors: what autograd saved for backward are these, or views of them, so that
    they hold the values again once `refetch` has refilled the storage. The tape thus never owns a gathered weight.

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
        with_scales = {axis: self._with_scales(shards, axis.size) for axis, shards in gathers.items()}
        self.groups = [(axis, [*shards], [*shards.values()]) for axis, shards in with_scales.items()]
        self.outs: dict[str, Tensor] = {}
        self.tensors: dict[str, Tree] = {}
        self.pending: list[Tensor] = []
        self.refetch()

    def refetch(self) -> None:
        """Begin to gather, unless the weights are there."""
        if not self.pending and not self._arrived():
            for axis, paths, shards in self.groups:
                parts = self._copies(paths)
                self.pending.append(buckets.all_gather([parts[path] for path in paths], shards, axis))

    def ready(self) -> dict[str, Tree]:
        """Wait for the gathers; the tensors are the same ones each time."""
        if self.pending:
            if not self.tensors:
                self._allocate()
            for out in self.outs.values():
                out.untyped_storage().resize_(out.numel() * out.element_size())
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.outs.values())):
                for gathered, (axis, paths, shards) in zip(self.pending, self.groups, strict=True):
                    buckets.unpack(gathered, [self.outs[path] for path in paths], shards, axis)
            self.pending = []
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

    def _copies(self, paths: list[str]) -> dict[str, Tensor]:
        """This rank's parts of what travels, for the parameters among ``paths``."""
        found: dict[str, Tensor] = {}
        for path in paths:
            if path + SCALES in paths:
                entries, scales = self.quantise.parts(path, self.local[path])
                found |= {path: entries, path + SCALES: scales}
            elif path in self.local:
                found[path] = compute_copy(self.local[path], self.dtype)
        return found

    def _allocate(self) -> None:
        for _, paths, shards in self.groups:
            for path, shard in zip(paths, shards, strict=True):
                dtype = torch.uint8 if path + SCALES in paths else torch.float32 if path.endswith(SCALES) else None
                like = compute_copy(self.local[path.removesuffix(SCALES)][:0], self.dtype)
                self.outs[path] = like.new_empty(shard.shape, dtype=dtype)

        def leaf(path: str, p: Tensor) -> Any:
            if path + SCALES in self.outs:
                return self.quantise.whole(path, self.outs[path], self.outs[path + SCALES])
            return self.outs[path] if path in self.outs else self.quantise(path, p) or compute_copy(p, self.dtype)

        self.tensors = {top: tree.map_with_path(leaf, subtree, prefix=top) for top, subtree in self.subtrees.items()}
