"""Where this rank's shards of parameters and state lie, at rest and in use, and what is whole of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as ShardPlacement

from olmo_fn import tree
from olmo_fn.core.check import check_shapes, check_tensors
from olmo_fn.core.layout import Placement
from olmo_fn.core.update import same_memory
from olmo_fn.mesh.axis import Axes, Axis
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import FLATTENED, members
from olmo_fn.mesh.placement import DEFAULT, TOKENS, Placed, Rules, placements
from olmo_fn.parallel import buckets
from olmo_fn.spec import Box, Spec, init_leaf
from olmo_fn.tree import Tree


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
        """The axes over which a gradient is summed that is not scattered: several as one where there is such an axis."""
        names = {name for name in self.placed[path].summed if self.axis(name).size > 1}
        found: list[Axis] = []
        for axis in sorted(FLATTENED, key=lambda axis: -len(FLATTENED[axis])):
            there = {part for part in members(axis) if self.axis(part).size > 1}
            if len(there) > 1 and there <= names and {*members(axis)} <= {*TOKENS}:
                found.append(self.axis(axis))
                names -= there
        whole = {"dp_outer": "dp_shard"} if self.axes.ep.size == 1 else {}
        return found + [self.axis(whole.get(name, name)) for name in TOKENS if name in names]

    def copies(self, path: str) -> int:
        """How many ranks have the same shard of the parameter."""
        return self.placed[path].copies(self.connection.mesh) * self.sharers.get(path, 1)
