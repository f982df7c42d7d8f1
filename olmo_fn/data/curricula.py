"""In which order batches of different sequence lengths come: OLMo-core's curricula, bit for bit.

Pouransari et al. 2024, Dataset Decomposition: Faster LLM Training with Variable Sequence Length Curriculum (arXiv 2405.13226).
A *bucket* has the instances of one length; buckets go from the shortest length to the longest, and so do numbers of batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import numpy as np

Curriculum: TypeAlias = Literal["natural", "grow-p2", "grow-linear"]


def batches_of(available: Sequence[int], curriculum: Curriculum, cycles: int, balanced: bool) -> list[int]:
    """How many of the ``available`` whole batches of each bucket are used.

    For a growing curriculum a multiple of ``cycles``, and if it is ``balanced`` the same number of each.

    >>> batches_of([9, 20], "grow-p2", cycles=4, balanced=False), batches_of([9, 20], "grow-p2", cycles=4, balanced=True)
    ([8, 20], [8, 8])
    """
    if curriculum == "natural":
        return list(available)
    used = [min(available)] * len(available) if balanced else available
    return [cycles * (count // cycles) for count in used]


def batch_order(counts: Sequence[int], curriculum: Curriculum, cycles: int, seed: int) -> np.ndarray:
    """The order of all batches, of which bucket b has ``counts[b]``, numbered bucket after bucket: (batches,) uint32.

    The first is of the longest length, so that what does not fit into memory fails at once. ``natural``: any order. Growing: in
    each of ``cycles``, parts in which long batches become more frequent, in proportion to powers of 2 or in a line.
    """
    rng, total, last = np.random.Generator(np.random.PCG64(seed)), sum(counts), sum(counts[:-1])
    if curriculum == "natural":
        order = np.arange(total, dtype=np.uint32)
        if counts[-1]:
            chosen = rng.integers(last, total)
            order[chosen], order[0] = order[0], order[chosen]
        rng.shuffle(order[1:])
        return order
    ends = np.cumsum([0, *counts])
    parts = []
    for cycle in range(cycles):
        by_bucket = []
        for bucket in range(len(counts)):
            share = np.array_split(np.arange(ends[bucket], ends[bucket + 1], dtype=np.uint32), cycles)[cycle]
            sizes = _shares(_odds(bucket, len(counts), curriculum), len(share))
            by_bucket.append(np.split(share, np.cumsum(sizes)[:-1]))
        for part in zip(*by_bucket, strict=True):
            together = np.concatenate(part)
            rng.shuffle(together)
            parts.append(together)
    order = np.concatenate(parts)
    if not counts[-1]:
        return order
    first = int(np.argmax(order >= last))
    order[first], order[0] = order[0], order[first]
    return order


def _odds(bucket: int, buckets: int, curriculum: Curriculum) -> list[int]:
    """How frequent a bucket is in each part of a cycle, relative to itself: it rises to ``buckets``, and falls again."""
    start = buckets - bucket
    heights = [n if n <= buckets else start - n % buckets for n in range(start, start + buckets)]
    return [2 ** (height - 1) for height in heights] if curriculum == "grow-p2" else heights


def _shares(odds: Sequence[int], count: int) -> list[int]:
    """``count`` in proportion to ``odds``, rounded; the last share takes what is left over."""
    shares = [round(odd / sum(odds) * count) for odd in odds]
    for i in reversed(range(len(shares))):  # rounded up too often
        shares[i] -= max(0, min(shares[i], sum(shares) - count))
    shares[-1] += count - sum(shares)
    return shares
