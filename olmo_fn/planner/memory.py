"""The memory of a rank over a step: its pieces in the order in which they run, and the largest moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from olmo_fn.parallel.pipeline.transfers import AHEAD, most_sends
from olmo_fn.planner.plan_input import Label, PlanInput
from olmo_fn.planner.profile import Piece, Profile

PURPOSES = ("parameters", "optimizer", "ema", "gradients", "weights", "activations", "scratch")


class Peak(NamedTuple):
    """Bytes by purpose at the largest moment of a step, and when that is."""

    memory: Counter[str]
    when: str

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.memory.total()


def peak_memory(plan: PlanInput, profile: Profile, rank: int = 0) -> Peak:
    """The largest moment of pipeline rank ``rank``.

    ``activations`` are those that were kept when the piece began that has the largest moment; what it makes on its way is
    ``scratch``. ``weights`` are gathered ones, and copies in the compute dtype.

    >>> from configs import CONFIGS
    >>> from olmo_fn.planner.plan_input import plan_input
    >>> from olmo_fn.planner.estimate import profile_of
    >>> tiny = plan_input(CONFIGS["olmo2-tiny"])
    >>> peak_memory(tiny, profile_of(tiny)).when
    'forward of head'
    """
    moments = _in_one_sweep(plan, profile) if plan.mesh.pp == 1 else _in_pipeline(plan, profile, rank)
    return max(moments, key=lambda peak: peak.total)


def at_rest(plan: PlanInput, profile: Profile, rank: int = 0) -> Counter[str]:
    """Bytes of parameters, optimizer and ema of a pipeline rank."""
    return sum((profile[label].state for label in plan.stored(rank)), Counter(optimizer=profile.control))


def host_memory(plan: PlanInput, profile: Profile, rank: int = 0) -> int:
    """The most bytes that a pipeline rank keeps in host memory: what all its segments that run twice keep, offloaded."""
    kept = most = 0
    for action in plan.programs[rank] if plan.mesh.pp > 1 else ():
        moved = sum(profile[label].forward.seen.host for label in plan.labels[action.chunk * plan.mesh.pp + rank])
        kept += moved * ({"F": 1, "W": 0}.get(action.op, -1))
        most = max(most, kept)
    return most if plan.mesh.pp > 1 else sum(profile[label].forward.seen.host for label in plan.held(0))


def _moment(live: Counter[str], piece: Piece, when: str, label: Label | None = None, apart: tuple[str, ...] = ()) -> Peak:
    memory = Counter(live)
    for purpose in {*piece.seen.peak, *piece.seen.start}.difference(apart):
        memory[purpose] += piece.seen.peak[purpose] - piece.seen.start[purpose]
    kept = min(live["activations"], memory["activations"])
    memory["scratch"] = memory["activations"] - kept
    memory["activations"] = kept
    return Peak(memory, when if label is None else f"{when} of {f'block {label}' if isinstance(label, int) else label}")


def _in_one_sweep(plan: PlanInput, profile: Profile) -> Iterator[Peak]:
    """One sweep a part of the batch, as the tape does it. Gradients of parts are added up in fp32."""
    labels, rest = plan.held(0), at_rest(plan, profile)
    swept, wide = (Counter(gradients=sum(getattr(profile[label], name) for label in labels)) for name in ("swept", "gradients"))
    pieces: list[tuple[str, Label | None, Piece]] = [("begin", None, profile.begin)]
    pieces += [("forward", label, profile[label].forward) for label in labels]
    pieces += [("backward", label, profile[label].backward) for label in reversed(labels)]
    parts = min(plan.cfg.recipe.accumulate, 2)
    for part in range(parts):
        before = rest + (wide if part else Counter())
        live = Counter(before)
        for when, label, piece in (*pieces, ("end", None, profile.end)):
            yield _moment(live, piece, when, label)
            live.update(piece.grown)
        if part == 0 and parts > 1 and swept != wide:
            yield Peak(before + swept + wide, "widening the gradients")
    yield _moment(rest + (swept if parts == 1 else wide), profile.update, "update")


def _in_pipeline(plan: PlanInput, profile: Profile, rank: int) -> Iterator[Peak]:
    """The rank's program. Activations live from F until B or W; weights are gathered once and stay, gradients are added up
    whole and scattered together at the end (`olmo_fn.parallel.pipeline.sweep`).
    """
    parts, rest, stream = [profile[label] for label in plan.held(rank)], at_rest(plan, profile, rank), profile.carry
    gradients, whole = sum(part.gradients for part in parts), sum(part.whole_gradients for part in parts)
    before = gradients if plan.cfg.recipe.accumulate > 1 else 0
    sends = most_sends(plan.mesh.pp, plan.microbatches, plan.cfg.mesh.pp_chunks)
    live = rest + Counter(gradients=before + whole, activations=(sends + AHEAD) * stream)
    live["weights"] += sum(part.weights for part in parts)
    for action in plan.programs[rank]:
        stage = action.chunk * plan.mesh.pp + rank
        sign = {"F": 1, "I": 0}.get(action.op, -1)
        for label in plan.labels[stage] if action.op == "F" else reversed(plan.labels[stage]):
            piece = profile[label].forward if action.op == "F" else profile[label].backward
            if action.op != "W":
                yield _moment(live, piece, str(action), label, apart=("weights", "gradients"))
            live["activations"] += sign * profile[label].forward.grown["activations"]
        live["activations"] += sign * stream * (stage > 0)  # the carry that came from the stage before
    sent = whole if plan.mesh.degree("data") * plan.mesh.cp > 1 else 0
    yield Peak(live + Counter(gradients=sent + (gradients if plan.mesh.degree("fsdp") > 1 else 0)), "reducing the gradients")
    yield _moment(rest + Counter(gradients=gradients), profile.update, "update")
