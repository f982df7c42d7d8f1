"""Many processes: parameters and state live in shards, and come into use a segment at a time.

At rest a leaf is a DTensor on the device mesh (dp_replicate, fsdp, tp). Inside a step it is this rank's part, a plain
tensor; a segment's parts are gathered over ``fsdp`` in one collective of bytes (matrices already in the compute dtype), and its
gradients come back by one reduce-scatter in fp32. Sharding over ``tp`` stays in use, where the stages know about it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Chain, Metrics
from olmo_fn.core.layout import Single, Weights, compute_copy, wide
from olmo_fn.mesh.axis import Axes, Axis, chunk
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import flag
from olmo_fn.mesh.placement import DEFAULT, Placed, Rules, plan
from olmo_fn.parallel import buckets as bucket
from olmo_fn.parallel.owners import collect, deal
from olmo_fn.spec import Box, init_leaf
from olmo_fn.tree import Tree

_c10d = torch.ops._c10d_functional


@dataclass(frozen=True, eq=False)
class Sharded(Single):
    """A layout over the ranks of ``connection``, for the parameters ``specs`` by ``rules``."""

    connection: Connection
    specs: Tree = field(repr=False)
    rules: Rules = DEFAULT

    def __post_init__(self) -> None:
        assert self.axes.pp.size == 1, "stages on other ranks: that is `olmo_fn.parallel.pipeline.pipelined.Pipelined`"
        _ = self.placed  # refuses what makes no sense, by name

    @cached_property
    def placed(self) -> dict[str, Placed]:
        """How each parameter lies on the mesh."""
        return plan(self.specs, self.rules, self.connection.mesh)

    @property
    def own_specs(self) -> Tree:
        """The parameters that this rank has a part of."""
        return self.specs

    @property
    def shares(self) -> int:  # type: ignore[override]
        """Sequences of a batch must be a multiple of this: the data-parallel ranks."""
        return self.axes.data.size

    @property
    def axes(self) -> Axes:
        """This rank's axes."""
        return self.connection.axes

    # --- state ----------------------------------------------------------------------------------------------------------

    def init(self, seed: int, dtype: torch.dtype = torch.float32) -> Tree:
        """Initial parameters as DTensors; each rank makes only its own parts, with the bits of `olmo_fn.spec.init`."""
        device = self.connection.device_mesh.device_type

        def leaf(path: str, spec: Any) -> DTensor:
            part = init_leaf(spec, seed, path, self.box(path)).to(device=device, dtype=dtype)
            return self.place(path, part)

        return tree.map_with_path(leaf, self.own_specs)

    def adopt(self, params: Tree) -> Tree:
        """Parameters as DTensors; of whole ones, equal on all ranks, each rank keeps its parts."""

        def leaf(path: str, spec: Any) -> Tensor:
            p = tree.at(params, path)
            return p if isinstance(p, DTensor) else self.place(path, self.own(path, p))

        return tree.map_with_path(leaf, self.own_specs)

    def place(self, path: str, part: Tensor) -> DTensor:
        """This rank's part of something shaped like the parameter at ``path``, as a DTensor."""
        place, mesh = self.placed[path], self.connection.device_mesh
        dims = (None, place.fsdp, place.tp)
        placements: list[Placement] = [Replicate() if dim is None else ShardPlacement(dim) for dim in dims]
        stride = torch.empty(place.shape, device="meta").stride()
        return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(place.shape), stride=stride)

    def enter(self, leaves: Tree) -> Tree:
        """The state's leaves as a step works on them: this rank's parts, plain tensors."""
        return tree.map(lambda leaf: leaf.to_local() if isinstance(leaf, DTensor) else leaf, leaves)

    def leave(self, leaves: Tree, like: Tree) -> Tree:
        """The inverse of `enter`; what has the shape of a parameter's part is placed like ``like``."""

        def wrap(leaf: Tensor, old: Any) -> Tensor:
            if not isinstance(old, DTensor):
                return leaf
            shape, stride = old.shape, old.stride()
            return DTensor.from_local(leaf, old.device_mesh, old.placements, run_check=False, shape=shape, stride=stride)

        return tree.map(wrap, leaves, like)

    def rounds(self, paths: Iterable[str]) -> Iterable[tuple[str, ...]]:
        """As many as ``fsdp`` has ranks to a round, of those that it shards; each of the others is everybody's."""
        dealt, n = [path for path in paths if self.is_dealt(path)], self.axes.fsdp.size
        yield from ((path,) for path in paths if not self.is_dealt(path))
        yield from (tuple(dealt[i : i + n]) for i in range(0, len(dealt), n))

    def deal(self, parts: Mapping[str, Sequence[Tensor]]) -> tuple[str, list[Tensor]] | None:
        """This rank's parameter of a round, whole: one exchange over ``fsdp``."""
        index, paths = self.axes.fsdp.index, list(parts)
        if not self.is_dealt(paths[0]):
            return paths[0], [self.whole(paths[0], part) for part in parts[paths[0]]]
        mine = deal([*parts.values()], [[self.shard(path)] * len(parts[path]) for path in paths], self.axes.fsdp)
        return None if mine is None else (paths[index], [self.over_tp(paths[index], part) for part in mine])

    def collect(
        self, mine: Sequence[Tensor] | None, like: Mapping[str, Sequence[tuple[Tensor, bool]]]
    ) -> dict[str, list[Tensor]]:
        """This rank's parts of what all have updated: one exchange over ``fsdp``."""
        paths = list(like)
        if not self.is_dealt(paths[0]):
            assert mine is not None
            kinds = (shaped for _, shaped in like[paths[0]])
            return {paths[0]: [self.own(paths[0], x) if s else x for x, s in zip(mine, kinds, strict=True)]}
        shards = [[self.shard(path) if shaped else None for _, shaped in like[path]] for path in paths]
        if mine is not None:
            path = paths[self.axes.fsdp.index]
            kinds = (shaped for _, shaped in like[path])
            mine = [self._tp_part(path, x) if s else x for x, s in zip(mine, kinds, strict=True)]
        found = collect(mine, [[x for x, _ in like[path]] for path in paths], shards, self.axes.fsdp)
        return dict(zip(paths, found, strict=True))

    def is_dealt(self, path: str) -> bool:
        """Whether one rank of ``fsdp`` updates the parameter, where it must be whole."""
        return self.placed[path].fsdp is not None and self.axes.fsdp.size > 1

    def whole(self, path: str, part: Tensor) -> Tensor:
        """A tensor shaped like a parameter, of which this rank has ``part``, whole."""
        place = self.placed[path]
        if part.is_meta:
            return part.new_empty(place.shape)
        part = self.over_tp(path, part)
        return _gathered(part, place.shape, place.fsdp, self.axes.fsdp)

    def over_tp(self, path: str, part: Tensor) -> Tensor:
        """A tensor shaped like a parameter, of which this rank has the ``part`` along ``tp``, whole."""
        place = self.placed[path]
        return _gathered(part, place.shape, place.tp, self.axes.tp)

    def _tp_part(self, path: str, whole: Tensor) -> Tensor:
        dim, tp = self.placed[path].tp, self.axes.tp
        return whole if dim is None else whole.narrow(dim, *chunk(whole.shape[dim], tp.index, tp.size))

    def own(self, path: str, whole: Tensor) -> Tensor:
        """The inverse of `whole`: this rank's part."""
        offset, shape = self.box(path)
        for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
            whole = whole.narrow(dim, start, length)
        return whole.clone(memory_format=torch.contiguous_format)  # not a view, which would keep the whole

    def box(self, path: str) -> Box:
        """Offset and shape of this rank's part."""
        fsdp, tp = self.axes.fsdp, self.axes.tp
        return self.placed[path].box((fsdp.index, fsdp.size), (tp.index, tp.size))

    # --- into use and back ----------------------------------------------------------------------------------------------

    def chain(self, chain: Chain) -> Chain:
        """The chain as this rank computes it: with collectives inside its stages. ValueError if it cannot be divided so."""
        on = getattr(chain, "on", None)  # a plain loss has none
        for axis in (self.axes.tp, self.axes.cp):
            if on is None and axis.size > 1:
                raise ValueError(
                    f"{flag(axis.name)} is {axis.size}, but the loss is not written for it; give a Chain with `on`, "
                    "or use data parallelism only"
                )
        return chain if on is None else on(replace(self.axes, cp_method=self.rules.cp_method))

    def part(self, batch: Batch) -> Batch:
        """This rank's sequences; their loss is still divided by the tokens of all."""
        axis = self.axes.data
        rows = len(batch["labels"])
        if rows % axis.size:
            raise ValueError(f"{rows} sequences cannot be shared evenly by the {axis.size} data-parallel ranks")
        return {name: x.chunk(axis.size)[axis.index] if x.ndim else x for name, x in batch.items()}

    def fetch(self, params: Tree, paths: Iterable[str], dtype: torch.dtype, stored: Collection[str] = ()) -> Weights:
        """Begin to gather the subtrees at ``paths``; what travels is in ``dtype`` in any case."""
        subtrees = {path: tree.at(params, path) for path in paths}
        sharded = (self.placed[path].fsdp is not None for top, part in subtrees.items() for path, _ in tree.items(part, top))
        if self.axes.fsdp.size == 1 or not any(sharded):
            return super().fetch(params, subtrees, dtype, stored)
        return Gathered(self, subtrees, dtype)

    def reduce(self, grads: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begin to sum a segment's gradients over the ranks with other tokens; each rank keeps its shards.

        What is not sharded over ``fsdp`` stays a sum over this rank's tokens: `finish` does all of that at once, or, where
        nothing is sharded, each segment's bucket is summed here.
        """
        fsdp, replicas = self.axes.fsdp, self.axes.dp_replicate
        scattered = {p: g for p, g in grads.items() if fsdp.size > 1 and self.placed[p].fsdp is not None}
        kept = {p: wide(g) for p, g in grads.items() if p not in scattered}
        if not scattered:
            if fsdp.size > 1 or not kept:
                return lambda: kept
            return summing(kept, replicas)
        shards = [self.shard(path) for path in scattered]
        reduced = bucket.reduce_scatter([*scattered.values()], shards, fsdp, wide(next(iter(scattered.values()))[:0]).dtype)

        def end() -> dict[str, Tensor]:
            ours = psum(_c10d.wait_tensor(reduced), replicas)
            return {**kept, **dict(zip(scattered, bucket.split(ours, shards, fsdp), strict=True))}

        return end

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum, in one collective, gradients of parameters that are whole on the ranks of ``fsdp``."""
        if self.axes.fsdp.size == 1:
            return grads
        kept = {path: g for path, g in grads.items() if self.placed[path].fsdp is None}
        return {**grads, **summing(kept, self.axes.tokens)()} if kept else grads

    def total(self, sums: Metrics) -> Metrics:
        """Sums over the tokens of this rank become sums over all tokens, in one collective."""
        dtype = torch.promote_types(next(iter(sums.values())).dtype, torch.float32)
        values = psum(psum(torch.stack([value.to(dtype) for value in sums.values()]), self.axes.tokens), self.axes.pp)
        return dict(zip(sums, values.unbind(), strict=True))

    def norm(self, grads: Tree) -> Tensor:
        """√ of the sum of squares of all entries: local sums, each divided by how many ranks have it, one collective."""
        squares = [torch.linalg.vector_norm(g).double().square() / self.copies(path) for path, g in tree.items(grads)]
        total = psum(torch.stack(squares).sum(), self.axes.world).sqrt()
        return total.to(torch.promote_types(next(g for _, g in tree.items(grads)).dtype, torch.float32))

    def copies(self, path: str) -> int:
        """How many ranks have the same part of the parameter."""
        place, axes = self.placed[path], self.axes
        whole = (axis.size for axis, dim in ((axes.fsdp, place.fsdp), (axes.tp, place.tp)) if dim is None)
        return axes.dp_replicate.size * prod(whole)

    def shard(self, path: str) -> bucket.Shard:
        """A parameter as the buckets over ``fsdp`` see it: whole but for what ``tp`` shards."""
        place, tp = self.placed[path], self.axes.tp
        _, shape = place.box((0, 1), (tp.index, tp.size))
        assert place.fsdp is not None
        return bucket.Shard(shape, place.fsdp)


def _gathered(part: Tensor, shape: tuple[int, ...], dim: int | None, axis: Axis) -> Tensor:
    """A tensor whole along ``dim``, which ``axis`` shards."""
    if dim is None or axis.size == 1:
        return part
    whole = (*part.shape[:dim], shape[dim], *part.shape[dim + 1 :])
    shard, out = bucket.Shard(whole, dim), part.new_empty(whole)
    bucket.unpack(bucket.all_gather([part], [shard], axis), [out], [shard], axis)
    return out


def summing(grads: Mapping[str, Tensor], axis: Axis) -> Callable[[], dict[str, Tensor]]:
    """Begin to sum tensors over an axis in one collective."""
    if axis.size == 1:
        return lambda: dict(grads)
    flat = _c10d.all_reduce(torch.cat([g.reshape(-1) for g in grads.values()]), "sum", axis.group)

    def end() -> dict[str, Tensor]:
        parts = _c10d.wait_tensor(flat).split([g.numel() for g in grads.values()])
        return {path: part.view(g.shape) for (path, g), part in zip(grads.items(), parts, strict=True)}

    return end


class Gathered:
    """The weights of one segment: gathered, freed when the forward sweep has passed, gathered again for the backward one.

    Freeing gives back the storage and keeps the tensors: what autograd saved for backward are these, or views of them, so that
    they hold the values again once `again` has refilled the storage. The tape thus never owns a gathered weight.
    """

    def __init__(self, layout: Sharded, subtrees: Mapping[str, Tree], dtype: torch.dtype) -> None:
        self.layout, self.dtype, self.subtrees = layout, dtype, subtrees
        self.paths = [
            path
            for top, subtree in subtrees.items()
            for path, _ in tree.items(subtree, top)
            if layout.placed[path].fsdp is not None
        ]
        self.shards = [layout.shard(path) for path in self.paths]
        self.outs: list[Tensor] = []
        self.tensors: dict[str, Tree] = {}
        self.pending: Tensor | None = None
        self.again()

    def again(self) -> None:
        """Begin to gather, unless the weights are there."""
        if self.pending is None and not self._there():
            flat = {path: leaf for top, subtree in self.subtrees.items() for path, leaf in tree.items(subtree, top)}
            parts = [compute_copy(flat[path], self.dtype) for path in self.paths]
            self.pending = bucket.all_gather(parts, self.shards, self.layout.axes.fsdp)

    def ready(self) -> dict[str, Tree]:
        """Wait for the gather; the tensors are the same ones each time."""
        if self.pending is not None:
            if not self.tensors:
                self._allocate()
            for out in self.outs:
                out.untyped_storage().resize_(out.numel() * out.element_size())
            with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(tuple(self.outs)):
                bucket.unpack(self.pending, self.outs, self.shards, self.layout.axes.fsdp)
            self.pending = None
        return self.tensors

    def free(self) -> None:
        """Give the memory of the whole weights back, unless the rules keep them gathered."""
        if not self.layout.rules.keep_gathered:
            for out in self.outs:
                out.untyped_storage().resize_(0)

    def _there(self) -> bool:
        return bool(self.tensors) and all(out.untyped_storage().size() for out in self.outs if out.numel())

    def _allocate(self) -> None:
        gathered: dict[str, Tensor] = {}
        flat = {path: leaf for top, subtree in self.subtrees.items() for path, leaf in tree.items(subtree, top)}
        for path, shard in zip(self.paths, self.shards, strict=True):
            like = compute_copy(flat[path][:0], self.dtype)
            gathered[path] = like.new_empty(shard.shape)
        self.outs = list(gathered.values())

        def leaf(path: str, p: Tensor) -> Tensor:
            return gathered[path] if path in gathered else compute_copy(p, self.dtype)

        for top, subtree in self.subtrees.items():
            flat_subtree = {path: leaf(path, p) for path, p in tree.items(subtree, top)}
            self.tensors[top] = _rebuild(subtree, top, flat_subtree)


def _rebuild(subtree: Tree, top: str, flat: Mapping[str, Tensor]) -> Tree:
    """A tree of the shape of ``subtree`` with the leaves of ``flat``."""
    if not isinstance(subtree, Mapping):
        return flat[top]
    return {key: _rebuild(value, f"{top}.{key}", flat) for key, value in subtree.items()}
