"""The mesh connected: process groups for every axis of it, as a value that is passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from olmo_fn.mesh.axis import NAMES, Axes, Axis
from olmo_fn.mesh.mesh import FINEST, Mesh, members

AT_REST = (("dp_replicate", "fsdp", "tp"), ("dp_replicate", "dp_shard", "cp", "tp"), ("dp_replicate", "ep", "edp", "tp"))
"""The dims of the device meshes on which parameters and state live, see `olmo_fn.mesh.placement.Placed.at_rest`; the last one
only where there is an ``ep``."""


@dataclass(frozen=True)
class Connection:
    """A rank's place in a mesh: its axes for the collectives, and the device meshes of its pipeline stage for DTensors."""

    mesh: Mesh
    rank: int
    axes: Axes
    device_meshes: Mapping[tuple[str, ...], DeviceMesh]
    """By their dims, those of `AT_REST`."""

    @property
    def device_mesh(self) -> DeviceMesh:
        """The one of most parameters: dp_replicate, fsdp, tp."""
        return self.device_meshes[AT_REST[0]]


def connect(mesh: Mesh, device_type: str = "cpu") -> Connection:
    """Make the process groups of ``mesh``; every rank calls it, with the same mesh, at the same point.

    Needs ``torch.distributed`` initialised with ``mesh.size`` ranks (ValueError otherwise). Axes over the same ranks
    share a group, and neighbours in a pipeline have groups of their own. The device meshes are over the ranks of this rank's
    pipeline stage.
    """
    there = dist.get_world_size() if dist.is_initialized() else 0
    if there != mesh.size:
        state = f"has {there} ranks" if there else "is not initialised"
        raise ValueError(f"the mesh has {mesh.size} ranks, but torch.distributed {state}; start {mesh.size} processes")
    rank, backend = dist.get_rank(), backend_of(device_type)
    groups = {tuple(range(mesh.size)): dist.group.WORLD}

    def group(axes: tuple[str, ...]) -> dist.ProcessGroup:
        for lead in range(mesh.size):  # all ranks make all groups, in one order
            line = mesh.ranks(axes, lead)
            if line[0] == lead and line not in groups:
                groups[line] = dist.new_group(list(line), backend=backend)
        found = groups[mesh.ranks(axes, rank)]
        assert found is not None
        return found

    def axis(name: str) -> Axis:
        axes = members(name)
        line = mesh.ranks(axes, rank)
        channels = _channels(mesh, rank, device_type) if name == "pp" and len(line) > 1 else ()
        if len(line) == 1:
            return Axis(name)
        nccl = device_type == "cuda" and group(axes)._get_backend(torch.device(device_type)).name() == "nccl"
        return Axis(name, len(line), line.index(rank), group(axes).group_name, channels, coalesces=nccl)

    every: dict[str, Any] = {name: axis(name) for name in NAMES}
    axes = Axes(**every)
    stage = torch.tensor(mesh.ranks(FINEST[1:], rank)).view([mesh.degree(name) for name in FINEST[1:]])

    def device_mesh(dims: tuple[str, ...]) -> DeviceMesh:
        groups = [group(members(name)) for name in dims]
        order = [FINEST[1:].index(part) for name in dims for part in members(name)]
        ranks = stage.permute(order).reshape([mesh.degree(name) for name in dims])
        return DeviceMesh.from_group(groups, device_type, ranks, mesh_dim_names=dims)

    meshes = AT_REST if mesh.ep > 1 else AT_REST[:-1]
    return Connection(mesh, rank, axes, {dims: device_mesh(dims) for dims in meshes})


def backend_of(device_type: str) -> str | None:
    """The backend of groups that only tensors on such devices go through; None: that of the whole job.

    With NCCL's alone a group on GPUs needs no connections of the hosts, which gloo makes from each to each.
    """
    backends = dict(pair.split(":") for pair in dist.get_backend_config().split(","))
    return backends.get("cuda") if device_type == "cuda" else None


def _channels(mesh: Mesh, rank: int, device_type: str) -> tuple[str, ...]:
    """`Axis.channels` of ``pp``, each of which has moved a byte.

    The first transfer of an NCCL group makes its communicator, and blocks both ranks until both are there: in the middle of a
    schedule they could wait for each other, here all ranks go through the channels in one order.
    """
    names = []
    for line in dict.fromkeys(mesh.ranks(("pp",), lead) for lead in range(mesh.size)):
        for step in (1, -1):
            for i, source in enumerate(line):
                ends = source, line[(i + step) % len(line)]
                group = dist.new_group(list(ends), backend=backend_of(device_type))  # called by all ranks
                byte = torch.zeros(1, dtype=torch.uint8, device=device_type)
                if rank == source:
                    dist.send(byte, ends[1], group)
                elif rank in ends:
                    dist.recv(byte, source, group)
                if rank in line:
                    names.append(group.group_name if rank in ends else "")
    return tuple(names)
