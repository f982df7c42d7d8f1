"""Which blocks a virtual stage holds. Imports no torch.

The embedding goes before the first block and the head after the last, so virtual stage 0 has the one and the last
virtual stage has the other, with blocks or without.
"""

from __future__ import annotations

from typing import TypeAlias

Ranges: TypeAlias = tuple[tuple[int, int], ...]


def split(n_blocks: int, stages: int, embed_cost: float = 0.0, head_cost: float = 0.0) -> Ranges:
    """``(start, stop)`` of the blocks of every virtual stage, with the least cost on the dearest one.

    Costs are in blocks. Only the first and the last virtual stage may be without blocks: they have the embedding and the
    head. Where costs tie, later stages get more: they keep fewer micro-batches alive. ValueError for too many stages.

    >>> split(n_blocks=16, stages=4, head_cost=2.5)
    ((0, 4), (4, 9), (9, 14), (14, 16))
    >>> split(n_blocks=6, stages=4, embed_cost=3, head_cost=3)
    ((0, 0), (0, 3), (3, 6), (6, 6))
    """
    if stages < 1 or n_blocks < 1 or embed_cost < 0 or head_cost < 0:
        raise ValueError(
            f"cannot split {n_blocks} blocks in {stages} stages at costs {embed_cost} (embedding) and {head_cost} (head): "
            f"sizes must be at least 1 and costs at least 0"
        )
    if stages > n_blocks + 2:
        raise ValueError(
            f"{stages} virtual stages, but {n_blocks} blocks, the embedding and the head are only {n_blocks + 2} "
            f"parts: use at most {n_blocks + 2} (pipeline ranks times chunks a rank)"
        )
    costs = [0.0] * stages
    costs[0] += embed_cost
    costs[-1] += head_cost
    counts = [0] * stages
    must = list(range(1, stages - 1))  # stages that would be empty
    for _ in range(n_blocks):  # the cheapest takes the next block: this makes the largest as small as it can be
        i = must.pop() if must else min(reversed(range(stages)), key=lambda stage: costs[stage])
        costs[i] += 1
        counts[i] += 1
    stops = [sum(counts[: i + 1]) for i in range(stages)]
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def parse_split(text: str, n_blocks: int, stages: int) -> Ranges:
    """The ranges that ``text`` says: one part a virtual stage, as ``0-7,8-15``.

    ``embed`` as the first part, or ``head`` as the last, is an end without blocks.
    ValueError with the block that is missing or twice, or the part that cannot be read.

    >>> parse_split("embed,0-7,8-14,15", n_blocks=16, stages=4)
    ((0, 0), (0, 8), (8, 15), (15, 16))
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != stages:
        raise ValueError(f"pipeline split {text!r} has {len(parts)} parts for {stages} virtual stages (ranks times chunks)")
    ranges, at = [], 0
    for i, part in enumerate(parts):
        first, dash, last = part.partition("-")
        if (part, i) in (("embed", 0), ("head", stages - 1)):
            start, stop = at, at
        elif first.isdecimal() and (last.isdecimal() if dash else True):
            start, stop = int(first), int(last if dash else first) + 1
        else:
            raise ValueError(
                f"pipeline split {text!r}: {part!r} is not a block (7), a range of blocks (0-7), "
                f"embed as the first part or head as the last"
            )
        if start != at or stop < start or (stop == start and part not in ("embed", "head")):
            problem = f"block {at} is in no part" if start > at else f"{part!r} does not go on from block {at}"
            raise ValueError(f"pipeline split {text!r}: {problem}; parts must follow one another, such as 0-7,8-15")
        ranges.append((start, stop))
        at = stop
    if at != n_blocks:
        problem = f"block {at} is in no part" if at < n_blocks else f"there is no block {n_blocks}"
        raise ValueError(f"pipeline split {text!r}: {problem}, the model has blocks 0-{n_blocks - 1}")
    return tuple(ranges)
