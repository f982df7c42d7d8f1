"""Batches whose size and sequence length are functions of the step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from olmo_fn.data.batches import Batch, Batches, labels_of, share
from olmo_fn.data.shuffle import permutation
from olmo_fn.data.sizes import Sizes


@dataclass(frozen=True)
class Resized:
    """The data of ``batches`` in steps of ``sizes``, of which ``batches`` has the largest batch and the window's length.

    With constant sizes it is ``batches``. Where sizes change, a batch goes on where the one before ended; one
    that the epoch's end falls into takes the rest from the next.
    """

    batches: Batches
    sizes: Sizes

    def __post_init__(self) -> None:
        assert self.batches.batch_size == self.sizes.largest
        assert self.batches.windows.sequence_length == self.sizes.window

    def windows_of(self, step: int) -> np.ndarray:
        """The numbers of the windows of ``step``: (batch_size,) uint32."""
        b = self.batches
        epoch_size = b.steps_per_epoch * b.batch_size
        first = self.sizes.first_window(step)
        parts, last = [], first + self.sizes.at(step).batch_size
        while first < last:
            epoch, place = divmod(first, epoch_size)
            stop = min(epoch_size, place + last - first)
            parts.append(permutation(b.num_instances, b.seed, epoch + 1)[place:stop])
            first += stop - place
        return np.concatenate(parts)

    def __call__(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """``input_ids`` and ``labels``, (sequences / world, sequence_length) int64, of ``step`` (from 0) for ``rank``."""
        phase = self.sizes.at(step)
        ids, mask = self.batches.windows.read(self.windows_of(step)[share(phase.batch_size, rank, world)])
        length, used = phase.sequence_length, phase.used or self.sizes.window
        ids = ids[:, :used].reshape(-1, length)
        mask = None if mask is None else mask[:, :used].reshape(-1, length)
        return {"input_ids": torch.from_numpy(ids), "labels": torch.from_numpy(labels_of(ids, mask))}
