"""Whether a run fits into the memory there is: said before anything is allocated, with the flags that would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.planner import formulas
from olmo_fn.planner.estimate import LONGEST, PROCESS, RESERVED, profile_of
from olmo_fn.planner.memory import peak_memory
from olmo_fn.planner.plan_input import PlanInput, can_run, flags
from olmo_fn.train.config import Config

GIB = 2**30
MORE = "take a smaller model or shorter sequences, or more processes, for which olmo-fn plan finds the best layouts"


def check_memory(cfg: Config, mesh: Mesh, dtype: str, memory: float, device: str = "cpu") -> None:
    """ValueError if a step of ``cfg`` on ``mesh``, in ``dtype``, needs more than ``memory`` bytes a process of a ``device``.

    It is the plan's figure (`olmo_fn.planner`), to which what is `reserved` comes. Where a formula says that
    there is far more, or that nothing can make it fit, nothing is traced.

    >>> from configs import CONFIGS
    >>> check_memory(CONFIGS["olmo2-tiny"], Mesh(), "float32", 2e9)
    >>> check_memory(CONFIGS["olmo2-190m"], Mesh(), "bfloat16", 16e9)
    Traceback (most recent call last):
    ValueError: a step needs 740.1 GiB, for 512 sequences of 4,096 at once; there are 14.9. This fits: --recipe.accumulate 128
    """
    plan = PlanInput(cfg, mesh, device).changed(dtype=dtype)
    if cfg.recipe.engine != "tape" or reserved(device) + formulas.WITHIN * formulas.memory(plan) <= memory:
        return
    *_, smallest = (_computing_less_at_once(smaller)[-1] for smaller in _keeping_less(plan))
    if (rough := formulas.memory(smallest)) > formulas.WITHIN * memory:
        raise ValueError(
            f"a step needs about {formulas.memory(plan) / GIB:,.0f} GiB, for {plan.at_once} at once; there are "
            f"{memory / GIB:,.1f}. Even {flags(smallest.cfg, plan.cfg)} needs about {rough / GIB:,.0f}: {MORE}"
        )
    if cfg.recipe.sequence_length // mesh.cp > LONGEST or need(plan) <= memory:
        return
    words = f"a step needs {need(plan) / GIB:,.1f} GiB, for {plan.at_once} at once; there are {memory / GIB:,.1f}"
    fitting, least = remedy(plan, lambda smaller: need(smaller) <= memory)
    if fitting:
        raise ValueError(f"{words}. This fits: {flags(fitting.cfg, plan.cfg)}")
    raise ValueError(f"{words}. Even {flags(least.cfg, plan.cfg)} needs {need(least) / GIB:,.1f}: {MORE}")


def with_weights(cfg: Config, mesh: Mesh, dtype: str, memory: float, device: str) -> Config:
    """The config with ``mesh.weights`` said where it is auto: zero-2 if a step then fits into ``memory``, or else zero-3."""
    if cfg.mesh.weights != "auto":
        return cfg
    kept = PlanInput(cfg, mesh).changed(dtype=dtype, weights="zero-2")
    planned = cfg.recipe.engine == "tape" and mesh.pp == 1 and mesh.degree("fsdp") > 1
    fits = planned and cfg.recipe.sequence_length // mesh.cp <= LONGEST and need(kept) + reserved(device) <= memory
    return replace(cfg, mesh=replace(cfg.mesh, weights="zero-2" if fits else "zero-3"))


def reserved(device: str) -> float:
    """Bytes of a process on such a device that are left to all but its tensors."""
    return RESERVED if device == "cuda" else PROCESS


def need(plan: PlanInput) -> float:
    """Bytes of a process at the largest moment of a step."""
    found = profile_of(plan)
    return reserved(plan.device) + max(peak_memory(plan, found, rank).total for rank in range(plan.mesh.pp))


def remedy(plan: PlanInput, fits: Callable[[PlanInput], bool]) -> tuple[PlanInput | None, PlanInput]:
    """The first of ever smaller plans that fits, if there is one, and the smallest that was tried."""
    for smaller in _keeping_less(plan):
        tries = _computing_less_at_once(smaller)
        if fits(tries[-1]):
            return next(one for one in tries if fits(one)), tries[-1]
    return None, tries[-1]


def _keeping_less(plan: PlanInput) -> Iterator[PlanInput]:
    """The plan with less and less to keep; but for the last, of the same numbers."""
    yield plan
    remats = () if plan.cfg.recipe.remat == "full" else ("selective", "full")
    changes: list[dict[str, Any]] = [{"weights": "zero-3"}, *({"remat": how} for how in remats), {"moments": "bfloat16"}]
    for change in changes:
        less = plan.changed(**change)
        if less != plan and can_run(less):
            yield (plan := less)


def _computing_less_at_once(plan: PlanInput) -> list[PlanInput]:
    """The plan, and it with twice, four times, … as many parts of a batch, as far as they go."""
    found = [plan]
    while True:
        last = found[-1]
        if plan.mesh.pp > 1 and plan.cfg.mesh.pp_schedule != "gpipe":  # which keeps all micro-batches
            more = last.changed(pp_microbatches=2 * last.microbatches)
        else:
            more = last.changed(accumulate=2 * last.cfg.recipe.accumulate)
        if not can_run(more):
            return found
        found.append(more)
