"""Which rank of a pipeline sends what to whom, and how many transfers are under way at once. Imports no torch.

What crosses an edge of the ring of ranks comes out in the order in which it goes in: all ranks run the forwards in one order
and the backwards in another, and where the ring closes both still go round by round and chunk by chunk. So carries and
cotangents need one first-in, first-out channel for each directed edge, and no plan that all ranks agree on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from olmo_fn.parallel.pipeline.schedule import Action, Kind, Program, rounds, schedule

AHEAD = 2  # a receive is posted so many actions before the one that needs it: room to overlap, and few buffers
SENDS = 2  # sends that may be under way while a rank computes, where no round of micro-batches is larger than the ranks


class Transfer(NamedTuple):
    """The carry from virtual stage ``stage`` to the next one, or the cotangent of that carry back to it."""

    what: Literal["carry", "cotangent"]
    source: int  # rank
    target: int
    stage: int
    microbatch: int


@dataclass(frozen=True)
class RankProgram:
    """What one rank of a pipeline runs. ``sends`` of its transfers may be under way while it computes."""

    rank: int
    ranks: int
    chunks: int
    actions: Program
    sends: int = SENDS

    def stage(self, chunk: int) -> int:
        """The virtual stage that is ``chunk`` of this rank."""
        return chunk * self.ranks + self.rank

    def incoming(self, action: Action) -> Transfer | None:
        """What ``action`` needs; None for the first stage's carry and the last one's cotangent."""
        stage = self.stage(action.chunk)
        if action.op == "F":
            return self._transfer("carry", stage - 1, action.microbatch)
        return None if action.op == "W" else self._transfer("cotangent", stage, action.microbatch)

    def outgoing(self, action: Action) -> Transfer | None:
        """What ``action`` produces; None for the last stage's carry and the first one's cotangent."""
        stage = self.stage(action.chunk)
        if action.op == "F":
            return self._transfer("carry", stage, action.microbatch)
        return None if action.op == "W" else self._transfer("cotangent", stage - 1, action.microbatch)

    def receives(self, i: int) -> tuple[Transfer, ...]:
        """What to post receives for just before action ``i``, so that each is posted `AHEAD` actions before it is needed."""
        actions = self.actions[i + AHEAD if i else 0 : i + AHEAD + 1]
        return tuple(t for t in map(self.incoming, actions) if t and t.source != t.target)

    def _transfer(self, what: Literal["carry", "cotangent"], stage: int, microbatch: int) -> Transfer | None:
        if not 0 <= stage < self.ranks * self.chunks - 1:
            return None
        ends = stage % self.ranks, (stage + 1) % self.ranks
        return Transfer(what, *(ends if what == "carry" else ends[::-1]), stage, microbatch)


def rank_programs(kind: Kind, ranks: int, microbatches: int, chunks: int = 1) -> tuple[RankProgram, ...]:
    """Every rank's program. ValueError as `schedule` says.

    >>> first, last = rank_programs("1f1b", ranks=2, microbatches=1)
    >>> first.outgoing(first.actions[0])
    Transfer(what='carry', source=0, target=1, stage=0, microbatch=0)
    """
    programs, sends = schedule(kind, ranks, microbatches, chunks), most_sends(ranks, microbatches, chunks)
    return tuple(RankProgram(rank, ranks, chunks, actions, sends) for rank, actions in enumerate(programs))


def most_sends(ranks: int, microbatches: int, chunks: int) -> int:
    """How many sends of a rank may be under way while it computes; before it goes on with more, it waits for the oldest.

    With several chunks, a round of micro-batches may be larger than the number of ranks. By that many, carries come round to
    the first rank before it has ended the round; they wait at the last rank, and as many cotangents at the first. With fewer,
    ranks could wait for each other for ever.

    >>> most_sends(ranks=4, microbatches=8, chunks=2), most_sends(ranks=4, microbatches=11, chunks=2)
    (2, 4)
    """
    return max(SENDS, 2 * (max(rounds(ranks, microbatches)) - ranks)) if chunks > 1 else SENDS
