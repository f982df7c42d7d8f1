"""Search the layouts of a number of accelerators: all of them by `olmo_fn.planner.formulas`, the most promising by a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.parallel.pipeline.schedule import Kind
from olmo_fn.planner import formulas
from olmo_fn.planner.accelerators import ACCELERATORS
from olmo_fn.planner.estimate import RESERVED, Estimate, estimate
from olmo_fn.planner.plan_input import PlanInput, check
from olmo_fn.train.config import Config

ROWS = (1, 2, 4, 8)  # sequences at once that are tried
LONG = 4096  # positions of a rank from which on context parallelism is tried
NODE = 8  # parameters are sharded over at least a machine
TRACES = 6  # layouts that are estimated for each that is asked for
PIPELINES: tuple[tuple[Kind, int], ...] = (("1f1b", 1), ("interleaved", 2))


def search(cfg: Config, gpus: int, best: int = 5, progress: Callable[[str, float], None] = lambda words, part: None) -> list[Estimate]:
    """The ``best`` layouts of ``gpus`` accelerators for ``cfg``, the fastest first; ValueError if none fits.

    Of layouts that differ only in how data-parallel ranks are split, or in micro-batches, only the best is named. ``progress``
    is called with what is being done, and how much of all is.
    """
    gpu = ACCELERATORS[cfg.gpu]
    candidates = sorted(_promising(cfg, gpus), key=lambda pair: pair[0])
    found: dict[tuple[object, ...], Estimate] = {}
    for i, (_, plan) in enumerate(candidates):
        key = plan.mesh.pp, plan.mesh.tp, plan.mesh.cp, plan.cfg.recipe.remat
        ...
    if not found:
        raise ValueError(
            f"no layout of {gpus} x {gpu.name} fits this model and batch; use more (--gpus), a larger --gpu, or a smaller batch"
        )
    return sorted(found.values(), key=lambda one: one.clock.seconds)[:best]
