"""Many processes: parameters and state live in shards, and come into use a segment at a time.

At rest a leaf is a DTensor. Inside a step it is this rank's shard, a plain tensor; a segment's shards are gathered in one
collective of bytes for each axis (matrices already in the compute dtype), and its gradients come back by one reduce-scatter in
fp32. What is sharded in use, over ``tp`` or an axis of experts, stays so: the stages know about it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metric, Metrics, wide
from olmo_fn.core.check import check_shapes, check_tensors
from olmo_fn.core.layout import (
    EXACT,
    Layout,
    Owners,
    Placement,
    Quantise,
    Reduction,
    Sharing,
    Weights,
    WeightsInUse,
    arrive,
    norms,
    one_launch,
)
from olmo_fn.core.update import same_memory
from olmo_fn.mesh.axis import Axes, Axis, ReduceDtype, chunk
from olmo_fn.mesh.collectives import pmax, psum
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.placement import DEFAULT, Placed, Rules, placements
from olmo_fn.parallel import buckets
from olmo_fn.parallel.gathered import Gathered
from olmo_fn.parallel.owners import gather_from_owners, scatter_to_owners
from olmo_fn.spec import Box, Spec, init_leaf
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
class ShardedPlacement(Placement):
    """Where this rank's shards of ``specs`` lie; of a pipeline's stages, it has those of ``local_specs``."""

    connection: Connection
    specs: Tree = field(repr=False)
    rules: Rules = DEFAULT
    local_specs: Tree = field(default_factory=dict, repr=False)
    sharers: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Pipeline stages that have a parameter, where it is more than one (tied weights)."""

    def __post_init__(self) -> None:
        _ = self.placed  # refuses what makes no sense, by name
        if not self.local_specs:
            object.__setattr__(self, "local_specs", self.specs)

    @cached_property
    def placed(self) -> dict[str, Placed]:
        """How each parameter lies on the mesh."""
        return placements(self.specs, self.rules, self.connection.mesh)

    @property
    def axes(self) -> Axes:
        """This rank's axes."""
        return self.connection.axes

    def axis(self, name: str) -> Axis:
        """The axis of this name."""
        axis: Axis = getattr(self.axes, name)
        return axis

    def init(self, seed: int, dtype: torch.dtype = torch.float32) -> Tree:
        """Initial parameters as DTensors; each rank makes only its own shards, with the bits of `olmo_fn.spec.init`."""
        return self.make(lambda path, spec, box: init_leaf(spec, seed, path, box).to(dtype))

    def make(self, part: Callable[[str, Spec, Box], Tensor]) -> Tree:
        """Parameters as DTensors, of this rank's parts: ``part(path, spec, box)`` gives the ``box`` of a parameter."""
        device = self.connection.device_mesh.device_type

        def leaf(path: str, spec: Spec) -> DTensor:
            return self.store(path, part(path, spec, self.box(path)).to(device))

        return tree.map_with_path(leaf, self.local_specs)

    def shard(self, params: Tree) -> Tree:
        """Parameters as DTensors; of whole ones, equal on all ranks, each rank keeps its shards."""
        check_tensors(params)
        check_shapes(params, tree.flatten(self.specs), tree.flatten(self.local_specs))

        def leaf(path: str, spec: Any) -> Tensor:
            p = tree.at(params, path)
            return p if isinstance(p, DTensor) else self.store(path, self.local_shard(path, p))

        return tree.map_with_path(leaf, self.local_specs)

    def store(self, path: str, local: Tensor) -> DTensor:
        """This rank's shard of something shaped like the parameter at ``path``, as a DTensor."""
        place = self.placed[path]
        mesh = self.connection.device_meshes[place.at_rest]
        dims = [place.dim(axis) for axis in place.at_rest]
        sharding = [Replicate() if dim is None else ShardPlacement(dim) for dim in dims]
        stride = torch.empty(place.shape, device="meta").stride()
        return DTensor.from_local(local, mesh, sharding, run_check=False, shape=torch.Size(place.shape), stride=stride)

    def to_local(self, stored: Tree) -> Tree:
        """This rank's shards, plain tensors: what ``DTensor.to_local`` gives without autograd, in a fraction of its time."""

        def local(leaf: Any) -> Any:
            if not isinstance(leaf, DTensor):
                return leaf
            return leaf.to_local() if leaf.requires_grad else leaf._local_tensor

        return tree.map(local, stored)

    def to_stored(self, local: Tree, like: Tree) -> Tree:
        """DTensors where ``like`` has them, placed alike; those of ``like`` themselves where a step wrote into their memory."""

        def wrap(leaf: Tensor, old: Any) -> Tensor:
            if not isinstance(old, DTensor):
                return leaf
            if same_memory(leaf, old._local_tensor):  # to make one anew takes tens of µs
                return old
            shape, stride = old.shape, old.stride()
            return DTensor.from_local(leaf, old.device_mesh, old.placements, run_check=False, shape=shape, stride=stride)

        return tree.map(wrap, local, like)

    def full_tensor(self, path: str, local: Tensor) -> Tensor:
        """A tensor shaped like a parameter, of which this rank has a shard, gathered over all axes."""
        place = self.placed[path]
        return local.new_empty(place.shape) if local.is_meta else self.over(path, local, [axis for axis, _ in place.dims])

    def over(self, path: str, local: Tensor, axes: Sequence[str]) -> Tensor:
        """A shard gathered over some of the axes that shard it."""
        place = self.placed[path]
        for name in reversed(axes):
            axis, dim = self.axis(name), place.dim(name)
            if dim is not None and axis.size > 1:
                shape = (*local.shape[:dim], place.shape[dim], *local.shape[dim + 1 :])
                shard, out = buckets.Shard(shape, dim), local.new_empty(shape)
                buckets.unpack(buckets.all_gather([local], [shard], axis), [out], [shard], axis)
                local = out
        return local

    def local_shard(self, path: str, full: Tensor) -> Tensor:
        """This rank's shard of a whole tensor."""
        for dim, (start, length) in enumerate(zip(*self.box(path), strict=True)):
            full = full.narrow(dim, start, length)
        return full.clone(memory_format=torch.contiguous_format)  # not a view, which would keep the whole

    def entries(self, path: str, local: Tensor) -> Tensor:
        """The number of each entry of a local shard in the whole parameter, row after row: an int64 tensor shaped like it."""
        return self.box(path).entries(self.placed[path].shape, local.device)

    def box(self, path: str, gathered: Collection[str] = ()) -> Box:
        """Offset and shape of this rank's shard, or of that once it is gathered over some axes."""
        place = self.placed[path]
        where = {name: (0, 1) if name in gathered else (self.axis(name).index, self.axis(name).size) for name, _ in place.dims}
        return place.box(where)

    def gather_axis(self, path: str) -> Axis:
        """The axis over which a parameter is gathered for use; one of size 1 if it is not."""
        names = [name for name in self.placed[path].gathered if self.axis(name).size > 1]
        assert len(names) <= 1, f"{path} is gathered over {names}"
        return self.axis(names[0]) if names else Axis()

    def bucket_shard(self, path: str) -> buckets.Shard:
        """A gathered parameter as buckets see it: whole but for what is sharded in use."""
        place = self.placed[path]
        name = self.gather_axis(path).name
        dim = place.dim(name)
        assert dim is not None, f"{path} is not gathered"
        return buckets.Shard(self.box(path, [name])[1], dim)

    def sum_axes(self, path: str) -> list[Axis]:
        """The axes over which a gradient is summed that is not scattered: flattened to one where there is such an axis."""
        names = tuple(name for name in self.placed[path].summed if self.axis(name).size > 1)
        everything = tuple(name for name in ("dp_replicate", "dp_shard", "cp") if self.axis(name).size > 1)
        return [self.axes.tokens] if names == everything and len(names) > 1 else [self.axis(name) for name in names]

    def copies(self, path: str) -> int:
        """How many ranks have the same shard of the parameter."""
        return self.placed[path].copies(self.connection.mesh) * self.sharers.get(path, 1)


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
