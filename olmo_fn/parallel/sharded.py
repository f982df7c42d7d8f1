"""Many processes: parameters and state live in shards, and come into use a segment at a time.

At rest a leaf is a DTensor. Inside a step it is this rank's shard, a plain tensor; a segment's shards are gathered in one
collective of bytes for each axis (matrices already in the compute dtype), and its gradients come back by one reduce-scatter in
fp32. What is sharded in use, over ``tp`` or an axis of experts, stays so: the stages know about it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metric, Metrics, wide
from olmo_fn.core.layout import (
    EXACT,
    Layout,
    Quantise,
    Reduction,
    Sharing,
    Weights,
    WeightsInUse,
    arrive,
    norms,
    one_launch,
)
from olmo_fn.mesh.axis import Axes, Axis, ReduceDtype
from olmo_fn.mesh.collectives import pmax, psum
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.parallel import buckets
from olmo_fn.parallel.gathered import Gathered
from olmo_fn.parallel.owners import MatrixOwners
from olmo_fn.parallel.sharded_placement import ShardedPlacement
from olmo_fn.tree import Tree

_c10d = torch.ops._c10d_functional
Rows = Literal["all", "own"]
"""What a rank is given of a batch: all of its rows, of which it takes its own; or only its own."""


def sharded(connection: Connection, specs: Tree, rules: Rules = DEFAULT, rows: Rows = "all") -> Layout:
    """The layout of ``specs`` over the ranks of ``connection``; ValueError, with the parameter's name, for senseless rules."""
    placement = ShardedPlacement(connection, specs, rules)
    sharing = RankSharing(axes_in_use(connection.axes, rules), rules.cp_method, placement, rows)
    return Layout(placement, ShardedWeights(placement), MatrixOwners(placement), sharing)


def axes_in_use(axes: Axes, rules: Rules) -> Axes:
    """The axes as the stages see them: with ``async_tp``, products overlap the collectives of ``tp``."""
    overlapped = rules.async_tp and axes.tp.size > 1
    return replace(axes, tp=replace(axes.tp, overlapped=True)) if overlapped else axes


@dataclass(frozen=True, eq=False)
class ShardedWeights(WeightsInUse):
    """Weights gathered for use, and gradients summed over the ranks that have other tokens."""

    placement: ShardedPlacement

    @property
    def ahead(self) -> int:
        """How many segments' weights are on their way while one computes."""
        return self.placement.rules.prefetch

    def fetch(
        self,
        params: Tree,
        paths: Iterable[str],
        dtype: torch.dtype,
        uncast: Collection[str] = (),
        quantise: Quantise = EXACT,
    ) -> Weights:
        """Begin to gather the subtrees at ``paths``; what travels is in ``dtype``, or quantised, in any case."""
        subtrees = {path: tree.at(params, path) for path in paths}
        gathers: dict[Axis, dict[str, buckets.Shard]] = {}
        for path in (path for top, part in subtrees.items() for path, _ in tree.items(part, top)):
            if (axis := self.placement.gather_axis(path)).size > 1 and path not in self.placement.rules.exchanged:
                gathers.setdefault(axis, {})[path] = self.placement.bucket_shard(path)
        if not gathers:
            return super().fetch(params, subtrees, dtype, uncast, quantise)
        return Gathered(subtrees, gathers, dtype, self.placement.rules.keep_gathered, quantise)

    def reduce(self, grads: dict[str, Tensor]) -> Reduction:
        """Begin to sum a segment's gradients over the ranks with other tokens; each rank keeps its shards.

        Gathered parameters' gradients are scattered, one collective for each axis; those of exchanged ones are sums over the
        axis already. Others stay sums over this rank's tokens: `finish` sums them all at once, or, where nothing is gathered
        anywhere, each segment's bucket is summed here.
        """
        place, groups = self.placement, dict[tuple[bool, Axis, tuple[Axis, ...]], list[str]]()
        for path in grads:
            axis, exchanged = place.gather_axis(path), path in place.rules.exchanged
            late = axis.size == 1 and place.axes.fsdp.size > 1
            sums = () if late else tuple(place.sum_axes(path))
            groups.setdefault((late, Axis() if exchanged else axis, sums), []).append(path)
        reductions = []
        for (_, axis, sums), paths in groups.items():
            part = {path: grads[path] for path in paths}
            if axis.size > 1:
                reductions.append(self._scatter(part, axis, sums))
            else:
                reductions.append(summing(part, sums, place.rules.reduce_dtype))
        return together(reductions)

    def _scatter(self, grads: dict[str, Tensor], axis: Axis, sums: Sequence[Axis]) -> Reduction:
        shards = [self.placement.bucket_shard(path) for path in grads]
        wire, wanted = dtypes_of(grads, self.placement.rules.reduce_dtype)
        reduced, paths = buckets.reduce_scatter([*grads.values()], shards, axis, wire), list(grads)

        def split(total: Tensor) -> dict[str, Tensor]:
            return dict(zip(paths, buckets.split(total.to(wanted), shards, axis), strict=True))

        return summed_further(reduced, sums, split)

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum, in one collective for each set of axes, gradients of parameters that are not gathered where others are."""
        if self.placement.axes.fsdp.size > 1:
            groups: dict[tuple[Axis, ...], dict[str, Tensor]] = {}
            for path, g in grads.items():
                if self.placement.gather_axis(path).size == 1:
                    groups.setdefault(tuple(self.placement.sum_axes(path)), {})[path] = g
            grads = {**grads, **arrive(together([summing(part, sums) for sums, part in groups.items()]))}
        return grads


@dataclass(frozen=True)
class RankSharing(Sharing):
    """Rows are shared over ``data``, positions over ``cp``; sums are over all ranks with different tokens, and stages."""

    placement: Any = None
    rows_given: Rows = "all"
    parts: int = 1
    """Micro-batches that a pipeline makes of this rank's rows."""

    @property
    def multiple(self) -> int:
        """The number of sequences in a batch must be a multiple of this: data-parallel ranks times micro-batches."""
        return self.axes.data.size * self.parts

    def rows(self, size: int, parts: int = 1) -> list[slice]:
        """This rank's rows of a batch of ``size`` sequences that is computed in ``parts``, a slice for each part."""
        self._check(size // parts)
        each, mine = size // parts, size // parts // self.axes.data.size
        starts = (i * each + self.axes.data.index * mine for i in range(parts))
        return [slice(start, start + mine) for start in starts]

    def count_tokens(self, batch: Batch) -> Tensor:
        """The labels that count in a batch, of all ranks' rows."""
        count = super().count_tokens(batch)
        return count if self.rows_given == "all" else psum(count, self.axes.data)

    def local_batch(self, batch: Batch) -> Batch:
        """This rank's rows of a batch, as a step is given it; ValueError if the ranks cannot share them evenly."""
        return self._cut(batch) if self.rows_given == "all" else batch

    def as_given(self, batch: Batch) -> Batch:
        """What a step wants to be given of a whole batch: all, or this rank's rows."""
        return self._cut(batch) if self.rows_given == "own" else batch

    def _cut(self, batch: Batch) -> Batch:
        axis = self.axes.data
        self._check(len(batch["labels"]))
        return {name: x.chunk(axis.size)[axis.index] if x.ndim else x for name, x in batch.items()}

    def _check(self, rows: int) -> None:
        if rows % self.axes.data.size:
            raise ValueError(f"{rows} sequences cannot be shared evenly by the {self.axes.data.size} data-parallel ranks")

    def total(self, sums: Metrics, declared: Mapping[str, Metric]) -> Metrics:
        """Sums and maxima over the tokens of this rank become those over all tokens, in one collective of each kind."""
        largest = {name for name in sums if name in declared and declared[name].how == "max"}
        found: Metrics = {}
        for names, reduce in (([n for n in sums if n not in largest], psum), (sorted(largest), pmax)):
            if names:
                dtype = torch.promote_types(sums[names[0]].dtype, torch.float32)
                flat = torch.cat([sums[name].reshape(-1).to(dtype) for name in names])
                flat = reduce(reduce(flat, self.axes.tokens), self.axes.pp)
                parts = flat.split([sums[name].numel() for name in names])
                found |= {name: part.view(sums[name].shape) for name, part in zip(names, parts, strict=True)}
        return {name: found[name] for name in sums}

    def norm(self, grads: Tree) -> Tensor:
        """√ of the sum of squares of all entries: local sums, each divided by how many ranks have it, one collective."""
        leaves = list(tree.items(grads))
        if one_launch([g for _, g in leaves]):
            shared: dict[int, list[Tensor]] = {}
            for path, g in leaves:
                shared.setdefault(self.placement.copies(path), []).append(g)
            squares = [norms(some).double().square().sum() / copies for copies, some in shared.items()]
        else:
            squares = [torch.linalg.vector_norm(g).double().square() / self.placement.copies(path) for path, g in leaves]
        total = psum(torch.stack(squares).sum(), self.axes.world).sqrt()
        return total.to(torch.promote_types(leaves[0][1].dtype, torch.float32))


def summing(grads: Mapping[str, Tensor], axes: Sequence[Axis], dtype: ReduceDtype = "float32") -> Reduction:
    """Begin to sum tensors over axes, in one collective for each; the sums are in at least fp32."""
    first, *others = [axis for axis in axes if axis.size > 1] or [Axis()]
    wire, wanted = dtypes_of(grads, dtype)
    if first.size == 1:
        return lambda: {path: g.to(wanted) for path, g in grads.items()}
    shapes = {path: g.shape for path, g in grads.items()}
    flat = torch.cat([g.reshape(-1).to(wire) for g in grads.values()])

    def split(total: Tensor) -> dict[str, Tensor]:
        parts = total.to(wanted).split([shape.numel() for shape in shapes.values()])
        return {path: part.view(shape) for (path, shape), part in zip(shapes.items(), parts, strict=True)}

    return summed_further(_c10d.all_reduce(flat, "sum", first.group), others, split)


def dtypes_of(grads: Mapping[str, Tensor], reduce_dtype: ReduceDtype) -> tuple[torch.dtype, torch.dtype]:
    """In what gradients travel, and in what they are wanted."""
    wanted = wide(next(iter(grads.values()))[:0]).dtype if grads else torch.float32
    return torch.bfloat16 if reduce_dtype == "bfloat16" else wanted, wanted


def summed_further(begun: Tensor, axes: Sequence[Axis], split: Callable[[Tensor], dict[str, Tensor]]) -> Reduction:
    """What a collective gives, summed over further axes: each sum begins when the result before it has been waited for."""

    def go_on() -> dict[str, Tensor] | Reduction:
        total = _c10d.wait_tensor(begun)
        if not axes:
            return split(total)
        return summed_further(_c10d.all_reduce(total, "sum", axes[0].group), axes[1:], split)

    return go_on


def together(reductions: Sequence[Reduction]) -> Reduction:
    """Several reductions as one, which go on at the same time."""

    def go_on() -> dict[str, Tensor] | Reduction:
        found = [reduction() for reduction in reductions]
        grads = {path: g for part in found if isinstance(part, dict) for path, g in part.items()}
        later = [reduction for reduction in found if not isinstance(reduction, dict)]
        return together([lambda: grads, *later]) if later else grads

    return go_on
