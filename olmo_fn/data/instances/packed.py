"""Documents packed into instances so that little is padded: OLMo-core's packed dataset, and a greedy one.

Best fit with decreasing lengths (Ding et al. 2024, Fewer Truncations Improve Language Modeling, arXiv 2404.10830): the longest
document first, each into the instance with the least space that it fits into, the oldest such one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro

from olmo_fn.data.bounds import fitting
from olmo_fn.data.instances import InstancesSettings, TokenData
from olmo_fn.data.instances.pieces import Pieces


@dataclass(frozen=True)
class Packed(InstancesSettings):
    """Whole documents, packed into instances with little padding, which is not in the loss."""

    name: tyro.conf.Suppress[Literal["packed"]] = "packed"
    """This kind of dataset."""
    long: Literal["truncate", "fragment"] = "truncate"
    """Documents longer than the sequence length are cut off, or cut into several."""
    files_together: int = 1
    """Documents of so many neighbouring files are packed together; 0: those of all."""
    fit: Literal["best", "next"] = "best"
    """best: into the fullest instance that has room, the longest documents first. next: in their order, each behind the one
    before if it fits, or else into a new instance."""

    def build(self, tokens: TokenData) -> Pieces:
        """The packed instances, group after group of files. ValueError without an end-of-document token."""
        if self.files_together < 0:
            raise ValueError(f"--data.files-together must be 0 or more, it is {self.files_together}")
        length, bounds = tokens.sequence_length, tokens.all_bounds(self.name)
        step = self.files_together or max(1, len(bounds))
        wheres, firsts, count = [np.zeros((0, 3), np.int64)], [np.zeros(1, np.int64)], 0
        for start in range(0, len(bounds), step):
            files = range(start, min(start + step, len(bounds)))
            parts = [np.insert(fitting(bounds[i], length, self.long), 0, i, axis=1) for i in files]
            where = np.concatenate(parts)
            lengths = where[:, 2] - where[:, 1]
            order, first = best_fit(lengths, length) if self.fit == "best" else next_fit(lengths, length)
            wheres.append(where[order])
            firsts.append(count + first[1:])
            count += len(order)
        return tokens.pieces(np.concatenate(wheres), np.concatenate(firsts))


def best_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """Which documents, in which order, make up each instance: document numbers (n,), and where in them instances begin
    (instances + 1,).

    Of equal lengths the first comes first. Time n log n for the sort, and n times the words of ``capacity`` bits for the rest.

    >>> best_fit(np.array([3, 5, 2, 4]), 8)
    (array([1, 0, 3, 2]), array([0, 2, 4]))
    """
    instances: list[list[int]] = []
    by_space: dict[int, deque[int]] = {}
    spaces = 0  # bit s is set where an instance has s tokens of space: a search is two operations on integers
    for document in np.argsort(-lengths, kind="stable").tolist():
        n = int(lengths[document])
        room = spaces >> n
        if room:
            space = n + (room & -room).bit_length() - 1
            queue = by_space[space]
            instance = queue.popleft()
            if not queue:
                spaces ^= 1 << space
        else:
            space, instance = capacity, len(instances)
            instances.append([])
        instances[instance].append(document)
        if left := space - n:
            queue = by_space.setdefault(left, deque())
            queue.append(instance)
            spaces |= 1 << left
    return _flat(instances)


def next_fit(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray]:
    """As `best_fit`, but in their order: each behind the one before if it fits there, or else into a new instance.

    >>> next_fit(np.array([3, 5, 2, 4]), 8)
    (array([0, 1, 2, 3]), array([0, 2, 4]))
    """
    first, used = [0], 0
    for document, n in enumerate(lengths.tolist()):
        if used + n > capacity:
            first.append(document)
            used = 0
        used += n
    ends = [*first[1:], len(lengths)] if len(lengths) else []
    return np.arange(len(lengths)), np.array([0, *ends], np.int64)


def _flat(instances: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    order = np.array([document for instance in instances for document in instance], np.int64)
    return order, np.cumsum([0, *map(len, instances)], dtype=np.int64)
