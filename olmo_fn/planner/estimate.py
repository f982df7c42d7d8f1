"""Everything about a run on paper: memory, traffic and time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.planner.clock import Clock, clock
from olmo_fn.planner.memory import Peak, host_memory, peak_memory
from olmo_fn.planner.plan_input import PlanInput, check, without_layout
from olmo_fn.planner.profile import Profile, extrapolated, profile
from olmo_fn.planner.trace import Traffic
from olmo_fn.planner.traffic import traffic
from olmo_fn.train.accelerators import ACCELERATORS, Accelerator
from olmo_fn.train.recipe import exchanged

RESERVED, PROCESS = 4e9, 0.5e9
"""Bytes that are assumed not to be a step's tensors: on an accelerator its context, communication buffers, fragments; of a
process on a CPU Python, torch and what they compiled."""

TRACED = 8192
"""Positions of a rank that are traced, and twice as many, where there are more: far above what a loop takes at once."""


LONGEST = 1 << 16
"""Most positions of a rank that are traced: attention's tiles grow with their square."""


@dataclass(frozen=True)
class Estimate:
    """A run on an accelerator. ``peaks`` and ``traffic`` are by pipeline rank."""

    plan: PlanInput
    gpu: Accelerator
    peaks: tuple[Peak, ...]
    traffic: tuple[Traffic, ...]
    clock: Clock
    host: tuple[int, ...] = ()
    """Bytes that are offloaded to host memory at most, by pipeline rank."""

    @property
    def largest(self) -> Peak:
        """The largest moment of all ranks."""
        return max(self.peaks, key=lambda peak: peak.total)

    @property
    def fits(self) -> bool:
        """Whether that is within the accelerator's memory."""
        return self.largest.total <= self.gpu.memory - RESERVED


def profile_of(plan: PlanInput) -> Profile:
    """The pieces of the run's step; of many sequences from those of few."""
    if (positions := plan.cfg.recipe.sequence_length // plan.mesh.cp) > LONGEST:
        raise ValueError(
            f"--recipe.sequence-length {plan.cfg.recipe.sequence_length} is {positions:,} positions a rank, and no more than "
            f"{LONGEST:,} can be planned; shorten it, or raise --mesh.cp"
        )
    given = plan.cfg.mesh
    mesh = MeshConfig(
        cp_method=given.cp_method,
        weights="zero-2" if given.keep_gathered and plan.mesh.pp == 1 else "zero-3",
        prefetch=given.prefetch,
        embedding="rows" if exchanged(plan.cfg, plan.mesh) else "table",
        reduce_dtype=given.reduce_dtype,
    )
    cfg = replace(without_layout(plan.cfg), mesh=mesh)
    few = -(-TRACED // cfg.recipe.sequence_length) * plan.mesh.cp

    def of(rows: int) -> Profile:
        return profile(cfg, replace(plan.mesh, pp=1), rows, getattr(torch, plan.dtype), plan.device)

    return of(plan.rows) if plan.rows <= 2 * few else extrapolated(of(few), of(2 * few), plan.rows / few - 1)


def estimate(plan: PlanInput, gpu: Accelerator | None = None) -> Estimate:
    """The estimate of a run, on the accelerator that its config names if no other is given. ValueError if it cannot run.

    ``mesh.weights`` auto is what fits: zero-2, or else zero-3.
    """
    if plan.cfg.mesh.weights == "auto":
        kept = estimate(plan.changed(weights="zero-2"), gpu)
        return kept if kept.fits and plan.mesh.pp == 1 else estimate(plan.changed(weights="zero-3"), gpu)
    found, gpu, ranks = profile_of(check(plan)), gpu or ACCELERATORS[plan.cfg.gpu], range(plan.mesh.pp)
    peaks = tuple(peak_memory(plan, found, rank) for rank in ranks)
    host = tuple(host_memory(plan, found, rank) for rank in ranks)
    return Estimate(plan, gpu, peaks, tuple(traffic(plan, found, rank) for rank in ranks), clock(plan, found, gpu), host)
