"""How long a step takes: a simple model of computation and communication, and the pipeline's simulation.

The assumptions, none of which has been measured by this project (it has had no GPU):

- A product of matrices runs at `GEMM` of the peak, attention's at `ATTENTION`; elementwise kernels at `STREAM` of the memory's
  bandwidth. Attention's tiles stay on chip, as in FlashAttention; what the plain tiles of `olmo_fn.nn.attend` would move is not counted.
- A collective moves (n - 1) / n of its tensor over the slowest link of its group, an all_reduce twice that, after a fixed latency.
  A group with g ranks in a machine drives g network cards.
- Weights and gradients (``fsdp``, ``dp_replicate``) travel while a neighbouring segment computes: a segment takes the longer of
  the two. ``tp`` and ``cp`` collectives are waited for. Sends of the pipeline overlap as its simulation says.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from olmo_fn.models.count import flops_per_sequence
from olmo_fn.parallel.mesh import AXES, FLATTENED
from olmo_fn.parallel.pipeline.simulate import Costs, simulate
from olmo_fn.plan.accelerators import Accelerator
from olmo_fn.plan.job import Job, Label
from olmo_fn.plan.memory import at_rest
from olmo_fn.plan.profile import Piece, Profile
from olmo_fn.plan.trace import Traffic
from olmo_fn.plan.traffic import carry

GEMM, ATTENTION, STREAM = 0.65, 0.4, 0.75
LATENCY = {"link": 10e-6, "network": 30e-6}
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


def clock(job: Job, profile: Profile, gpu: Accelerator) -> Clock:
    """The estimated time of a step."""
    r = job.cfg.recipe
    busy = {way: [0.0] * len(job.ranges) for way in "FBC"}
    for stage in range(len(job.ranges)):
        for label in job.labels(stage):
            for way, pieces in (("F", profile.forward), ("B", profile.backward)):
                seconds = _piece(job, profile, pieces[profile.of(label)], way, label, gpu)
                busy[way][stage] += seconds[0]
                busy["C"][stage] += seconds[1]
    per_sweep = [f + b for f, b in zip(busy["F"], busy["B"], strict=True)]
    bubble = 0.0
    if job.mesh.pp == 1:
        sweep = per_sweep[0] + sum(_wire(job, profile.end.seen.traffic, gpu).values())
    else:
        n = len(per_sweep)
        forward, backward = sum(busy["F"]) / n, sum(busy["B"]) / n
        scale = tuple(max(one * n / sum(per_sweep), 1e-3) for one in per_sweep)
        link = _bandwidth(job, "pp", gpu)
        transfer = carry(job) / link[0] + link[1]
        timeline = simulate(job.programs, Costs(forward, backward, backward / 2, backward / 2, transfer, scale))
        sweep, bubble = timeline.ticks, timeline.bubble
    update = _update(job, profile, gpu)
    seconds = r.accumulate * sweep + update
    computing = sum(busy["C"]) / job.mesh.pp * job.microbatches * r.accumulate
    waiting = sum(per_sweep) / job.mesh.pp * job.microbatches * r.accumulate - computing
    useful = flops_per_sequence(job.cfg.model, r.sequence_length) * r.batch_size
    tokens = r.batch_size * r.sequence_length
    size = job.mesh.size
    return Clock(seconds, computing, waiting, update, bubble, useful / (seconds * gpu.peak * size), tokens / seconds / size)


def _piece(job: Job, profile: Profile, piece: Piece, way: str, label: Label, gpu: Accelerator) -> tuple[float, float]:
    """Seconds of a piece, and of its computation."""
    seen = piece.seen
    computing = seen.linear / (GEMM * gpu.peak) + seen.batched / (ATTENTION * gpu.peak) + seen.moved / (STREAM * gpu.bandwidth)
    wires = _wire(job, seen.traffic, gpu)
    waited = sum(seconds for axis, seconds in wires.items() if axis not in OVERLAPPED)
    return max(computing + waited, sum(wires.get(axis, 0.0) for axis in OVERLAPPED)), computing


def _update(job: Job, profile: Profile, gpu: Accelerator) -> float:
    """The optimizer reads and writes the state, and reads the gradients; the slowest pipeline rank's."""
    rest = [at_rest(job, profile, rank) for rank in range(job.mesh.pp)]
    moved = max(2 * state.total() + 2 * state["parameters"] for state in rest)
    return moved / (STREAM * gpu.bandwidth)


def _wire(job: Job, traffic: Traffic, gpu: Accelerator) -> dict[str, float]:
    """Seconds of collectives by axis."""
    found: dict[str, float] = {}
    for (axis, kind, unit), n in traffic.items():
        size, (bandwidth, latency) = job.size(axis), _bandwidth(job, axis, gpu)
        if unit == "calls":
            seconds = n * latency
        else:
            passes = {"all_reduce": 2, "ring_shift": size / (size - 1)}.get(kind, 1)
            seconds = n * passes * (size - 1) / size / bandwidth
        found[axis] = found.get(axis, 0.0) + seconds
    return found


def _bandwidth(job: Job, axis: str, gpu: Accelerator) -> tuple[float, float]:
    """Bytes/s of a rank, and latency, on the links between the ranks of an axis."""
    members = FLATTENED.get(axis, (axis,))
    inner = AXES[AXES.index(members[-1]) + 1 :]
    stride = prod(getattr(job.mesh, name) for name in inner)
    here = max(1, min(job.size(axis), gpu.node // stride))
    if job.size(axis) <= here and stride < gpu.node:
        return gpu.link, LATENCY["link"]
    return min(gpu.link, gpu.network * here), LATENCY["network"]
