"""What a rank sends in a step: how often and how many bytes, by process group and kind of collective."""

from __future__ import annotations

from collections import Counter

from olmo_fn.plan.job import Job
from olmo_fn.plan.memory import held
from olmo_fn.plan.profile import Profile
from olmo_fn.plan.trace import Traffic

def traffic(job: Job, profile: Profile, rank: int = 0) -> Traffic:
    """All collectives of one step on pipeline rank ``rank``, and what it sends to other stages.

    Bytes are those of the whole tensor: the result of an all_gather, the argument of the others.
    """
    labels = [profile.of(label) for label in held(job, rank)]
    parts = job.cfg.recipe.accumulate
    total: Traffic = Counter()
    if job.mesh.pp == 1:
        for piece in (profile.begin, *(p[label] for p in (profile.forward, profile.backward) for label in labels), profile.end):
            add(total, piece.seen.traffic, parts)
    else:  # what is gathered and reduced comes once, the rest for every micro-batch
        for label in labels:
            for pieces in (profile.forward, profile.backward):
                inside = {key: n for key, n in pieces[label].seen.traffic.items() if key[0] in ("tp", "cp")}
                add(total, Counter(inside), parts * job.microbatches)
            add(total, profile.gathered[label] + profile.reduced[label], parts)
        add(total, _sent(job, rank), parts)
        add(total, _without_segments(job, profile), parts)
    add(total, profile.update.seen.traffic, 1)
    for key, n in profile.end.seen.traffic.items():
        if key[0] == "world":  # the norm of the gradient: once a step
            total[key] -= n * (parts - 1)
    return total


def add(total: Traffic, more: Traffic, times: int) -> None:
    """Add ``more`` so many times."""
    for key, n in more.items():
        total[key] += n * times


def _without_segments(job: Job, profile: Profile) -> Traffic:
    """What ends a sweep: sums over tokens, in a pipeline over its ranks too, and the norm."""
    found = Counter({key: n for key, n in profile.end.seen.traffic.items() if key[0] in ("tokens", "world")})
    return found + Counter({("pp", "all_reduce", "calls"): 1, ("pp", "all_reduce", "bytes"): 12})


def carry(job: Job) -> int:
    """Bytes that go from one virtual stage to the next: this rank's part of the residual stream."""
    positions = job.rows * job.cfg.recipe.sequence_length // (job.mesh.cp * job.mesh.tp)
    return positions * job.cfg.model.d_model * (2 if job.dtype == "bfloat16" else 4)


def _sent(job: Job, rank: int) -> Traffic:
    """What goes to other pipeline ranks for one part of the batch: a carry each way."""
    last, found = len(job.ranges) - 1, 0
    for action in job.programs[rank]:
        stage = action.chunk * job.mesh.pp + rank
        found += (action.op == "F" and stage < last) or (action.op in "BI" and stage > 0)
    return Counter({("pp", "send", "calls"): found, ("pp", "send", "bytes"): found * carry(job)})
