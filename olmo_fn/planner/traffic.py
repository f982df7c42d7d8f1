"""What a rank sends in a step: how often and how many bytes, by process group and kind of collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.planner.plan_input import PlanInput, owners
from olmo_fn.planner.profile import Profile, WholeUpdate
from olmo_fn.planner.trace import Traffic


def traffic(plan: PlanInput, profile: Profile, rank: int = 0) -> Traffic:
    """All collectives of one step on pipeline rank ``rank``, and what it sends to other stages.

    Bytes are those of the whole tensor: the result of an all_gather, the argument of the others.
    """
    parts, times, total = [profile[label] for label in plan.held(rank)], plan.cfg.recipe.accumulate, Traffic()
    pieces = [piece for part in parts for piece in (part.forward, part.backward)]
    if plan.mesh.pp == 1:
        for piece in (profile.begin, *pieces, profile.end):
            _add(total, piece.seen.traffic, times)
    else:  # what is gathered and reduced comes once, the rest for every micro-batch
        for piece in pieces:
            _add(total, piece.inside, times * plan.microbatches)
        for part in parts:
            _add(total, part.gathered + part.reduced, times)
        _add(total, _between_stages(plan, profile, rank), times)
    _add(total, profile.update.seen.traffic, 1)
    _add(total, share(whole_updates(plan, profile, rank), plan.mesh)[0], 1)
    for axes, size in sum((part.late_gradients for part in parts), Counter[tuple[str, ...]]()).items():
        for axis in axes:  # one sum after the other
            _add(total, _calls(axis, "all_reduce", 1, size), times)
    for axis in ("tokens", "pp"):
        if plan.mesh.degree(axis) > 1:
            for size in profile.reports.values():
                _add(total, _calls(axis, "all_reduce", 1, size), times)
    total = Traffic({key: n for key, n in total.items() if key[0] != "world"})
    if plan.mesh.size > 1:  # the norm of the gradient, once a step
        total += _calls("world", "all_reduce", 1, 8)
    return +total


def whole_updates(plan: PlanInput, profile: Profile, rank: int) -> list[WholeUpdate]:
    """Of a pipeline rank's parameters, in the order of the model."""
    return [update for label in plan.held(rank) for update in profile[label].whole_updates]


def share(updates: list[WholeUpdate], mesh: Mesh) -> tuple[Traffic, int]:
    """Collectives, and FLOPs of products, of the first rank: of an axis with n it does the first of every round of n.

    >>> one = WholeUpdate(dealt="fsdp", parts=16, rows=16, products=100, inside=Traffic())
    >>> traffic, products = share([one] * 3, Mesh(dp_shard=2))
    >>> traffic["fsdp", "all_to_all", "calls"], traffic["fsdp", "all_to_all", "bytes"], products
    (4, 112, 200)
    """
    own, traffic = [update for update in updates if not update.dealt], Traffic()
    for axis in dict.fromkeys(update.dealt for update in updates if update.dealt):
        dealt, n = [update for update in updates if update.dealt == axis], mesh.degree(axis)
        sent = sum(update.parts for update in dealt) + n * sum(update.rows for update in dealt[::n])
        traffic += _calls(axis, "all_to_all", 2 * len(dealt[::n]), sent)
        own += dealt[::n]
    return sum((update.inside for update in own), traffic), sum(update.products for update in own)


def _add(total: Traffic, more: Mapping[tuple[str, str, str], int], times: int) -> None:
    total.update({key: n * times for key, n in more.items()})


def _calls(axis: str, kind: str, times: int, size: int) -> Traffic:
    return Traffic({(axis, kind, "calls"): times, (axis, kind, "bytes"): size})


def _between_stages(plan: PlanInput, profile: Profile, rank: int) -> Traffic:
    """For one part of the batch: a carry each way, gradients of tied weights."""
    last, sends = len(plan.labels) - 1, 0
    for action in plan.programs[rank]:
        stage = action.chunk * plan.mesh.pp + rank
        sends += (action.op == "F" and stage < last) or (action.op in "BI" and stage > 0)
    found = _calls("pp", "send", sends, sends * profile.carry)
    first = owners(plan.cut.chain, plan.cut.specs)
    tied = {first[path] for path, ranks in plan.cut.owners.items() if len(ranks) > 1}
    return found + _calls("pp", "all_reduce", 1, sum(profile[label].state["parameters"] for label in tied)) if tied else found
