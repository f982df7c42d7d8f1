"""Programs traced on fake CUDA tensors: functions that `olmo_fn.testing.FakeCuda` runs in its process."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from olmo_fn import tree
from olmo_fn.checkpoint import shards
from olmo_fn.cli.main import main
from olmo_fn.mesh.connect import Connection, connect
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.parallel.sharded_placement import ShardedPlacement
from olmo_fn.testing import Seen, Trace
from olmo_fn.testing.emulated_cuda import CudaTensor
from olmo_fn.train import machine
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import parameters, recipe


def seen(program: Callable[..., Any], *args: Any) -> Seen:
    """What a program does on fake tensors."""
    with FakeTensorMode(), Trace() as trace:
        program(*args)
    return trace.seen


def connected(mesh: Mesh) -> Connection:
    """This process as rank 0 of a mesh whose other ranks are not there: collectives send nothing."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=mesh.size)
    return connect(mesh, "cuda")


def traced_step(
    cfg: Config,
    mesh: Mesh | None = None,
    *,
    compiled: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    values: bool = False,
    before: int = 0,
) -> Seen:
    """One training step of a config, by rank 0 of a mesh, ``before`` as many others; its state counts at the peak alone.

    ``compiled``: as on a GPU, where each stage and kernel is one call; or all of it eager. ``values``: on tensors that have
    some, for a step that asks for them.
    """
    connection = connected(mesh) if mesh else None
    made = recipe(replace(cfg, recipe=replace(cfg.recipe, compile=False)), dtype, connection)
    placement = made.execution.layout.placement
    with nullcontext() if values else FakeTensorMode(allow_non_fake_inputs=True), Trace() as trace:
        watched = trace.compiled(made) if compiled else made
        if isinstance(placement, ShardedPlacement):
            params = placement.make(lambda path, spec, box: torch.empty(box.shape))
        else:
            make = torch.randn if values else torch.empty
            params = tree.map(lambda spec: make(spec.shape, device="cuda"), parameters(cfg))
        state = watched.init(params)
        del params
        rows = made.execution.layout.sharing.rows(cfg.recipe.batch_size, cfg.recipe.accumulate)
        shape = sum(part.stop - part.start for part in rows), cfg.recipe.sequence_length
        batch = {name: torch.zeros(shape, dtype=torch.int64, device="cuda") for name in ("input_ids", "labels")}
        for _ in range(before):
            state, _ = watched(state, batch)
        trace.seen = Seen(peak=trace.live)
        watched(state, batch)
    return trace.seen


def command(words: list[str], typed: str = "") -> tuple[int, str, str, Seen]:
    """A command of the program on a GPU that is emulated, which reads what is ``typed``: its exit code, what it says on either
    stream, and what its own thread does there.
    """
    sys.stdin = io.StringIO(typed)
    shards.PLAIN = {*shards.PLAIN, CudaTensor}
    machine.gemm_rate = lambda *args: 1e12  # it would measure the CPU, with a product of GPUs' size
    with redirect_stdout(io.StringIO()) as said, redirect_stderr(io.StringIO()) as errors, Trace() as trace:
        code = main(words)
    return code, said.getvalue(), errors.getvalue(), trace.seen
