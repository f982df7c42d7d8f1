"""The mesh on the command line. Imports no torch, so that ``--help`` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from olmo_fn.fields import VISIBLE, Range
from olmo_fn.mesh.axis import CPMethod, ReduceDtype
from olmo_fn.mesh.mesh import AXES, Mesh, solve

DEGREE = Range(0, 1 << 18)


@dataclass(frozen=True)
class MeshConfig:
    """How the processes divide the work; the product of the degrees is their number."""

    pp: Annotated[int, DEGREE] = 1
    """Pipeline stages: each group of processes holds some of the blocks."""
    dp_replicate: Annotated[int | None, DEGREE] = None
    """Copies of the sharded parameters (HSDP; alone it is DDP). Left out: 1, or what --mesh.dp-shard leaves."""
    dp_shard: Annotated[int | None, DEGREE] = None
    """Processes that share one copy of parameters and state, each with sequences of its own (FSDP).
    Left out: all the processes that the other degrees leave."""
    cp: Annotated[int, DEGREE] = 1
    """Processes that share each sequence (context parallelism); parameters are sharded over them as well."""
    tp: Annotated[int, DEGREE] = 1
    """Processes that share each matrix product (tensor parallelism, with sequence-parallel norms)."""
    ep: Annotated[int, DEGREE] = 1
    """Of the --mesh.dp-shard processes, how many share the experts, to which tokens then travel (expert parallelism)."""
    weights: Literal["zero-3", "zero-2", "auto"] = "zero-3"
    """zero-3: gathered parameters are given back after the forward sweep and gathered again; zero-2: they are kept, for less
    traffic and more memory; auto: kept where that fits into the memory there is."""
    prefetch: Annotated[int, Range(1, 4096)] = 1
    """Blocks whose parameters are on their way while one computes."""
    embedding: Literal["auto", "rows", "table"] = "auto"
    """What goes from rank to rank for the embedding: the rows that are looked up, or its whole table; auto: what is less."""
    reduce_dtype: Annotated[ReduceDtype, VISIBLE] = "float32"
    """In what gradients are summed over processes; bfloat16 is half as many bytes, and changes the numbers."""
    async_tp: bool = False
    """Over --mesh.tp, send and multiply at the same time: products begin with what has arrived (CUDA with NVLink only)."""
    cp_method: CPMethod = "gather"
    """How attention sees the keys and values of other --mesh.cp ranks: all gathered; heads exchanged for positions; or
    passed on in a ring."""
    pp_schedule: Literal["gpipe", "1f1b", "interleaved", "zero_bubble"] = "1f1b"
    """Order of work in the pipeline; interleaved needs --mesh.pp-chunks of 2 or more."""
    pp_microbatches: Annotated[int, Range(0, 1 << 16)] = 0
    """Micro-batches in which a part of the batch (--recipe.accumulate) goes through the pipeline. 0: twice --mesh.pp."""
    pp_chunks: Annotated[int, Range(1, 4096)] = 1
    """Virtual stages that each pipeline rank holds."""
    pp_split: str = ""
    """Blocks of every virtual stage, such as 0-7,8-15; embed first and head last are ends without blocks. Empty: even in
    cost."""

    @property
    def keep_gathered(self) -> bool:
        """Whether gathered parameters are kept between the sweeps."""
        return self.weights == "zero-2"

    def on(self, processes: int) -> Mesh:
        """The mesh of so many processes; ValueError, one line with the arithmetic, if it cannot be.

        >>> MeshConfig(tp=2).on(8).dp_shard
        4
        """
        return solve(processes, **{axis: getattr(self, axis) for axis in (*AXES, "ep")})
