"""Instances made of instances: one behind the other, a part, a sample, a mixture. Values, and nothing is copied.

>>> import tempfile
>>> from olmo_fn.data.instances import TokenData
>>> from olmo_fn.data.instances.fixed import FixedLength
>>> from olmo_fn.data.tokens import open_tokens
>>> file = tempfile.NamedTemporaryFile(suffix=".npy")
>>> np.arange(40, dtype=np.uint16).tofile(file.name)
>>> web = FixedLength().build(TokenData((open_tokens(file.name, "uint16"),), sequence_length=4, vocab_size=100))
>>> train, held_out = split(web, 0.8)
>>> len(train), len(held_out)
(8, 2)
>>> everything = concatenate(train, resize(held_out, 1.5, seed=None))
>>> everything.read(np.array([0, 9, 10]))["input_ids"].tolist()
[[0, 1, 2, 3], [36, 37, 38, 39], [32, 33, 34, 35]]
>>> mixed = mix([train, held_out], [0.7, 0.3], [1, 2], seed=0, length=4)
>>> [len(part) for part in mixed.parts]
[7, 3]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from olmo_fn.data.instances import Instances, Origin
from olmo_fn.data.mixing import sample_sizes
from olmo_fn.data.shuffle import permutation


@dataclass(frozen=True)
class Concatenated:
    """The instances of each of ``parts``, one behind the other. All have the same length, and the same arrays."""

    parts: tuple[Instances, ...]

    @cached_property
    def ends(self) -> np.ndarray:
        """For each part, one past the number of its last instance."""
        return np.cumsum([len(part) for part in self.parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def part_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The part that each instance is in, and its number there."""
        part = np.searchsorted(self.ends, numbers, side="right")
        return part, numbers - np.concatenate([[0], self.ends])[part]

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        part, inside = self.part_of(np.array([number]))
        return self.parts[int(part[0])].origin(int(inside[0]))

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the instances ``numbers``, those that some parts have not filled with what their lack means."""
        part, inside = self.part_of(np.asarray(numbers, np.int64))
        found: dict[str, np.ndarray] = {}
        for p in np.unique(part):
            at = np.flatnonzero(part == p)
            arrays = self.parts[int(p)].read(inside[at])
            for name, x in arrays.items():
                if name not in found:  # wide enough for all parts, whose files may be of other types
                    dtype = np.bool_ if x.dtype == np.bool_ else np.int64
                    found[name] = np.full((len(numbers), *x.shape[1:]), name == "label_mask", dtype)
                found[name][at] = x
        return found


@dataclass(frozen=True)
class Chosen:
    """Of ``instances`` those with these ``numbers``, in this order: a sample, any selection."""

    instances: Instances
    numbers: np.ndarray

    def __len__(self) -> int:
        return len(self.numbers)

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        return self.instances.origin(int(self.numbers[number]))

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the instances ``numbers``."""
        return self.instances.read(self.numbers[numbers])


@dataclass(frozen=True)
class Slice:
    """Of ``instances`` the ``length`` from ``start`` on."""

    instances: Instances
    start: int
    length: int

    def __len__(self) -> int:
        return self.length

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        return self.instances.origin(self.start + number)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the instances ``numbers``."""
        return self.instances.read(self.start + numbers)


def concatenate(*parts: Instances) -> Concatenated:
    """One behind the other."""
    return Concatenated(parts)


def sliced(instances: Instances, start: int, stop: int) -> Slice:
    """Those from ``start`` to before ``stop``, which may be negative, as in a list.

    >>> len(sliced(Chosen(instances=None, numbers=np.arange(9)), -4, -1))
    3
    """
    first, last, _ = slice(start, stop).indices(len(instances))
    return Slice(instances, first, max(0, last - first))


def split(instances: Instances, fraction: float) -> tuple[Slice, Slice]:
    """The first ``fraction`` of them, rounded down, and the others."""
    at = int(len(instances) * fraction)
    return sliced(instances, 0, at), sliced(instances, at, len(instances))


def sample(instances: Instances, count: int, seed: int | None) -> Chosen:
    """``count`` of them: all as often as they fit, then some; in a random order if there is a seed, or else the first ones.

    The order is that of OLMo-core's sampling, which shuffles with PCG64.
    """
    n = len(instances)
    order = np.arange(n) if seed is None else permutation(n, seed, 0).astype(np.int64)
    return Chosen(instances, np.concatenate([np.tile(order, count // n), order[: count % n]]))


def resize(instances: Instances, factor: float, seed: int | None) -> Chosen:
    """A sample of ``factor`` times as many, rounded down.

    >>> resize(Chosen(instances=None, numbers=np.arange(2)), 2.5, seed=None).numbers.tolist()
    [0, 1, 0, 1, 0]
    """
    return sample(instances, int(len(instances) * factor), seed)


def sample_all(parts: Sequence[Instances], count: int, seed: int | None) -> Concatenated:
    """About ``count`` instances of all ``parts`` together, each in proportion to its size, rounded down."""
    total = sum(map(len, parts))
    sizes = [int(count * (len(part) / total)) for part in parts]
    seeds = [None if seed is None else seed + i for i in range(len(parts))]
    return Concatenated(tuple(sample(*arguments) for arguments in zip(parts, sizes, seeds, strict=True)))


def mix(
    parts: Sequence[Instances],
    ratios: Sequence[float],
    repetitions: Sequence[float],
    seed: int | None,
    length: int,
    count: int | None = None,
) -> Concatenated:
    """Samples of ``parts`` in these ``ratios``: ``count`` instances of ``length`` tokens, or as many as there are.

    None is used more than ``repetitions`` times. ValueError if there is too little of one (`sample_sizes`).
    """
    tokens = sample_sizes([len(part) * length for part in parts], ratios, repetitions, count and count * length)
    seeds = [None if seed is None else seed + i for i in range(len(parts))]
    samples = (sample(part, int(n) // length, s) for part, n, s in zip(parts, tokens, seeds, strict=True))
    return Concatenated(tuple(samples))
