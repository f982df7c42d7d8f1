"""A pipeline on paper: when each action runs, how long ranks wait, how many activations they keep. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

from olmo_fn.parallel.pipeline.schedule import Action, Program


@dataclass(frozen=True)
class Costs:
    """Ticks of the actions of a virtual stage, and of a transfer between ranks, which overlaps with computation."""

    F: float = 1
    """Forward."""
    B: float = 2
    """Backward."""
    I: float = 1
    """Backward for the input."""
    W: float = 1
    """Backward for the weights."""
    transfer: float = 0
    """From rank to rank."""
    stages: tuple[float, ...] = ()
    """What each virtual stage costs relative to these; all the same when empty."""

    def check(self, stages: int) -> None:
        """ValueError for costs that are not positive, or not of this many virtual stages."""
        if min(self.F, self.B, self.I, self.W, *self.stages) <= 0 or self.transfer < 0:
            raise ValueError(f"costs must be positive, and that of a transfer at least 0: {self}")
        if self.stages and len(self.stages) != stages:
            raise ValueError(f"there are costs of {len(self.stages)} stages, but {stages} virtual stages (ranks times chunks)")

    def of(self, action: Action, stage: int) -> float:
        """Ticks of ``action`` on virtual stage ``stage``."""
        return float(getattr(self, action.op)) * (self.stages[stage] if self.stages else 1)


class Slot(NamedTuple):
    """An action and when it runs."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What a simulation found; everything is by rank."""

    slots: tuple[tuple[Slot, ...], ...]
    chunks: int

    @property
    def ticks(self) -> float:
        """From the first start to the last end."""
        return max(slot.end for slots in self.slots for slot in slots)

    @property
    def bubbles(self) -> tuple[float, ...]:
        """The part of the time that a rank waits."""
        return tuple(1 - sum(slot.end - slot.start for slot in slots) / self.ticks for slots in self.slots)

    @property
    def bubble(self) -> float:
        """The part of all ranks' time that is waited."""
        return sum(self.bubbles) / len(self.bubbles)

    @property
    def peak_live(self) -> tuple[int, ...]:
        """The largest number of (chunk, micro-batch) whose activations are kept, from F until the end of B or W."""
        change = {"F": 1, "I": 0}
        live = (accumulate(change.get(slot.action.op, -1) for slot in slots) for slots in self.slots)
        return tuple(max(numbers) for numbers in live)


def simulate(programs: Sequence[Program], costs: Costs = Costs()) -> Timeline:  # noqa: B008
    """Run the programs, each action as soon as its rank is free and what it needs has arrived.

    ValueError with the actions that wait for each other in a deadlock, or for one that is in no program.

    >>> from olmo_fn.parallel.pipeline.schedule import schedule
    >>> timeline = simulate(schedule("1f1b", ranks=4, microbatches=8))
    >>> timeline.ticks, round(timeline.bubble, 3), timeline.peak_live
    (33.0, 0.273, (4, 3, 2, 1))
    """
    ranks, chunks = len(programs), 1 + max(action.chunk for program in programs for action in program)
    costs.check(ranks * chunks)
    ended: dict[tuple[str, int, int], float] = {}  # by (op, virtual stage, micro-batch), where I is B
    slots: list[list[Slot]] = [[] for _ in programs]
    blocked = ["the start"]
    while blocked:
        before, blocked = len(ended), []
        for rank, program in enumerate(programs):
            for action in program[len(slots[rank]) :]:
                stage, k = action.chunk * ranks + rank, action.microbatch
                needs = [(op, at, k) for op, at in _needs(action, stage, ranks * chunks)]
                if missing := [f"{op} of stage {at}" for op, at, _ in needs if (op, at, k) not in ended]:
                    blocked.append(f"rank {rank} at {action}, stage {stage}, waits for {missing[0]}")
                    break
                arrived = (ended[need] + (costs.transfer if (need[1] - stage) % ranks else 0) for need in needs)
                start = max((slots[rank][-1].end if slots[rank] else 0.0, *arrived))
                slots[rank].append(Slot(action, start, start + costs.of(action, stage)))
                ended["B" if action.op == "I" else action.op, stage, k] = slots[rank][-1].end
        if blocked and len(ended) == before:
            raise ValueError(f"the pipeline is in deadlock: {'; '.join(blocked)}")
    return Timeline(tuple(map(tuple, slots)), chunks)


def _needs(action: Action, stage: int, stages: int) -> list[tuple[str, int]]:
    """The ops, and their virtual stages, that must have ended, whatever the programs' order says."""
    if action.op == "F":
        return [("F", stage - 1)] if stage else []
    if action.op == "W":
        return [("B", stage)]
    return [("F", stage), *([("B", stage + 1)] if stage + 1 < stages else [])]
