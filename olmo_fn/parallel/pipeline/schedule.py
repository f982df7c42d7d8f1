"""Pipeline schedules as data: what each rank runs, in which order. Imports no torch.

A model is cut into ``ranks * chunks_per_rank`` virtual stages. Chunk ``c`` of rank ``r`` is virtual stage ``c * ranks + r``,
so a micro-batch goes round the ranks once a chunk. A program is the list of one rank's actions; which of them send and
receive is said by `olmo_fn.parallel.pipeline.transfers`.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, get_args

Op = Literal["F", "B", "I", "W"]
Kind = Literal["gpipe", "1f1b", "interleaved", "zero_bubble", "forward"]


class Action(NamedTuple):
    """One piece of work on a micro-batch.

    ``F`` is forward, ``B`` backward; or backward in two parts, ``I`` for the input, then ``W`` for the weights.
    """

    op: Op
    chunk: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.op}(chunk {self.chunk}, microbatch {self.microbatch})"


Program: TypeAlias = tuple[Action, ...]
ChunkMicrobatch: TypeAlias = tuple[int, int]


def schedule(kind: Kind, ranks: int, microbatches: int, chunks_per_rank: int = 1) -> tuple[Program, ...]:
    """One program a rank.

    - ``gpipe``: all forwards, then all backwards in reverse (Huang et al. 2019, figure 2c). Keeps every micro-batch.
    - ``1f1b``: forwards and backwards in turn as soon as possible (PipeDream-flush; Narayanan et al. 2021a,
      arXiv 2006.09503, figure 2). The same bubble, but rank r keeps at most ``ranks - r`` micro-batches.
    - ``interleaved``: 1F1B over several chunks a rank (Narayanan et al. 2021b, arXiv 2104.04473, section 2.2): a bubble
      ``chunks_per_rank`` times shorter, for more transfers and more kept activations.
    - ``zero_bubble``: ZB-H1 (Qi et al. 2023, arXiv 2401.10241, section 3.1): the backward for the weights is put off to
      where a rank would wait, at the peak of 1F1B's first rank on all ranks.
    - ``forward``: forwards only, for evaluation.

    Several chunks take micro-batches round by round. The paper's rounds have ``ranks`` micro-batches; here they are larger
    where that does not divide, so any number is legal, and from ``ranks`` on the bubble is (p - 1) / (v m + p - 1). ValueError
    for sizes below 1, or a number of chunks the kind has no schedule for.

    >>> for program in schedule("1f1b", ranks=2, microbatches=3):
    ...     print(*(f"{action.op}{action.microbatch}" for action in program))
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2
    """
    if kind not in get_args(Kind):
        raise ValueError(f"pipeline schedule {kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
    for name, value in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks_per_rank)):
        if value < 1:
            raise ValueError(f"a pipeline needs at least 1 of {name}, not {value}")
    if kind == "interleaved" and chunks_per_rank == 1:
        raise ValueError("schedule interleaved needs at least 2 chunks a rank, not 1; use 1f1b for one chunk a rank")
    if kind in ("1f1b", "zero_bubble") and chunks_per_rank > 1:
        raise ValueError(f"schedule {kind} has one chunk a rank, not {chunks_per_rank}; use interleaved for several")
    order = _forward_order(ranks, microbatches, chunks_per_rank)
    if kind == "1f1b":
        return tuple(_alternate(order, 1, warm_up=ranks - rank - 1) for rank in range(ranks))
    if kind == "interleaved":  # a rank begins its last chunk, and then 2 because the last rank is that far there and back
        first = (chunks_per_rank - 1) * max(rounds(ranks, microbatches))
        return tuple(_alternate(order, chunks_per_rank, first + 2 * (ranks - rank - 1)) for rank in range(ranks))
    if kind == "zero_bubble":
        return tuple(_zero_bubble(ranks, microbatches, rank) for rank in range(ranks))
    forwards = tuple(Action("F", *one) for one in order)
    backwards = tuple(Action("B", *one) for one in reversed(order))
    return (forwards if kind == "forward" else forwards + backwards,) * ranks


def rounds(ranks: int, microbatches: int) -> list[int]:
    """Micro-batches in each round through the chunks: as even as can be, and at least ``ranks`` where there are so many, or a
    chunk would wait for the one before.

    >>> rounds(ranks=4, microbatches=11)
    [6, 5]
    """
    n = max(1, microbatches // ranks)
    return [microbatches // n + (i < microbatches % n) for i in range(n)]


def _forward_order(ranks: int, microbatches: int, chunks: int) -> list[ChunkMicrobatch]:
    """Round by round, each through all chunks."""
    order: list[ChunkMicrobatch] = []
    for size in rounds(ranks, microbatches):
        start = len(order) // chunks
        order += [(chunk, k) for chunk in range(chunks) for k in range(start, start + size)]
    return order


def _alternate(order: list[ChunkMicrobatch], chunks: int, warm_up: int) -> Program:
    """``warm_up`` forwards, then a forward and a backward in turn, then the backwards that are left."""
    forwards = [Action("F", *one) for one in order]
    program = forwards[:warm_up]
    for i, (chunk, k) in enumerate(order):
        program += [*forwards[warm_up + i : warm_up + i + 1], Action("B", chunks - 1 - chunk, k)]
    return tuple(program)


def _zero_bubble(ranks: int, microbatches: int, rank: int) -> Program:
    """1F1B with B cut in two: rank r lags r weight gradients behind, so that ``ranks`` micro-batches live on every rank."""
    warm_up = min(ranks - rank - 1, microbatches)
    program = [Action("F", 0, k) for k in range(warm_up)]
    for k in range(microbatches):
        if warm_up + k < microbatches:
            program.append(Action("F", 0, warm_up + k))
        program.append(Action("I", 0, k))
        if k >= rank:
            program.append(Action("W", 0, k - rank))
    return (*program, *(Action("W", 0, k) for k in range(max(0, microbatches - rank), microbatches)))
