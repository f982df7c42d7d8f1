"""The memory of a rank over a step: its pieces in the order in which they run, and the largest moment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from olmo_fn.parallel.pipeline.transfers import AHEAD, most_sends
from olmo_fn.planner.job import Job, Label
from olmo_fn.planner.profile import Piece, Profile
from olmo_fn.planner.whole import WholeUpdate

PURPOSES = ("parameters", "optimizer", "ema", "gradients", "weights", "activations", "scratch")


class Peak(NamedTuple):
    """Bytes by purpose at the largest moment of a step, and when that is."""

    memory: Counter[str]
    when: str

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.memory.total()


def peak_memory(job: Job, profile: Profile, rank: int = 0) -> Peak:
    """The largest moment of pipeline rank ``rank``.

    ``activations`` are those that were kept when the piece began that has the largest moment; what it makes on its way is
    ``scratch``. ``weights`` are gathered ones, and copies in the compute dtype.
    """
    moments = _alone(job, profile) if job.mesh.pp == 1 else _in_pipeline(job, profile, rank)
    return max(moments, key=lambda peak: peak.total)


def at_rest(job: Job, profile: Profile, rank: int = 0) -> Counter[str]:
    """Bytes of parameters, optimizer and ema of a pipeline rank."""
    labels = held(job, rank)
    if job.cfg.model.tie_embeddings and "head" in labels:
        labels |= {"embed"}
    control = Counter(optimizer=profile.control)
    return sum((profile.state.get(profile.of(label), Counter()) for label in labels), control)


def held(job: Job, rank: int) -> set[Label]:
    """What a pipeline rank holds."""
    return {label for stage in range(rank, len(job.ranges), job.mesh.pp) for label in job.labels(stage)}


def whole_updates(job: Job, profile: Profile, rank: int) -> list[WholeUpdate]:
    """Of a pipeline rank's parameters, in the order of the model."""
    order: tuple[Label, ...] = ("embed", *range(job.cfg.model.n_layers), "head")
    here = held(job, rank)
    return [update for label in order if label in here for update in profile.whole_updates.get(profile.of(label), [])]


def _moment(live: Counter[str], piece: Piece, when: str, apart: tuple[str, ...] = ()) -> Peak:
    memory = Counter(live)
    for purpose in {*piece.seen.peak, *piece.seen.start}.difference(apart):
        memory[purpose] += piece.seen.peak[purpose] - piece.seen.start[purpose]
    kept = min(live["activations"], memory["activations"])
    memory["scratch"] = memory["activations"] - kept
    memory["activations"] = kept
    return Peak(memory, when)


def _alone(job: Job, profile: Profile) -> Iterator[Peak]:
    """One sweep a part of the batch, as the tape does it; from the second on the gradients of those before are there."""
    labels = job.labels(0)
    rest = at_rest(job, profile)
    gradients = Counter(gradients=sum(profile.gradients.get(profile.of(label), 0) for label in labels))
    for part in range(min(job.cfg.recipe.accumulate, 2)):
        live = rest + (gradients if part else Counter())
        for when, piece in _sweep(profile, labels):
            yield _moment(live, piece, when)
            live.update(piece.grown)
    yield _moment(rest + gradients, profile.update, "update")


def _sweep(profile: Profile, labels: tuple[Label, ...]) -> Iterator[tuple[str, Piece]]:
    yield "begin", profile.begin
    for label in labels:
        yield f"forward of {_name(label)}", profile.forward[profile.of(label)]
    for label in reversed(labels):
        yield f"backward of {_name(label)}", profile.backward[profile.of(label)]
    yield "end", profile.end


def _name(label: Label) -> str:
    return f"block {label}" if isinstance(label, int) else label


def carry(job: Job) -> int:
    """Bytes that go from one virtual stage to the next: this rank's part of the residual stream."""
    positions = job.rows * job.cfg.recipe.sequence_length // (job.mesh.cp * job.mesh.tp)
    return positions * job.cfg.model.d_model * (2 if job.dtype == "bfloat16" else 4)


def _in_pipeline(job: Job, profile: Profile, rank: int) -> Iterator[Peak]:
    """The rank's program. Activations live from F until B or W; weights are gathered once and stay, gradients are added up
    whole and scattered together at the end (`olmo_fn.parallel.pipeline.sweep`).
    """
    rest, labels = at_rest(job, profile, rank), [profile.of(label) for label in held(job, rank)]
    gradients = sum(profile.gradients.get(label, 0) for label in labels)
    before = Counter(gradients=gradients) if job.cfg.recipe.accumulate > 1 else Counter[str]()
    whole = sum(profile.whole.get(label, 0) for label in labels)
    weights = Counter(weights=sum(profile.in_use[label] for label in labels))
    sends = most_sends(job.mesh.pp, job.microbatches, job.cfg.mesh.pp_chunks)
    live = rest + before + weights + Counter(gradients=whole, activations=(sends + AHEAD) * carry(job))
    for action in job.programs[rank]:
        ours = job.labels(action.chunk * job.mesh.pp + rank)
        for label in ours if action.op == "F" else reversed(ours):
            pieces = profile.forward if action.op == "F" else profile.backward
            if action.op != "W":
                yield _moment(live, pieces[profile.of(label)], f"{action} of {_name(label)}", ("weights", "gradients"))
            activations = profile.forward[profile.of(label)].grown["activations"]
            live["activations"] += {"F": activations, "I": 0}.get(action.op, -activations)
        if ours[0] != "embed":  # the carry that came from the stage before
            live["activations"] += {"F": carry(job), "I": 0}.get(action.op, -carry(job))
    sent = whole if job.mesh.degree("data") * job.mesh.cp > 1 else 0
    yield Peak(live + Counter(gradients=sent + (gradients if job.mesh.degree("fsdp") > 1 else 0)), "reducing the gradients")
    yield _moment(rest + Counter(gradients=gradients), profile.update, "update")
