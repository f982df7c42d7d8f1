"""Search the layouts of a number of accelerators: all of them by `olmo_fn.planner.formulas`, the most promising by a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.parallel.pipeline.schedule import Kind
from olmo_fn.planner import formulas
from olmo_fn.planner.estimate import RESERVED, Estimate, estimate
from olmo_fn.planner.plan_input import PlanInput, can_run, check_skew
from olmo_fn.train.accelerators import ACCELERATORS
from olmo_fn.train.config import Config

ROWS = (1, 2, 4, 8)  # sequences at once that are tried
REMATS = ("none", "selective", "full")
WIDEST = 64  # ranks that share experts
LONG = 4096  # positions of a rank from which on context parallelism is tried
NODE = 8  # parameters are sharded over at least a machine
TRACES = 3  # layouts that are traced for each that is asked for
HOPELESS = 1.5  # times the memory by formula, and a layout is not traced
PIPELINES: tuple[tuple[Kind, int], ...] = (("1f1b", 1), ("interleaved", 2))
Progress = Callable[[str, float], object]


def search(cfg: Config, gpus: int, best: int = 5, progress: Progress = lambda words, part: None) -> list[Estimate]:
    """The ``best`` layouts of ``gpus`` accelerators for ``cfg``, the fastest first; ValueError if none fits.

    Of layouts that differ only in how data-parallel ranks are split into copies, or in micro-batches, only the best is named.
    ``progress`` is called with what is being done, and how much of all is.
    """
    check_skew(cfg)
    gpu, found, traced = ACCELERATORS[cfg.gpu], dict[tuple[object, ...], Estimate](), 0
    progress("all layouts, roughly", 0.0)
    room = HOPELESS * (gpu.memory - RESERVED)
    candidates = [plan for plan in layouts(cfg, gpus) if can_run(plan) and formulas.memory(plan) <= room]
    for plan in sorted(candidates, key=lambda plan: formulas.seconds(plan, gpu)):
        kind = plan.mesh.pp, plan.mesh.tp, plan.mesh.cp, plan.mesh.ep, plan.cfg.recipe.remat
        if kind not in found:
            progress(f"layout {traced + 1}", traced / (TRACES * best))
            traced += 1
            if (one := estimate(plan)).fits:
                found[kind] = one
        if traced == TRACES * best:
            break
    if not found:
        raise ValueError(
            f"no layout of {gpus} x {gpu.name} fits this model and batch; use more (--gpus), a larger --gpu, or a smaller batch"
        )
    return sorted(found.values(), key=lambda one: one.clock.seconds)[:best]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length())]


def sharing_experts(cfg: Config, dp_shard: int) -> list[int]:
    """Degrees of ``ep`` to try: all that divide the experts of every layer."""
    numbers = [n for block in cfg.model.layers if (n := block.feed_forward.num_experts)]
    return [ep for ep in _powers(min(WIDEST, dp_shard) if numbers else 1) if not any(n % ep for n in (dp_shard, *numbers))]


def layouts(cfg: Config, gpus: int) -> Iterator[PlanInput]:
    """All layouts whose degrees divide the accelerators and the batch."""
    longest = max(1, min(8, cfg.recipe.sequence_length // LONG))
    degrees = ((pp, cp, tp) for pp in _powers(min(8, cfg.model.n_layers)) for cp in _powers(longest) for tp in _powers(NODE))
    for pp, cp, tp in degrees:
        ranks, uneven = divmod(gpus, pp * cp * tp)
        if uneven or cfg.recipe.batch_size % ranks:
            continue
        part = cfg.recipe.batch_size // ranks
        for dp_shard in (d for d in range(1, ranks + 1) if ranks % d == 0 and (d * cp * tp >= NODE or d == ranks)):
            meshes = [Mesh(pp, ranks // dp_shard, dp_shard, cp, tp, ep) for ep in sharing_experts(cfg, dp_shard)]
            recipes = [(part // rows, remat) for rows in ROWS if part % rows == 0 for remat in REMATS]
            for mesh, (times, remat) in product(meshes, recipes):
                plan = PlanInput(cfg, mesh).changed(mesh=mesh, remat=remat, accumulate=1, micro_batch=0)
                if pp == 1:
                    yield plan.changed(accumulate=times)
                elif times >= pp:
                    for kind, chunks in PIPELINES:
                        yield plan.changed(pp_schedule=kind, pp_chunks=chunks, pp_microbatches=times)
