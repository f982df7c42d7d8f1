"""The training data as a pure function of the step: which instances, and their input ids and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from olmo_fn.core.chain import IGNORE, Batch
from olmo_fn.data.instances import Instances, Origin
from olmo_fn.data.instances.operators import Concatenated
from olmo_fn.data.mixing import Mixture
from olmo_fn.data.shuffle import Order, shuffled
from olmo_fn.data.sizes import Sizes


def labels_of(input_ids: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """The next token inside the row, (B, T) int64; IGNORE at the row's end and where that token is masked.

    >>> labels_of(np.array([[5, 6, 7, 8]]), np.array([[True, True, False, True]]))
    array([[   6, -100,    8, -100]])
    """
    labels = np.empty(input_ids.shape, np.int64)
    labels[:, :-1] = input_ids[:, 1:]
    labels[:, -1] = IGNORE
    if mask is not None:
        labels[:, :-1][~mask[:, 1:]] = IGNORE
    return labels


@dataclass(frozen=True)
class Loader:
    """The first ``num_instances`` of ``instances`` in the order of ``seed``, in batches of ``sizes``.

    An epoch is cut to whole batches of the largest size. Where sizes change, a batch goes on where the one before ended; one
    that the epoch's end falls into takes the rest from the next. Instances have the length ``sizes.window``; with a shorter
    sequence length each is cut into as many rows as it holds. The batch of a step is the same for every number of ranks.
    """

    instances: Instances
    sizes: Sizes
    seed: int
    num_instances: int
    order: Order = "olmo-core"
    mixture: Mixture | None = None
    """What chooses the instances in the place of ``order``, where sources have ratios."""

    @property
    def steps_per_epoch(self) -> int:
        """Steps of the largest batch size in one pass over the data."""
        return self.num_instances // self.sizes.largest

    def numbers(self, step: int) -> np.ndarray:
        """The instances of the whole batch of ``step`` (from 0): (instances of the step,) int64."""
        sizes, first, many = self.sizes, self.sizes.first_window(step), self.sizes.at(step).batch_size
        if self.mixture:
            return self.mixture(first, many)
        return shuffled(first, many, self.num_instances, sizes.largest, self.seed, self.order)

    def sources(self, step: int) -> np.ndarray:
        """The number of the source that each row of the batch of ``step`` is from: (rows,) int64; 0 where there is but one."""
        numbers, per = self.numbers(step), self.sizes.rows_per_window(step)
        part = self.instances.part_of(numbers)[0] if isinstance(self.instances, Concatenated) else np.zeros_like(numbers)
        return np.repeat(part.astype(np.int64), per)

    def rows(self, step: int) -> int:
        """Rows of the batch of ``step``, over all ranks."""
        return self.sizes.rows(step)

    def origin(self, step: int, row: int) -> Origin:
        """Where ``row`` of the batch of ``step`` comes from."""
        instance, piece = divmod(row, self.sizes.rows_per_window(step))
        path, offset = self.instances.origin(int(self.numbers(step)[instance]))
        return Origin(path, offset + piece * self.sizes.at(step).sequence_length)

    def __call__(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of ``step`` (from 0), or the ``rows`` of it that a rank reads: tensors (rows, sequence_length) int64.

        ``input_ids``; ``labels``, IGNORE where the loss has none; ``documents`` if the instances have them. The whole batch
        has ``sizes.rows(step)`` rows. ValueError if ``rows`` is not contiguous, or the instances are not of the right shape.
        """
        length, per = self.sizes.at(step).sequence_length, self.sizes.rows_per_window(step)
        start, stop, stride = (rows or slice(None)).indices(self.sizes.rows(step))
        if stride != 1:
            raise ValueError(f"a rank reads contiguous rows of a batch, not every {stride}th")
        numbers = self.numbers(step)[start // per : -(-stop // per)]  # the instances that the rows are in
        arrays, expected = self.instances.read(numbers), (len(numbers), self.sizes.window)
        for name, x in arrays.items():
            if x.shape != expected:
                raise ValueError(f"the instances' {name} of step {step} are of shape {x.shape}, not {expected}")
        cut = slice(start % per, start % per + max(stop - start, 0))
        batch = {name: x[:, : per * length].reshape(-1, length)[cut] for name, x in arrays.items()}
        mask = batch.pop("label_mask", None)
        if "labels" not in batch:
            batch["labels"] = labels_of(batch["input_ids"], mask)
        return {name: torch.from_numpy(x.astype(np.int64, copy=False)) for name, x in batch.items()}
