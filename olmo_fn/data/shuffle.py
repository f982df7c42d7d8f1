"""Which training instances make up a batch: a pure function of how many came before it.

There is nothing to save and nothing to restore: a resumed run asks for its next step. Three orders:

    keyed       a permutation that is computed entry by entry, from a key: any size, no memory, no time to start
    olmo-core   epoch e = 1, 2, … visits the instances in the order of ``PCG64(seed + e)``, four bytes of memory an instance
    sequential  as they lie
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, TypeAlias

import numpy as np

Order: TypeAlias = Literal["keyed", "olmo-core", "sequential"]
ROUNDS = 7
BLOCK = 4096  # places: a hundred operations of NumPy are for so many at once, and not for the few of each batch
U64 = np.uint64


@lru_cache(maxsize=2)
def permutation(num_instances: int, seed: int, epoch: int) -> np.ndarray:
    """OLMo-core's order of ``epoch`` (from 1): (num_instances,) uint32, read-only.

    >>> permutation(1000, seed=0, epoch=1)[:4].tolist()
    [705, 649, 543, 927]
    """
    order = np.arange(num_instances, dtype=np.uint32)
    np.random.Generator(np.random.PCG64(seed + epoch)).shuffle(order)
    order.flags.writeable = False
    return order


def keyed(places: np.ndarray, num_instances: int, seed: int, epoch: int) -> np.ndarray:
    """The instances at ``places`` of the keyed order of ``epoch``: a bijection of 0, …, num_instances - 1, int64.

    A Feistel network on the fewest bits, an even number, that hold ``num_instances`` (Luby and Rackoff 1988), repeated for what
    comes out beyond it until it does not (cycle walking, Black and Rogaway 2002).

    >>> sorted(keyed(np.arange(5), 5, seed=0, epoch=1).tolist())
    [0, 1, 2, 3, 4]
    """
    half = U64(max(1, -(-(num_instances - 1).bit_length() // 2)))
    keys = np.random.Philox(key=[seed, epoch]).random_raw(ROUNDS)
    values = np.asarray(places).astype(U64)
    walking = np.ones(values.shape, np.bool_)
    while walking.any():
        values[walking] = _feistel(values[walking], half, keys)
        walking = values >= num_instances
    return values.astype(np.int64)


def keyed_range(start: int, stop: int, num_instances: int, seed: int, epoch: int) -> np.ndarray:
    """`keyed` of the places ``start`` to before ``stop``: (stop - start,) int64, of blocks that are kept (32 MB at most).

    >>> np.array_equal(keyed_range(2, 5, 9, seed=0, epoch=1), keyed(np.arange(2, 5), 9, seed=0, epoch=1))
    True
    """
    blocks = [_block(block, num_instances, seed, epoch) for block in range(start // BLOCK, -(-stop // BLOCK))]
    skipped = start // BLOCK * BLOCK
    return np.concatenate([np.zeros(0, np.int64), *blocks])[start - skipped : stop - skipped]


@lru_cache(maxsize=1024)
def _block(block: int, num_instances: int, seed: int, epoch: int) -> np.ndarray:
    return keyed(np.arange(block * BLOCK, min((block + 1) * BLOCK, num_instances)), num_instances, seed, epoch)


def _feistel(values: np.ndarray, half: np.uint64, keys: np.ndarray) -> np.ndarray:
    mask = (U64(1) << half) - U64(1)
    left, right = values >> half, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << half | right


def _mix(x: np.ndarray) -> np.ndarray:
    """A hash of 64 bits (the finaliser of SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> U64(30))) * U64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> U64(27))) * U64(0x94D049BB133111EB)
    return x ^ (x >> U64(31))


def shuffled(first: int, count: int, num_instances: int, batch_size: int, seed: int, order: Order = "olmo-core") -> np.ndarray:
    """The ``count`` instances that come after ``first`` others, over all epochs: (count,) int64.

    An epoch is cut to whole batches of ``batch_size``.

    >>> shuffled(0, 4, 89, 4, seed=0).tolist(), shuffled(86, 4, 89, 4, seed=0).tolist()
    ([63, 60, 34, 14], [82, 77, 14, 25])
    """
    epoch_size = num_instances // batch_size * batch_size
    parts, last = [np.zeros(0, np.int64)], first + count
    while first < last:
        epoch, start = divmod(first, epoch_size)
        stop = min(epoch_size, start + last - first)
        if order == "olmo-core":
            parts.append(permutation(num_instances, seed, epoch + 1)[start:stop].astype(np.int64))
        elif order == "keyed":
            parts.append(keyed_range(start, stop, num_instances, seed, epoch + 1))
        else:
            parts.append(np.arange(start, stop))
        first += stop - start
    return np.concatenate(parts)


Sources: TypeAlias = Literal["all", "by-source", "round-robin"]


def source_order(sizes: Sequence[int], how: Sources, seed: int | None, epoch: int) -> np.ndarray:
    """An order of the instances of several sources, numbered one source behind the other; OLMo-core's strategies.

    ``all``: shuffled together. ``by-source``: each by itself, one source behind the other. ``round-robin``: each by itself, one
    instance of each in turn, until the smallest source is at its end. Without a ``seed`` nothing is shuffled.

    >>> source_order([2, 3], "round-robin", None, 1).tolist()
    [0, 2, 1, 3]
    """
    if how == "all":
        return np.arange(sum(sizes)) if seed is None else permutation(sum(sizes), seed, epoch).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    used = sizes if how == "by-source" else [min(sizes)] * len(sizes)
    parts = [
        start + (np.arange(n) if seed is None else permutation(n, seed + i, epoch).astype(np.int64))
        for i, (start, n) in enumerate(zip(starts, used, strict=False))
    ]
    return np.concatenate(parts) if how == "by-source" else np.stack(parts, axis=1).ravel()
