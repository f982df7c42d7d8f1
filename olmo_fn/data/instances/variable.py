"""Documents cut into powers of two, and batches of one length each: training on short sequences without padding.

Dataset decomposition (Pouransari et al. 2024, arXiv 2405.13226), as OLMo-core has it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Literal

import numpy as np
import tyro

from olmo_fn.data.curricula import Curriculum, batch_order, batches_of
from olmo_fn.data.instances import InstancesSettings, Origin, TokenData
from olmo_fn.data.instances.pieces import Pieces, per_file
from olmo_fn.data.sizes import Sizes

if TYPE_CHECKING:
    from olmo_fn.core.chain import Batch


@dataclass(frozen=True)
class VariableLength(InstancesSettings):
    """Documents cut into pieces whose lengths are powers of two; every batch is of one length, and of as many tokens."""

    name: tyro.conf.Suppress[Literal["variable"]] = "variable"
    """This kind of dataset."""
    shortest: int = 256
    """The shortest length, a power of two; what is left of a document below it is not used. The longest is the
    recipe's."""
    curriculum: Curriculum = "natural"
    """natural: lengths in any order. grow-p2, grow-linear: longer ones become more frequent, again in each cycle."""
    cycles: int = 8
    """How often lengths grow in an epoch."""
    balanced: bool = False
    """As many batches of every length, which leaves more data unused."""

    def build(self, tokens: TokenData) -> Buckets:
        """The pieces of each length."""
        longest = tokens.sequence_length
        if any(n < 1 or n & (n - 1) for n in (self.shortest, longest)) or not 2 <= self.shortest < longest or self.cycles < 1:
            raise ValueError(
                f"--data.shortest {self.shortest} and --recipe.sequence-length {longest} must be powers of 2, the "
                f"first from 2 to below the second, and --data.cycles {self.cycles} at least 1"
            )
        where = per_file([powers_of_two(bounds, self.shortest, longest) for bounds in tokens.all_bounds(self.name)])
        return Buckets(tokens.pieces(where, np.arange(len(where) + 1)), self)


def powers_of_two(bounds: np.ndarray, shortest: int, longest: int) -> np.ndarray:
    """Documents cut into pieces of decreasing powers of two, none above ``longest``; those below ``shortest`` are left out.

    >>> powers_of_two(np.array([[0, 13], [13, 16]]), 2, 4).tolist()
    [[0, 4], [4, 8], [8, 12], [13, 15]]
    """
    pieces = []
    for start, end in bounds.tolist():
        size = longest
        while size >= shortest:
            if start + size <= end:
                pieces.append((start, start + size))
                start += size
            else:
                size //= 2
    return np.array(pieces, np.int64).reshape(-1, 2)


@dataclass(frozen=True)
class Buckets:
    """The ``pieces`` of all lengths, an instance each, and how batches are made of them."""

    pieces: Pieces
    settings: VariableLength

    def __len__(self) -> int:
        return len(self.pieces)

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """The lengths of the buckets, from the shortest."""
        count = (self.pieces.sequence_length // self.settings.shortest).bit_length()
        return tuple(self.settings.shortest << i for i in range(count))

    @cached_property
    def members(self) -> dict[int, np.ndarray]:
        """The instances of each length."""
        lengths = self.pieces.where[:, 2] - self.pieces.where[:, 1]
        return {length: np.flatnonzero(lengths == length) for length in self.lengths}

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        return self.pieces.origin(number)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The instances, padded to the longest length."""
        return self.pieces.read(numbers)

    def loader(self, sizes: Sizes, seed: int, num_instances: int) -> BucketLoader:
        """Batches of the first ``num_instances``, each of one length and ``batch_size · window`` tokens."""
        return BucketLoader(self, sizes, seed, num_instances)


@dataclass(frozen=True)
class BucketLoader:
    """Batches of one length each, in the order of the curriculum: a pure function of (step, rows), as `Loader` is."""

    buckets: Buckets
    sizes: Sizes
    seed: int
    num_instances: int

    def __post_init__(self) -> None:
        if len(self.sizes.phases) > 1:
            raise ValueError("--data.instances.name variable changes lengths itself; leave --growth out")
        if not sum(self.counts):
            s = self.buckets.settings
            cycles = "" if s.curriculum == "natural" else f" for each of {s.cycles} cycles"
            raise ValueError(
                f"no length has a whole batch of {self.batch_tokens:,} tokens{cycles}; use a smaller --recipe.batch-size, "
                "fewer --data.cycles, another --data.shortest, or more data"
            )

    @property
    def batch_tokens(self) -> int:
        """Tokens of every batch."""
        return self.sizes.largest * self.sizes.window

    @cached_property
    def counts(self) -> list[int]:
        """How many batches there are of each length in an epoch."""
        s = self.buckets.settings
        whole = [len(self._members(length)) // (self.batch_tokens // length) for length in self.buckets.lengths]
        return batches_of(whole, s.curriculum, s.cycles, s.balanced)

    @property
    def instances(self) -> Buckets:
        """The instances that batches are made of."""
        return self.buckets

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the data."""
        return sum(self.counts)

    def length(self, step: int) -> int:
        """The sequence length of ``step`` (from 0)."""
        return self._place(step)[0]

    def rows(self, step: int) -> int:
        """Rows of the batch of ``step``, over all ranks."""
        return self.batch_tokens // self.length(step)

    def sources(self, step: int) -> np.ndarray:
        """Zeros (rows,): there is one source."""
        return np.zeros(self.rows(step), np.int64)

    def numbers(self, step: int) -> np.ndarray:
        """The instances of the whole batch of ``step``."""
        length, batch, epoch = self._place(step)
        rows = self.batch_tokens // length
        return _shuffled(self, length, epoch)[batch * rows : (batch + 1) * rows]

    def origin(self, step: int, row: int) -> Origin:
        """Where ``row`` of the batch of ``step`` comes from."""
        return self.buckets.origin(int(self.numbers(step)[row]))

    def __call__(self, step: int, rows: slice | None = None) -> Batch:
        """The batch of ``step``, or ``rows`` of it: ``input_ids`` and ``labels`` (rows, length of the step) int64."""
        import torch

        from olmo_fn.data.loader import labels_of

        length = self.length(step)
        arrays = self.buckets.read(self.numbers(step)[rows or slice(None)])
        ids, mask = arrays["input_ids"][:, :length], arrays["label_mask"][:, :length]
        return {"input_ids": torch.from_numpy(ids.astype(np.int64)), "labels": torch.from_numpy(labels_of(ids, mask))}

    def _members(self, length: int) -> np.ndarray:
        found = self.buckets.members[length]
        return found[found < self.num_instances]

    def _place(self, step: int) -> tuple[int, int, int]:
        """The length of a step, which batch of that length it is, and its epoch (from 1)."""
        epoch, at = divmod(step, self.steps_per_epoch)
        batch = int(_ordered(self, epoch + 1)[at])
        bucket = int(np.searchsorted(np.cumsum(self.counts), batch, side="right"))
        return self.buckets.lengths[bucket], batch - sum(self.counts[:bucket]), epoch + 1

    def __hash__(self) -> int:
        return id(self)


@lru_cache(maxsize=4)
def _ordered(loader: BucketLoader, epoch: int) -> np.ndarray:
    s = loader.buckets.settings
    return batch_order(loader.counts, s.curriculum, s.cycles, loader.seed + epoch)


@lru_cache(maxsize=64)
def _shuffled(loader: BucketLoader, length: int, epoch: int) -> np.ndarray:
    rng = np.random.Generator(np.random.PCG64(loader.seed + epoch + length))
    return rng.permutation(loader._members(length))
