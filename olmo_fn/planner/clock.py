"""How long a step takes: a simple model of computation and communication, and the pipeline's simulation.

The assumptions, none of which has been measured by this project (it has had no GPU):

- A product of matrices runs at `GEMM` of the peak, attention's at `ATTENTION`; elementwise kernels at `STREAM` of the memory's
  bandwidth. Attention's tiles stay on chip, as in FlashAttention: what the tiles of `olmo_fn.kernels.attention_tiles` would
  move is not counted.
- A collective moves (n - 1) / n of its tensor over the slowest link of its group, an all_reduce twice that. It takes `LAUNCH`,
  and `HOP` for each of the n - 1 steps of a ring, an all_reduce for the 2 log n of a tree. A group with g ranks in a machine
  drives g network cards.
- Weights and gradients (``fsdp``, ``dp_replicate``) travel while a neighbouring segment computes: a segment takes the longer
  of the two. ``tp`` and ``cp`` collectives are waited for. A pipeline gathers its weights before it begins and scatters its
  gradients when it has ended, which nothing overlaps with; its sends overlap as its simulation says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from math import prod

from olmo_fn.mesh.mesh import AXES, Mesh, members
from olmo_fn.models.count import flops_per_sequence
from olmo_fn.planner.accelerators import Accelerator
from olmo_fn.planner.job import Job
from olmo_fn.planner.memory import at_rest, carry, held, whole_updates
from olmo_fn.planner.pipeline_simulate import Costs, simulate
from olmo_fn.planner.profile import Profile
from olmo_fn.planner.trace import Seen, Traffic
from olmo_fn.planner.whole import share

GEMM, ATTENTION, STREAM = 0.65, 0.4, 0.75
HOP = {"link": 1e-6, "network": 5e-6}  # seconds from one rank to the next
LAUNCH = 10e-6  # seconds a collective takes before anything moves
OVERLAPPED = ("fsdp", "dp_replicate")


@dataclass(frozen=True)
class Clock:
    """Seconds of a step and where they go; fractions of them for one pipeline rank on average."""

    seconds: float
    computing: float
    waiting: float
    """For tp, cp and what of fsdp traffic is longer than what it overlaps with."""
    update: float
    bubble: float
    """The part of the pipeline's time that a rank waits for others."""
    mfu: float
    """The model's FLOPs, without what is computed again or masked, over the peak."""
    tokens: float
    """Tokens a second and accelerator."""
    linear: float
    """FLOPs of a rank's products with weights, what is computed again included."""
    batched: float
    """FLOPs of its attention, masked parts of its tiles included."""


def clock(job: Job, profile: Profile, gpu: Accelerator) -> Clock:
    """The estimated time of a step."""
    r, alone = job.cfg.recipe, job.mesh.pp == 1
    busy = {way: [0.0] * len(job.ranges) for way in "FB"}
    computing = linear = batched = 0.0
    for stage in range(len(job.ranges)):
        for label in job.labels(stage):
            for way, pieces in (("F", profile.forward), ("B", profile.backward)):
                seen = pieces[profile.of(label)].seen
                one, taken = piece_seconds(job, seen, gpu)
                busy[way][stage] += taken
                computing, linear, batched = computing + one, linear + seen.linear, batched + seen.batched
    each = job.microbatches * r.accumulate / job.mesh.pp  # how often an average rank does it all
    per_sweep = [f + b for f, b in zip(busy["F"], busy["B"], strict=True)]
    bubble = 0.0
    if alone:
        sweep = per_sweep[0] + sum(_wire(job, profile.end.seen.traffic, gpu).values())
    else:
        n = len(per_sweep)
        forward, backward = sum(busy["F"]) / n, sum(busy["B"]) / n
        scale = tuple(max(one * n / sum(per_sweep), 1e-3) for one in per_sweep)
        link = bandwidth(job.mesh, "pp", gpu)
        transfer = carry(job) / link[0] + LAUNCH + link[1]
        timeline = simulate(job.programs, Costs(forward, backward, backward / 2, backward / 2, transfer, scale))
        sweep, bubble = timeline.ticks + before_and_after(job, profile, gpu), timeline.bubble
    updating = update(job, profile, gpu)
    seconds = r.accumulate * sweep + updating
    waiting = sum(per_sweep) * each - computing * each + (0 if alone else r.accumulate * before_and_after(job, profile, gpu))
    useful = flops_per_sequence(job.cfg.model, r.sequence_length) * r.batch_size
    tokens, devices = r.batch_size * r.sequence_length, job.mesh.size
    mfu, rate = useful / (seconds * gpu.peak * devices), tokens / seconds / devices
    return Clock(seconds, computing * each, waiting, updating, bubble, mfu, rate, linear * each, batched * each)


def piece_seconds(job: Job, seen: Seen, gpu: Accelerator) -> tuple[float, float]:
    """Seconds of a piece's computation, and of the piece."""
    computing, wires = _computing(seen, gpu), _wire(job, seen.traffic, gpu)
    waited = computing + sum(seconds for axis, seconds in wires.items() if axis not in OVERLAPPED)
    if job.mesh.pp > 1:  # whose weights and gradients travel before and after
        return computing, waited
    return computing, max(waited, sum(wires.get(axis, 0.0) for axis in OVERLAPPED))


def _computing(seen: Seen, gpu: Accelerator) -> float:
    return seen.linear / (GEMM * gpu.peak) + seen.batched / (ATTENTION * gpu.peak) + seen.moved / (STREAM * gpu.bandwidth)


def before_and_after(job: Job, profile: Profile, gpu: Accelerator) -> float:
    """Seconds in which the slowest pipeline rank gathers its weights and scatters its gradients, with nothing to overlap."""
    found = []
    for rank in range(job.mesh.pp):
        tables = (table[profile.of(label)] for label in held(job, rank) for table in (profile.gathered, profile.reduced))
        found.append(sum(sum(_wire(job, table, gpu).values()) for table in tables))
    return max(found)


def update(job: Job, profile: Profile, gpu: Accelerator) -> float:
    """The optimizer reads and writes the state, reads the gradients, and does its share of what sees whole matrices; the
    slowest pipeline rank's.
    """
    found = []
    for rank in range(job.mesh.pp):
        state = at_rest(job, profile, rank)
        traffic, products = share(whole_updates(job, profile, rank), job.mesh.degree("fsdp"))
        moved = 2 * state.total() + 2 * state["parameters"]
        computing = products / (GEMM * gpu.peak) + moved / (STREAM * gpu.bandwidth)
        found.append(computing + sum(_wire(job, traffic, gpu).values()))
    return max(found)


def _wire(job: Job, traffic: Traffic, gpu: Accelerator) -> dict[str, float]:
    """Seconds of collectives by axis."""
    found: dict[str, float] = {}
    for (axis, kind, unit), n in traffic.items():
        n_ranks = job.mesh.degree(axis)
        if n_ranks == 1:
            continue
        speed, hop = bandwidth(job.mesh, axis, gpu)
        if unit == "calls":
            steps = 2 * math.log2(n_ranks) if kind == "all_reduce" else 1 if kind == "ring_shift" else n_ranks - 1
            seconds = n * (LAUNCH + steps * hop)
        else:
            seconds = n * (1 if kind in ("ring_shift", "send") else (n_ranks - 1) / n_ranks) / speed
            seconds *= 2 if kind == "all_reduce" else 1
        found[axis] = found.get(axis, 0.0) + seconds
    return found


@lru_cache(1024)
def bandwidth(mesh: Mesh, axis: str, gpu: Accelerator) -> tuple[float, float]:
    """Bytes/s of a rank, and seconds a hop, on the links between the ranks of an axis."""
    last = members(axis)[-1]
    stride = prod(getattr(mesh, name) for name in AXES[AXES.index(last) + 1 :])
    here = max(1, min(mesh.degree(axis), gpu.node // stride))
    if mesh.degree(axis) <= here and stride < gpu.node:
        return gpu.link, HOP["link"]
    return min(gpu.link, gpu.network * here), HOP["network"]
