"""What a rank sends in a step: how often and how many bytes, by process group and kind of collective."""

from __future__ import annotations

from collections import Counter

from olmo_fn.mesh.axis import NAMES
from olmo_fn.mesh.mesh import members
from olmo_fn.planner.job import Job
from olmo_fn.planner.memory import carry, held, whole_updates
from olmo_fn.planner.profile import Profile
from olmo_fn.planner.trace import Traffic
from olmo_fn.planner.whole import share


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
    add(total, share(whole_updates(job, profile, rank), job.mesh.degree("fsdp"))[0], 1)
    finished = sum(profile.finished.get(label, 0) for label in labels)
    if finished:
        add(total, _call("tokens", "all_reduce", finished), parts)
    for key in [key for key in total if key[0] == "world"]:
        del total[key]
    if job.mesh.size > 1:  # the norm of the gradient, once a step
        add(total, _call("world", "all_reduce", 8), 1)
    return +total


def shared_groups(job: Job, traffic: Traffic) -> Traffic:
    """The same with every axis called by the first in `Axes` over the same ranks, as these share a process group."""
    lines: dict[tuple[int, ...], str] = {}
    for name in NAMES:
        lines.setdefault(job.mesh.ranks(members(name), 0), name)
    found: Traffic = Counter()
    for (axis, kind, unit), n in traffic.items():
        found[lines[job.mesh.ranks(members(axis), 0)], kind, unit] += n
    return found


def add(total: Traffic, more: Traffic, times: int) -> None:
    """Add ``more`` so many times."""
    for key, n in more.items():
        total[key] += n * times


def _without_segments(job: Job, profile: Profile) -> Traffic:
    """What ends a sweep: sums over tokens, in a pipeline over its ranks too; gradients of tied weights over its two ends."""
    found = Counter({key: n for key, n in profile.end.seen.traffic.items() if key[0] == "tokens"})
    found += _call("pp", "all_reduce", 12)
    return found + _call("pp", "all_reduce", profile.state["embed"]["parameters"]) if job.cfg.model.tie_embeddings else found


def _call(axis: str, kind: str, size: int) -> Traffic:
    return Counter({(axis, kind, "calls"): 1, (axis, kind, "bytes"): size})


def _sent(job: Job, rank: int) -> Traffic:
    """What goes to other pipeline ranks for one part of the batch: a carry each way."""
    last, found = len(job.ranges) - 1, 0
    for action in job.programs[rank]:
        stage = action.chunk * job.mesh.pp + rank
        found += (action.op == "F" and stage < last) or (action.op in "BI" and stage > 0)
    return Counter({("pp", "send", "calls"): found, ("pp", "send", "bytes"): found * carry(job)})
