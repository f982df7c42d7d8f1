"""Batches: input ids and labels of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch

from olmo_fn.data.shuffle import batches_per_epoch, indices
from olmo_fn.data.windows import Windows

Batch: TypeAlias = dict[str, torch.Tensor]
IGNORE = -100


def labels_of(input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The next token inside the window (B, T); IGNORE at the window's end and where that token is masked.

    >>> labels_of(np.array([[5, 6, 7, 8]]), np.array([[True, True, False, True]]))
    array([[   6, -100,    8, -100]])
    """
    labels = np.full_like(input_ids, IGNORE)
    labels[:, :-1] = input_ids[:, 1:] if mask is None else np.where(mask[:, 1:], input_ids[:, 1:], IGNORE)
    return labels


def share(batch_size: int, rank: int, world: int) -> slice:
    """The rows of a global batch that ``rank`` takes: every ``world``-th, as OLMo-core does.

    >>> [list(range(6)[share(6, rank, 2)]) for rank in range(2)]
    [[0, 2, 4], [1, 3, 5]]
    """
    if batch_size % world:
        raise ValueError(f"a batch of {batch_size} instances does not divide over {world} data-parallel ranks")
    return slice(rank, None, world)


@dataclass(frozen=True)
class Batches:
    """The training data as a function of the step, over the first ``num_instances`` windows.

    The global batch of ``batch_size`` instances is the same for every number of ranks.
    """

    windows: Windows
    batch_size: int
    seed: int
    num_instances: int

    @property
    def steps_per_epoch(self) -> int:
        """Steps in one pass over the data."""
        return batches_per_epoch(self.num_instances, self.batch_size)

    def numbers(self, step: int) -> np.ndarray:
        """The windows of the global batch of ``step`` (from 0), (batch_size,) uint32."""
        return indices(step, self.batch_size, self.num_instances, self.seed)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """``input_ids`` and ``labels``, (batch_size / world, T) int64, of ``step`` (from 0) for ``rank``."""
        ids, mask = self.windows.read(self.numbers(step)[share(self.batch_size, rank, world)])
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels_of(ids, mask))}
