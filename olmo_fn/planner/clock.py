"""How long a step takes: a simple model of computation and communication, and the pipeline's simulation.

The assumptions, none of which has been measured by this project (it has had no GPU); the figures, and what each is from, are in
`olmo_fn.planner.accelerators`:

- A product of matrices takes whole rounds of its tiles at a share of the peak; those of experts, each of which fills tiles of
  its own, take as long as their matrices take to be read if that is longer. Attention takes the share of its backend, for pairs
  that see each other; elementwise kernels move their bytes at a share of the memory's bandwidth.
- The host takes so long for each launch. It runs ahead of the GPU; where all its launches take longer than the GPU's work,
  that is how long a sweep takes.
- A collective moves (n - 1) / n of its tensor over the slowest link of its group, an all_reduce twice that. It takes `LAUNCH`,
  and `HOP` for each of the n - 1 steps of a ring, an all_reduce for the 2 log n of a tree. A group with g ranks in a machine
  drives g network cards.
- Weights and gradients (``fsdp``, for experts ``edp``, and ``dp_replicate``) travel while a neighbouring segment computes: a
  segment takes the longer of the two, and its computing lacks the multiprocessors that the collective occupies. What stages
  send, over ``tp``, ``cp`` and to experts and back over ``ep``, is waited for, also where a shared network computes meanwhile.
  A pipeline gathers its weights before it begins and scatters its gradients when it has ended, which nothing overlaps with;
  its sends overlap as its simulation says.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from math import log2, prod

from olmo_fn.mesh.mesh import FINEST, Mesh, members
from olmo_fn.models.count import flops_per_sequence
from olmo_fn.planner.accelerators import (
    ATTENTION,
    CHANNELS,
    COMPILED,
    EAGER,
    PROCESSORS,
    PRODUCTS,
    PRODUCTS_FP8,
    STREAM,
    WIRE,
)
from olmo_fn.planner.memory import at_rest
from olmo_fn.planner.pipeline_simulate import Costs, simulate
from olmo_fn.planner.plan_input import PlanInput
from olmo_fn.planner.profile import Profile
from olmo_fn.planner.trace import Seen, Traffic
from olmo_fn.planner.traffic import share, whole_updates
from olmo_fn.train.accelerators import Accelerator

HOP = {"link": 1e-6, "network": 5e-6}  # seconds from one rank to the next
LAUNCH = 10e-6  # seconds a collective takes before anything moves
OVERLAPPED = ("fsdp", "edp", "dp_outer", "dp_replicate")
HOST = 50e9  # bytes/s between a device and its host's memory, one way: PCIe 5, 16 lanes


@dataclass(frozen=True)
class Clock:
    """Seconds of a step and where they go; fractions of them for one pipeline rank on average."""

    seconds: float
    computing: float
    waiting: float
    """For tp, cp, ep and what of fsdp traffic is longer than what it overlaps with."""
    update: float
    bubble: float
    """The part of the pipeline's time that a rank waits for others."""
    mfu: float
    """The model's FLOPs, without what is computed again or masked, over the peak."""
    tokens: float
    """Tokens a second and accelerator."""
    products: float
    """FLOPs of a rank's products of matrices, what is computed again included."""
    attention: float
    """FLOPs of its attention."""
    moved: float
    """Bytes that its elementwise kernels read and write."""
    launches: Counter[str]
    """Kernels launched "eager", and calls of "compiled" functions."""
    host: float
    """Seconds of the host for these; those beyond the GPU's work are waited for."""


def clock(plan: PlanInput, profile: Profile, gpu: Accelerator) -> Clock:
    """The estimated time of a step."""
    r, mesh, n = plan.cfg.recipe, plan.mesh, len(plan.labels)
    forward, backward, seen, computing = [0.0] * n, [0.0] * n, Seen(), 0.0
    for stage, labels in enumerate(plan.labels):
        for label in labels:
            for busy, piece in ((forward, profile[label].forward.seen), (backward, profile[label].backward.seen)):
                one = _computing(piece, gpu)
                busy[stage] += max(_with_traffic(mesh, one, piece.traffic + piece.beyond, gpu), piece.host / HOST)
                computing, seen.products, seen.moved = computing + one, seen.products + piece.products, seen.moved + piece.moved
                seen.attention.update(piece.attention)
                seen.launches.update(piece.launches)
    times = plan.microbatches * r.accumulate / mesh.pp  # how often an average rank does it all
    both, bubble, apart = [f + b for f, b in zip(forward, backward, strict=True)], 0.0, 0.0
    if mesh.pp == 1:
        apart = sum(sum(_wire(mesh, piece.seen.traffic, gpu).values()) for piece in (profile.begin, profile.end))
        sweep = both[0] + apart
    else:
        f, b = sum(forward) / n, sum(backward) / n
        relative = tuple(max(one * n / sum(both), 1e-3) for one in both)
        speed, hop = bandwidth(mesh, "pp", gpu)
        costs = Costs(f, b, b / 2, b / 2, profile.carry / speed + LAUNCH + hop, relative)
        timeline, apart = simulate(plan.programs, costs), max(_apart(plan, profile, gpu, rank) for rank in range(mesh.pp))
        sweep, bubble = timeline.ticks + apart, timeline.bubble
    host = times * (seen.launches["eager"] * EAGER + seen.launches["compiled"] * COMPILED)
    update = max(_update(plan, profile, gpu, rank) for rank in range(mesh.pp))
    seconds = max(r.accumulate * sweep, host) + update
    waiting = max(0.0, seconds - update - computing * times) if mesh.pp == 1 else 0.0
    if mesh.pp > 1:
        waiting = max(0.0, (sum(both) - computing) * times + r.accumulate * apart)
    mfu = flops_per_sequence(plan.cfg.model, r.sequence_length) * r.batch_size / (seconds * gpu.peak * mesh.size)
    tokens = r.batch_size * r.sequence_length / seconds / mesh.size
    launches = Counter({kind: round(count * times) for kind, count in seen.launches.items()})
    rest = (seen.products * times, seen.attention.total() * times, seen.moved * times, launches, host)
    return Clock(seconds, computing * times, waiting, update, bubble, mfu, tokens, *rest)


def _computing(seen: Seen, gpu: Accelerator) -> float:
    products = (seen.tiled - seen.fp8 - seen.grouped) / PRODUCTS + seen.fp8 / (2 * PRODUCTS_FP8)
    experts = max(seen.grouped / (PRODUCTS * gpu.peak), seen.fed / (STREAM * gpu.bandwidth))
    attention = 0.0
    for key, flops in seen.attention.items():
        backend, way = key.split()
        attention += flops / ATTENTION[backend][way == "backward"]
    return (products + attention) / gpu.peak + experts + seen.moved / (STREAM * gpu.bandwidth)


def _with_traffic(mesh: Mesh, computing: float, traffic: Traffic, gpu: Accelerator) -> float:
    """Seconds of a piece: what is waited for comes to its computing, what travels beside it slows it and may take longer."""
    wires = _wire(mesh, traffic, gpu)
    if mesh.pp > 1:  # in a pipeline these travel before and after
        return computing + sum(seconds for axis, seconds in wires.items() if axis not in OVERLAPPED)
    beside = {axis: wires.pop(axis) for axis in OVERLAPPED if axis in wires}
    slowed = sum(seconds * CHANNELS[link(mesh, axis, gpu)] / PROCESSORS for axis, seconds in beside.items())
    return max(computing + slowed + sum(wires.values()), sum(beside.values()))


def _apart(plan: PlanInput, profile: Profile, gpu: Accelerator, rank: int) -> float:
    """Seconds in which a pipeline rank gathers its weights and scatters its gradients, with nothing to overlap."""
    tables = [table for label in plan.held(rank) for table in (profile[label].gathered, profile[label].reduced)]
    return sum(sum(_wire(plan.mesh, table, gpu).values()) for table in tables)


def _update(plan: PlanInput, profile: Profile, gpu: Accelerator, rank: int) -> float:
    """The optimizer reads and writes the state, reads the gradients, and does its share of what sees whole matrices."""
    state = at_rest(plan, profile, rank)
    traffic, products = share(whole_updates(plan, profile, rank), plan.mesh)
    moved = 2 * state.total() + 2 * state["parameters"]
    return products / (PRODUCTS * gpu.peak) + moved / (STREAM * gpu.bandwidth) + sum(_wire(plan.mesh, traffic, gpu).values())


def _wire(mesh: Mesh, traffic: Traffic, gpu: Accelerator) -> dict[str, float]:
    """Seconds of collectives by axis."""
    found: dict[str, float] = {}
    for (axis, kind, unit), n in traffic.items():
        if mesh.degree(axis) > 1:
            calls, size = (n, 0) if unit == "calls" else (0, n)
            if kind == "all_gather" and axis in OVERLAPPED:
                calls = min(calls, 1)  # NCCL takes those of a segment as one (`olmo_fn.mesh.collectives.gather_each`)
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
    kind, (_, here) = link(mesh, axis, gpu), _inside(mesh, axis, gpu)
    speed = gpu.link if kind == "link" else min(gpu.link, gpu.network * here)
    return WIRE * speed, HOP[kind]


def link(mesh: Mesh, axis: str, gpu: Accelerator) -> str:
    """What the slowest connection of an axis is: a ``link`` inside of a machine, or the ``network``."""
    stride, here = _inside(mesh, axis, gpu)
    return "link" if mesh.degree(axis) <= here and stride < gpu.node else "network"


def _inside(mesh: Mesh, axis: str, gpu: Accelerator) -> tuple[int, int]:
    """How many ranks are from one of an axis to the next, and how many of the axis are in a machine."""
    last = next((name for name in reversed(members(axis)) if mesh.degree(name) > 1), members(axis)[-1])
    stride = prod(getattr(mesh, name) for name in FINEST[FINEST.index(last) + 1 :])
    return stride, max(1, min(mesh.degree(axis), gpu.node // stride))
