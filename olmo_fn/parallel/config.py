"""The mesh on the command line. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MeshConfig:
    """How the processes divide the work; the product of the degrees is their number."""

    pp: int = 1
    """Pipeline stages: each group of processes holds some of the blocks."""
    dp_replicate: int | None = None
    """Copies of the sharded parameters (HSDP; alone it is DDP). Left out: 1, or what --mesh.dp-shard leaves."""
    dp_shard: int | None = None
    """Processes that share one copy of parameters and state, each with sequences of its own (FSDP).
    Left out: all the processes that the other degrees leave."""
    cp: int = 1
    """Processes that share each sequence (context parallelism); parameters are sharded over them as well."""
    tp: int = 1
    """Processes that share each matrix product (tensor parallelism, with sequence-parallel norms)."""
