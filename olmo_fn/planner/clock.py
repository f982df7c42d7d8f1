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

from dataclasses import dataclass
from functools import lru_cache
from math import log2, prod

from olmo_fn.mesh.mesh import AXES, Mesh, members
from olmo_fn.models.count import flops_per_sequence
from olmo_fn.planner.accelerators import Accelerator
from olmo_fn.planner.memory import at_rest
from olmo_fn.planner.pipeline_simulate import Costs, simulate
from olmo_fn.planner.plan_input import PlanInput
from olmo_fn.planner.profile import Profile
from olmo_fn.planner.trace import Seen, Traffic
from olmo_fn.planner.traffic import share, whole_updates

GEMM, ATTENTION, STREAM = 0.65, 0.4, 0.75
HOP = {"link": 1e-6, "network": 5e-6}  # seconds from one rank to the next
LAUNCH = 10e-6  # seconds a collective takes before anything moves
OVERLAPPED = ("fsdp", "dp_replicate")
HOST = 50e9  # bytes/s between a device and its host's memory, one way: PCIe 5, 16 lanes


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


def clock(plan: PlanInput, profile: Profile, gpu: Accelerator) -> Clock:
    """The estimated time of a step."""
    r, mesh, n = plan.cfg.recipe, plan.mesh, len(plan.labels)
    forward, backward, seen, computing = [0.0] * n, [0.0] * n, Seen(), 0.0
    for stage, labels in enumerate(plan.labels):
        for label in labels:
            for busy, piece in ((forward, profile[label].forward.seen), (backward, profile[label].backward.seen)):
                one = _computing(piece, gpu)
                busy[stage] += max(_with_traffic(mesh, one, piece.traffic, gpu), piece.host / HOST)
                computing, seen.linear, seen.batched = computing + one, seen.linear + piece.linear, seen.batched + piece.batched
    times = plan.microbatches * r.accumulate / mesh.pp  # how often an average rank does it all
    both, bubble, apart = [f + b for f, b in zip(forward, backward, strict=True)], 0.0, 0.0
    if mesh.pp == 1:
        sweep = both[0] + sum(_wire(mesh, profile.end.seen.traffic, gpu).values())
    else:
        f, b = sum(forward) / n, sum(backward) / n
        relative = tuple(max(one * n / sum(both), 1e-3) for one in both)
        speed, hop = bandwidth(mesh, "pp", gpu)
        costs = Costs(f, b, b / 2, b / 2, profile.carry / speed + LAUNCH + hop, relative)
        timeline, apart = simulate(plan.programs, costs), max(_apart(plan, profile, gpu, rank) for rank in range(mesh.pp))
        sweep, bubble = timeline.ticks + apart, timeline.bubble
    update = max(_update(plan, profile, gpu, rank) for rank in range(mesh.pp))
    seconds = r.accumulate * sweep + update
    waiting = max(0.0, (sum(both) - computing) * times + r.accumulate * apart)  # without traffic just a rounding
    mfu = flops_per_sequence(plan.cfg.model, r.sequence_length) * r.batch_size / (seconds * gpu.peak * mesh.size)
    tokens = r.batch_size * r.sequence_length / seconds / mesh.size
    return Clock(seconds, computing * times, waiting, update, bubble, mfu, tokens, seen.linear * times, seen.batched * times)


def _computing(seen: Seen, gpu: Accelerator) -> float:
    return seen.linear / (GEMM * gpu.peak) + seen.batched / (ATTENTION * gpu.peak) + seen.moved / (STREAM * gpu.bandwidth)


def _with_traffic(mesh: Mesh, computing: float, traffic: Traffic, gpu: Accelerator) -> float:
    """Seconds of a piece: what is waited for comes to its computing, what travels beside it may take longer."""
    wires = _wire(mesh, traffic, gpu)
    beside = sum(wires.pop(axis, 0.0) for axis in OVERLAPPED)
    waited = computing + sum(wires.values())
    return waited if mesh.pp > 1 else max(waited, beside)  # in a pipeline these travel before and after


def _apart(plan: PlanInput, profile: Profile, gpu: Accelerator, rank: int) -> float:
    """Seconds in which a pipeline rank gathers its weights and scatters its gradients, with nothing to overlap."""
    tables = [table for label in plan.held(rank) for table in (profile[label].gathered, profile[label].reduced)]
    return sum(sum(_wire(plan.mesh, table, gpu).values()) for table in tables)


def _update(plan: PlanInput, profile: Profile, gpu: Accelerator, rank: int) -> float:
    """The optimizer reads and writes the state, reads the gradients, and does its share of what sees whole matrices."""
    state = at_rest(plan, profile, rank)
    traffic, products = share(whole_updates(plan, profile, rank), plan.mesh.degree("fsdp"))
    moved = 2 * state.total() + 2 * state["parameters"]
    return products / (GEMM * gpu.peak) + moved / (STREAM * gpu.bandwidth) + sum(_wire(plan.mesh, traffic, gpu).values())


def _wire(mesh: Mesh, traffic: Traffic, gpu: Accelerator) -> dict[str, float]:
    """Seconds of collectives by axis."""
    found: dict[str, float] = {}
    for (axis, kind, unit), n in traffic.items():
        if mesh.degree(axis) > 1:
            calls, size = (n, 0) if unit == "calls" else (0, n)
            found[axis] = found.get(axis, 0.0) + collective(mesh, axis, kind, calls, size, gpu)
    return found


def collective(mesh: Mesh, axis: str, kind: str, calls: float, size: float, gpu: Accelerator) -> float:
    """Seconds of so many collectives over an axis, for whole tensors of ``size`` bytes in all."""
    ranks, (speed, hop) = mesh.degree(axis), bandwidth(mesh, axis, gpu)
    steps = 2 * log2(ranks) if kind == "all_reduce" else 1 if kind == "ring_shift" else ranks - 1
    part = 1 if kind in ("ring_shift", "send") else (ranks - 1) / ranks
    return calls * (LAUNCH + steps * hop) + size * part * (2 if kind == "all_reduce" else 1) / speed


@lru_cache(1024)
def bandwidth(mesh: Mesh, axis: str, gpu: Accelerator) -> tuple[float, float]:
    """Bytes/s of a rank, and seconds a hop, on the links between the ranks of an axis."""
    stride = prod(getattr(mesh, name) for name in AXES[AXES.index(members(axis)[-1]) + 1 :])
    here = max(1, min(mesh.degree(axis), gpu.node // stride))
    if mesh.degree(axis) <= here and stride < gpu.node:
        return gpu.link, HOP["link"]
    return min(gpu.link, gpu.network * here), HOP["network"]
