"""Everything about a job on paper: memory, traffic and time, and which flag would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.count import num_params
from olmo_fn.planner.accelerators import ACCELERATORS, Accelerator
from olmo_fn.planner.clock import Clock, clock
from olmo_fn.planner.job import Job, changed, check
from olmo_fn.planner.memory import Peak, peak_memory
from olmo_fn.planner.profile import Profile, profile
from olmo_fn.planner.scale import extrapolated
from olmo_fn.planner.trace import Traffic
from olmo_fn.planner.traffic import traffic

HOPELESS = 8  # times the memory there is: no single flag helps
RESERVED = 4e9
"""Bytes of an accelerator that are assumed not to be ours: its context, communication buffers, fragments."""

TRACED = 8192
"""Positions of a rank that are traced, and twice as many, where there are more: far above what a loop takes at once."""


@dataclass(frozen=True)
class Estimate:
    """A job on an accelerator. ``peaks`` and ``traffic`` are by pipeline rank."""

    job: Job
    gpu: Accelerator
    peaks: tuple[Peak, ...]
    traffic: tuple[Traffic, ...]
    clock: Clock

    @property
    def largest(self) -> Peak:
        """The largest moment of all ranks."""
        return max(self.peaks, key=lambda peak: peak.total)

    @property
    def fits(self) -> bool:
        """Whether that is within the accelerator's memory."""
        return self.largest.total <= self.gpu.memory - RESERVED


def profile_of(job: Job) -> Profile:
    """The pieces of the job's step; of many sequences from those of few."""
    keep = job.cfg.mesh.keep_gathered and job.mesh.pp == 1
    cfg = replace(job.cfg, gpus=0, nproc=0, mesh=MeshConfig(cp_method=job.cfg.mesh.cp_method, keep_gathered=keep))
    few = -(-TRACED // cfg.recipe.sequence_length) * job.mesh.cp

    def of(rows: int) -> Profile:
        return profile(cfg, replace(job.mesh, pp=1), rows, getattr(torch, job.dtype))

    return of(job.rows) if job.rows <= 2 * few else extrapolated(of(few), of(2 * few), job.rows / few - 1)


@lru_cache(512)
def estimate(job: Job) -> Estimate:
    """The estimate of a job that can run; ValueError for one that cannot."""
    check(job)
    gpu = ACCELERATORS[job.cfg.gpu]
    found = profile_of(job)
    sent = tuple(traffic(job, found, rank) for rank in range(job.mesh.pp))
    return Estimate(job, gpu, peaks(job, found), sent, clock(job, found, gpu))


def peaks(job: Job, found: Profile) -> tuple[Peak, ...]:
    """The largest moment of a step, by pipeline rank.

    >>> from configs import CONFIGS
    >>> from olmo_fn.mesh.mesh import Mesh
    >>> tiny = Job(CONFIGS["olmo2-tiny"], Mesh())
    >>> [peak.when for peak in peaks(tiny, profile_of(tiny))]
    ['forward of head']
    """
    return tuple(peak_memory(job, found, rank) for rank in range(job.mesh.pp))


def remedies(job: Job) -> Iterator[tuple[str, Job]]:
    """Changes that save memory, each with the flag to type, the cheapest first; those that are refused left out."""
    mesh, r, c = job.mesh, job.cfg.recipe, job.cfg.mesh
    tries: list[tuple[str, Job]] = []
    if c.keep_gathered and mesh.pp == 1:
        tries.append(("--mesh.no-keep-gathered", changed(job, keep_gathered=False)))
    if getattr(job.cfg.optim, "moments", None) == "float32":
        tries.append(("--optim.moments bfloat16", changed(job, moments="bfloat16")))
    if mesh.pp > 1:
        times = 2 * job.microbatches
        tries.append((f"--mesh.pp-microbatches {times}", changed(job, pp_microbatches=times)))
    tries.append((f"--recipe.accumulate {2 * r.accumulate}", changed(job, accumulate=2 * r.accumulate)))
    tries += [(f"--recipe.remat {remat}", changed(job, remat=remat)) for remat in ("feed_forward", "full") if r.remat != remat]
    for axis in ("dp_shard", "tp", "cp", "pp"):
        degree = 2 * getattr(mesh, axis)
        larger = changed(job, mesh=replace(mesh, **{axis: degree}))
        tries.append((f"--mesh.{axis.replace('_', '-')} {degree} ({larger.mesh.size} processes)", larger))
    full = changed(job, remat="full")
    tries.append((f"--recipe.remat full --recipe.accumulate {4 * r.accumulate}", changed(full, accumulate=4 * r.accumulate)))
    for words, other in tries:
        try:
            yield words, check(other)
        except ValueError:
            continue


def first_remedy(found: Estimate) -> tuple[list[tuple[str, Estimate]], str]:
    """What was tried, and the first flag that makes the job fit; empty if none does."""
    tried: list[tuple[str, Estimate]] = []
    if found.largest.total > HOPELESS * found.gpu.memory:
        return tried, ""
    for words, other in remedies(found.job):
        if 8 * num_params(other.cfg.model) / (other.mesh.pp * other.mesh.tp * other.mesh.degree("fsdp")) > found.gpu.memory:
            continue  # parameters and gradients alone are too much
        better = estimate(other)
        tried.append((words, better))
        if better.fits:
            return tried, words
    return tried, ""
