"""The mesh on paper, and connected: what every axis means, for every small mesh."""

from __future__ import annotations

import subprocess
import sys
from math import prod

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from strategies import finest, meshes
from torch.distributed.tensor import DTensor, Shard

from olmo_fn.mesh.axis import NAMES, SINGLE_DEVICE, Axes
from olmo_fn.mesh.collectives import all_gather
from olmo_fn.mesh.mesh import AXES, FINEST, Mesh, members, solve
from olmo_fn.mesh.settings import MeshConfig

few = examples(40)


@few
@given(meshes(), st.data())
def test_ranks_partition_the_world(mesh: Mesh, data: st.DataObject) -> None:
    axes = tuple(data.draw(st.sets(st.sampled_from(AXES))) if mesh.ep == 1 else data.draw(st.sets(st.sampled_from(FINEST))))
    lines = {mesh.ranks(axes, rank) for rank in range(mesh.size)}
    assert sorted(rank for line in lines for rank in line) == list(range(mesh.size))
    for line in lines:
        assert len(line) == prod(mesh.degree(axis) for axis in axes)
        assert sorted(line) == list(line), "row-major with the innermost axis last is ascending"
        others = [
            {k: v for k, v in finest(mesh, rank).items() if k not in {m for a in axes for m in members(a)}} for rank in line
        ]
        assert others == others[:1] * len(line)
    assert [mesh.rank(mesh.coordinates(rank)) for rank in range(mesh.size)] == list(range(mesh.size))


@few
@given(meshes(), st.sampled_from([(), ("dp_shard",), ("dp_replicate",)]))
def test_the_degree_left_out_is_derived(mesh: Mesh, left_out: tuple[str, ...]) -> None:
    given_degrees = {axis: None if axis in left_out else n for axis, n in mesh.degrees.items()}
    assert solve(mesh.size, **given_degrees) == mesh


@pytest.mark.parametrize(
    ("processes", "degrees", "message"),
    [
        (8, {"tp": 3, "pp": 2}, "--mesh.pp 2 x --mesh.tp 3 = 6 does not divide the 8 processes; choose degrees whose "
         "product is 1, 2, 4, 8, or start 6 processes or a multiple"),
        (8, {"cp": 16}, "--mesh.cp 16 does not divide the 8 processes; choose degrees whose product is 1, 2, 4, 8, "
         "or start 16 processes or a multiple"),
        (8, {"dp_shard": 2, "dp_replicate": 2}, "--mesh.dp-replicate 2 x --mesh.dp-shard 2 = 4, but there are 8 processes; "
         "start 4, or leave out --mesh.dp-shard, which would be 4"),
        (8, {"dp_shard": 1, "dp_replicate": 1}, "every degree 1, but there are 8 processes; "
         "start 1, or leave out --mesh.dp-shard, which would be 8"),
        (8, {"tp": 0}, "--mesh.tp is 0; it must be at least 1"),
    ],
)  # fmt: skip
def test_an_impossible_mesh_is_refused_with_the_arithmetic(processes: int, degrees: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=r"^--|^every") as error:
        solve(processes, **degrees)
    assert str(error.value) == message


def test_the_command_line_has_the_same_degrees() -> None:
    assert MeshConfig(cp=2).on(6) == Mesh(dp_shard=3, cp=2)


def everything(connection):
    """What this rank gathers of the ranks' numbers over each axis, and its place; a DTensor sharded and whole again."""
    rank = torch.tensor([connection.rank])
    axes = {name: getattr(connection.axes, name) for name in NAMES}
    gathered = {name: (all_gather(rank, 0, axis).tolist(), axis.index, axis.size) for name, axis in axes.items()}
    mesh = connection.device_mesh
    whole = torch.arange(40.0).view(5, 8)
    sharded = DTensor.from_local(whole, mesh, run_check=False).redistribute(mesh, [Shard(0), Shard(1), Shard(0)])
    return gathered, sharded.full_tensor(), mesh.mesh.tolist(), mesh.get_coordinate()


@pytest.mark.parametrize(
    "mesh",
    [
        Mesh(pp=2, tp=2),
        Mesh(dp_replicate=2, dp_shard=2),
        Mesh(dp_shard=2, cp=2),
        Mesh(dp_shard=2, cp=2, ep=2),
        Mesh(dp_shard=4, ep=2),
        Mesh(dp_shard=3),
        Mesh(),
    ],
)
def test_connected_axes_reach_the_ranks_on_paper(pool, mesh: Mesh) -> None:
    for rank, (gathered, whole, table, coordinate) in enumerate(pool.run(everything, mesh=mesh)):
        for name, (ranks, index, size) in gathered.items():
            line = mesh.ranks(members(name), rank)
            assert (ranks, index, size) == (list(line), line.index(rank), len(line)), name
        assert torch.equal(whole, torch.arange(40.0).view(5, 8))
        here = mesh.coordinates(rank)
        assert list(coordinate) == [here["dp_replicate"], here["dp_shard"] * mesh.cp + here["cp"], here["tp"]]
        assert table[coordinate[0]][coordinate[1]][coordinate[2]] == rank


def test_alone_is_one_of_everything() -> None:
    assert all(getattr(SINGLE_DEVICE, name).size == 1 for name in NAMES)
    assert hash(SINGLE_DEVICE) == hash(Axes())


def refused(connection):
    from olmo_fn.mesh.connect import connect

    with pytest.raises(ValueError, match=r"the mesh has 4 ranks, but torch.distributed has 2 ranks; start 4 processes"):
        connect(Mesh(tp=4))


def test_a_mesh_of_another_size_is_refused(pool) -> None:
    pool.run(refused, ranks=2)


def test_what_help_and_launching_need_imports_no_torch() -> None:
    modules = "olmo_fn.mesh.axis, olmo_fn.mesh.settings, olmo_fn.launch.local, olmo_fn.mesh.mesh"
    subprocess.run([sys.executable, "-c", f"import sys, {modules}; assert 'torch' not in sys.modules"], check=True)
