"""Layouts of a state over ranks for the checkpoint tests: drawn by hypothesis, placed without process groups."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from helpers import same_bits
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from olmo_fn import tree as trees
from olmo_fn.checkpoint import Ranks, load
from olmo_fn.tree import Tree

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Pipeline stages of alike meshes; a leaf's placements, and the stages that hold it. None: a plain tensor."""

    stages: int
    mesh: tuple[int, ...]
    placements: dict[str, tuple[Placement, ...] | None]
    held_by: dict[str, frozenset[int]]

    @property
    def size(self) -> int:
        return self.stages * math.prod(self.mesh)

    def state(self, whole: Tree, rank: int, meta: bool = False) -> Tree:
        """What ``rank`` holds of the state; on the meta device, what it asks for."""
        stage, in_stage = divmod(rank, math.prod(self.mesh))
        ranks = stage * math.prod(self.mesh) + torch.arange(math.prod(self.mesh)).reshape(self.mesh)
        mesh = DeviceMesh("cpu", ranks, _init_backend=False, _rank=rank)
        assert mesh.get_coordinate() is not None, in_stage
        return trees.unflatten(
            (name, place(leaf, mesh, self.placements[name], "meta" if meta else "cpu"))
            for name, leaf in trees.items(whole)
            if stage in self.held_by[name]
        )


def place(leaf: Tensor, mesh: DeviceMesh, placements: tuple[Placement, ...] | None, device: str = "cpu") -> Tensor:
    """This rank's part of ``leaf`` as a DTensor, cut as torch says, not olmo_fn."""
    if placements is None:
        return leaf.to(device)
    shape, offset = compute_local_shape_and_global_offset(leaf.shape, mesh, placements)
    local = leaf[tuple(slice(i, i + n) for i, n in zip(offset, shape, strict=True))].to(device, copy=True)
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=leaf.shape, stride=leaf.contiguous().stride())


def together(size: int, job: Callable[[Ranks], T], timeout: float = 60.0) -> list[T | Exception]:
    """``job`` on ``size`` ranks, each a thread; what it returns or raises."""
    store = HashStore()

    def run(rank: int) -> T | Exception:
        try:
            return job(Ranks(rank, size, store, timeout))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def load_in(layout: Layout, whole: Tree, path: Path) -> None:
    """Load ``path`` as each rank of ``layout`` would, and compare with what it should hold."""
    for rank in range(layout.size):
        like = layout.state(whole, rank, meta=True)
        back, _ = load(path, like, select=[*trees.flatten(like)], threads=1)
        expected = trees.flatten(layout.state(whole, rank))
        assert trees.flatten(back).keys() == expected.keys()
        for name, leaf in trees.items(back):
            assert type(leaf) is type(expected[name])
            if isinstance(leaf, DTensor):
                assert (leaf.shape, leaf.placements) == (expected[name].shape, expected[name].placements)
                assert leaf.device_mesh == expected[name].device_mesh
                assert same_bits(leaf.to_local(), expected[name].to_local())
            else:
                assert same_bits(leaf, expected[name])


@st.composite
def wholes(draw: st.DrawFn) -> Tree:
    """States of a few tensors of odd sizes, empty and 0-d ones too, in all widths of numbers."""
    names = draw(st.lists(st.sampled_from(["a", "b.x", "b.y", "c.d.z", "step"]), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    result = {}
    for name in names:
        shape = draw(st.lists(st.integers(0, 7), max_size=3))
        dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.uint8]))
        raw = torch.randint(256, (math.prod(shape) * dtype.itemsize,), generator=generator, dtype=torch.uint8)
        result[name] = raw.view(dtype).reshape(shape)
    return trees.unflatten(result)


@st.composite
def layouts(draw: st.DrawFn, whole: Tree) -> Layout:
    """Any layout of ``whole`` on up to 8 ranks: dims sharded twice over too, leaves on some or all of the stages."""
    stages = draw(st.integers(1, 3))
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).filter(lambda n: stages * math.prod(n) <= 8)))
    placements: dict[str, tuple[Placement, ...] | None] = {}
    held_by = {}
    for name, leaf in trees.items(whole):
        each = st.sampled_from([Replicate(), *(Shard(dim) for dim in range(leaf.ndim))])
        placements[name] = draw(st.none() | st.tuples(*[each] * len(mesh)))
        held_by[name] = frozenset(draw(st.sets(st.integers(0, stages - 1), min_size=1)))
    return Layout(stages, mesh, placements, held_by)
