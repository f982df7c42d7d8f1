"""Which rank sends what to whom, and when it is posted: a program with its sends and receives. Imports no torch.

NCCL knows no tags, and runs the transfers of a communicator one after the other in the order in which they were posted. So
both ends of every transfer must post in one order, and no rank may post first what can only come later. Here *all* transfers
of the pipeline stand in one order, by the time in a simulation at which the data is there and the receiver wants it. Each
rank posts its own transfers in that order. Time proves that this cannot hang, whatever the real speeds are: an action
waits only for earlier transfers, and a transfer only for earlier actions and transfers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from olmo_fn.parallel.pipeline.schedule import Action, Program
from olmo_fn.planner.pipeline_simulate import simulate

AHEAD = 2  # a receive is posted so many actions before the one that needs it: room to overlap, and few buffers


class Transfer(NamedTuple):
    """A carry from virtual stage ``stage`` to the next one, or the cotangent of that carry back to it."""

    what: Literal["carry", "cotangent"]
    source: int  # rank
    target: int
    stage: int
    microbatch: int


class Exchange(NamedTuple):
    """Transfers to post at once: one, or one to a neighbour together with one from it."""

    transfers: tuple[Transfer, ...]


Step: TypeAlias = Action | Exchange


@dataclass(frozen=True)
class Plan:
    """What one rank does, sends and receives included. A transfer from a rank to itself is not part of ``steps``."""

    rank: int
    ranks: int
    chunks: int
    steps: tuple[Step, ...]

    def stage(self, chunk: int) -> int:
        """The virtual stage that is ``chunk`` of this rank."""
        return chunk * self.ranks + self.rank

    def incoming(self, action: Action) -> Transfer | None:
        """What ``action`` needs; None for the first stage's carry and the last one's cotangent."""
        stage = self.stage(action.chunk)
        if action.op == "F":
            return _carry(stage - 1, action.microbatch, self.ranks) if stage else None
        last = stage + 1 == self.ranks * self.chunks
        return None if action.op == "W" or last else _cotangent(stage, action.microbatch, self.ranks)

    def outgoing(self, action: Action) -> Transfer | None:
        """What ``action`` produces; None for the last stage's carry and the first one's cotangent."""
        stage = self.stage(action.chunk)
        if action.op == "F" and stage + 1 < self.ranks * self.chunks:
            return _carry(stage, action.microbatch, self.ranks)
        return _cotangent(stage - 1, action.microbatch, self.ranks) if action.op in ("B", "I") and stage else None


def _carry(stage: int, microbatch: int, ranks: int) -> Transfer:
    return Transfer("carry", stage % ranks, (stage + 1) % ranks, stage, microbatch)


def _cotangent(stage: int, microbatch: int, ranks: int) -> Transfer:
    return Transfer("cotangent", (stage + 1) % ranks, stage % ranks, stage, microbatch)


class _Timed(NamedTuple):
    """A transfer between two ranks, in the order of time."""

    at: float  # when it can happen: produced, and wanted by the receiver
    needed: float  # when the action that needs it starts
    transfer: Transfer
    produced: int  # index of the action in the source's program
    consumed: int  # and in the target's


def plan(programs: Sequence[Program], ahead: int = AHEAD) -> tuple[Plan, ...]:
    """Every rank's program with its transfers, all ranks' in the same order. ValueError if the programs are in deadlock.

    >>> from olmo_fn.parallel.pipeline.schedule import schedule
    >>> for step in plan(schedule("1f1b", ranks=2, microbatches=1))[0].steps:
    ...     print(step if isinstance(step, Action) else [f"{t.what} {t.source} -> {t.target}" for t in step.transfers])
    F(chunk 0, microbatch 0)
    ['carry 0 -> 1']
    ['cotangent 1 -> 0']
    B(chunk 0, microbatch 0)
    """
    ranks = len(programs)
    timeline = simulate(programs)
    plans = [Plan(rank, ranks, timeline.chunks, ()) for rank in range(ranks)]
    sources: dict[Transfer, tuple[float, int]] = {}
    for rank, slots in enumerate(timeline.slots):
        for i, slot in enumerate(slots):
            if sent := plans[rank].outgoing(slot.action):
                sources[sent] = slot.end, i
    timed = []
    for rank, slots in enumerate(timeline.slots):
        for i, slot in enumerate(slots):
            wanted = plans[rank].incoming(slot.action)
            if wanted and wanted.source != wanted.target:
                end, produced = sources[wanted]
                timed.append(_Timed(max(end, slots[max(0, i - ahead)].start), slot.start, wanted, produced, i))
    queues = _queues(sorted(timed), ranks)
    return tuple(Plan(rank, ranks, timeline.chunks, _place(programs[rank], queues[rank], rank, ahead)) for rank in range(ranks))


def _queues(order: list[_Timed], ranks: int) -> list[list[tuple[_Timed, ...]]]:
    """Each rank's part of the order. Two transfers that meet become one exchange, so that they use the link both ways.

    They meet if they are neighbours in the order of both ranks, and the first can wait until the second happens.
    """
    queues: list[list[tuple[_Timed, ...]]] = [[] for _ in range(ranks)]
    for one in order:
        ends = one.transfer.source, one.transfer.target
        last = [queues[rank][-1] if queues[rank] else () for rank in ends]
        pair: tuple[_Timed, ...] = (one,)
        if last[0] == last[1] and len(last[0]) == 1:
            (other,) = last[0]
            if other.transfer.source == ends[1] and other.needed >= one.at:
                pair = other, one
                for rank in ends:
                    queues[rank].pop()
        for rank in ends:
            queues[rank].append(pair)
    return queues


def _place(program: Program, queue: list[tuple[_Timed, ...]], rank: int, ahead: int) -> tuple[Step, ...]:
    """Post each exchange as early as its sends are computed and its receives are at most ``ahead`` actions away."""

    def ready(one: _Timed, i: int) -> bool:
        return one.produced < i if one.transfer.source == rank else one.consumed - ahead <= i

    steps: list[Step] = []
    posted = 0
    for i in range(len(program) + 1):
        while posted < len(queue) and all(ready(one, i) for one in queue[posted]):
            steps.append(Exchange(tuple(one.transfer for one in queue[posted])))
            posted += 1
        steps += program[i : i + 1]
    assert posted == len(queue), f"rank {rank} never posts {queue[posted]}"
    return tuple(steps)


def check(plans: Sequence[Plan]) -> None:
    """ValueError if the plans could hang, on the slowest network there is, or use what has not come.

    Each rank works its exchanges off in order. One is over when both ends of all its transfers have it at the head. A rank
    waits for its exchange before it goes on if it sends in it, and before an action for what the action needs.
    """
    at = [0] * len(plans)  # the next step
    queues: list[list[set[Transfer]]] = [[] for _ in plans]  # posted and not over
    arrived: set[Transfer] = set()
    moved = True
    while moved:
        moved = False
        for one in plans:
            rank = one.rank
            while at[rank] < len(one.steps) and not any(t.source == rank for exchange in queues[rank] for t in exchange):
                step = one.steps[at[rank]]
                if isinstance(step, Exchange):
                    queues[rank].append(set(step.transfers))
                elif (wanted := one.incoming(step)) and wanted.source != wanted.target and wanted not in arrived:
                    break
                at[rank] += 1
                moved = True
        heads = [queue[0] if queue else set() for queue in queues]
        for transfer in {t for head in heads for t in head if t in heads[t.source] and t in heads[t.target]}:
            arrived.add(transfer)
            heads[transfer.source].discard(transfer)
            heads[transfer.target].discard(transfer)
            moved = True
        queues = [[exchange for exchange in queue if exchange] for queue in queues]
    left = [f"rank {p.rank} at {p.steps[at[p.rank]]}" for p in plans if at[p.rank] < len(p.steps)]
    left += [f"rank {p.rank} posted {sorted(q)}" for p in plans for q in queues[p.rank]]
    if left:
        raise ValueError(f"the pipeline's transfers hang: {'; '.join(left)}")
