"""How many tokens each source of a mixture gives, and which instances of a run are of which source: pure functions.

A run's instances are numbered; which source number i is from is written in no table: it is where ``i · A mod 2^32`` falls, for
an odd A near the golden ratio, so that any stretch of a run is close to the ratios (Weyl 1916; the error grows with the
logarithm of the length). How many of the first n a source has is a sum of floors, which takes as many operations as A has bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from olmo_fn.data.shuffle import keyed_range

TURN = 1 << 32
STRIDE = 2_654_435_769  # 2^32 / golden ratio, odd
ROUNDING = 1e-6


def check_ratios(names: Sequence[str], ratios: Sequence[float]) -> None:
    """ValueError for ratios that are negative, or do not sum to 1."""
    total = sum(ratios)
    for name, ratio in zip(names, ratios, strict=True):
        if not ratio >= 0:
            raise ValueError(f"the ratio of {name!r} is {ratio}; it must not be negative")
    if abs(total - 1) > ROUNDING:
        shares = (
            ", ".join(f"{name} {ratio / total:.4g}" for name, ratio in zip(names, ratios, strict=True)) if total > 0 else ""
        )
        raise ValueError(
            f"the ratios sum to {total:.6g} and not to 1{'; divided by that they are ' + shares if shares else ''}"
        )


def sample_sizes(
    sizes: Sequence[int], ratios: Sequence[float], repetitions: Sequence[float], target: int | None = None
) -> np.ndarray:
    """Items of each source in a mixture of ``target`` items, or the largest that keeps the ``ratios``: (sources,) int64.

    No source is used more than ``repetitions`` times. OLMo-core's rule: without a ``target`` the mixture is no larger than all
    sources together, and repeats only what the ratios make it repeat. ValueError if there are not enough items.

    >>> sample_sizes([1000, 100], [0.5, 0.5], [1, 3]).tolist()
    [300, 300]
    """
    share = np.array(ratios, np.float64) / np.sum(ratios)
    have = np.array(sizes, np.float64)
    ideal = (have.sum() if target is None else target) * share
    usable = have * np.minimum(repetitions, np.maximum(ideal / have, 1.0))
    found = ideal * min(1.0, float((usable / ideal).min()))
    if target is not None and not np.allclose(found.sum(), target):
        short = int(np.argmax(np.maximum(ideal / have, 1.0) - np.array(repetitions)))
        raise ValueError(
            f"a mixture of {target:,} needs {int(ideal[short]):,} of source {short}, which has {sizes[short]:,}, used at most "
            f"{repetitions[short]:g} times: {int(ideal[short] - usable[short]):,} are missing; {int(found.sum()):,} can be"
        )
    return found.astype(np.int64)


def sample_tokens(sources: Sequence[np.ndarray], max_tokens: int, seed: int | None) -> np.ndarray:
    """Spans (n, 3) of about ``max_tokens`` tokens out of ``sources`` of spans (file, first token, one past the last).

    Each gives in proportion to its size: whole repetitions, and one stretch that begins anywhere, or without a seed at its
    beginning. OLMo-core's token sampling.
    """
    rng = None if seed is None else np.random.Generator(np.random.PCG64(seed))
    totals = [_tokens(spans) for spans in sources]
    parts = [np.zeros((0, 3), np.int64)]
    for spans, total in zip(sources, totals, strict=True):
        wanted = round(max_tokens * (total / sum(totals)))
        parts += [spans] * (wanted // total)
        if rest := wanted % total:
            start = 0 if rng is None else int(rng.integers(0, total - rest))
            parts.append(span_slice(spans, start, start + rest))
    return np.concatenate(parts)


def sample_documents(documents: np.ndarray, max_tokens: int, seed: int | None) -> np.ndarray:
    """Whole documents out of ``documents`` (n, 3), at most ``max_tokens`` tokens.

    All of them as often as they fit, and then the first ones, in a random order if there is a seed. OLMo-core's document
    sampling. ValueError if none fits.
    """
    shuffled = documents.copy()
    if seed is not None:
        np.random.Generator(np.random.PCG64(seed)).shuffle(shuffled, axis=0)
    ends = np.cumsum(shuffled[:, 2] - shuffled[:, 1])
    times, rest = divmod(max_tokens, int(ends[-1]))
    found = np.concatenate([np.tile(shuffled, (times, 1)), shuffled[ends <= rest]])
    if not len(found):
        raise ValueError(f"no whole document fits into {max_tokens:,} tokens; the first has {int(ends[0]):,}")
    return found


def span_slice(spans: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Tokens ``start`` to before ``stop`` of spans (n, 3), as spans.

    >>> span_slice(np.array([[0, 5, 9], [1, 0, 4]]), 3, 6).tolist()
    [[0, 8, 9], [1, 0, 2]]
    """
    ends = np.cumsum(spans[:, 2] - spans[:, 1])
    begins = ends - (spans[:, 2] - spans[:, 1])
    inside = (ends > start) & (begins < stop)
    found = spans[inside].copy()
    found[:, 1] += np.maximum(start - begins[inside], 0)
    found[:, 2] -= np.maximum(ends[inside] - stop, 0)
    return found


def apportion(wanted: Sequence[int], most: Sequence[int], sequence_length: int, instances: int) -> list[int]:
    """Tokens of whole instances of each file: about those ``wanted`` and at most ``most``, and ``instances`` in all.

    OLMo-core's source mixtures: rounded down, and what is missing is given to those that have more: evenly, and then by the
    largest remainder (Hamilton's method). Fewer in all if there are no more.
    """
    caps = [tokens // sequence_length for tokens in most]
    counts = [min(tokens // sequence_length, cap) for tokens, cap in zip(wanted, caps, strict=True)]
    rests = [tokens % sequence_length if count < cap else 0 for tokens, count, cap in zip(wanted, counts, caps, strict=True)]
    missing = instances - sum(counts)
    open_files = [i for i, count in enumerate(counts) if count < caps[i]]
    if missing > 0 and open_files:
        base = missing // len(open_files)
        for i in open_files:
            counts[i] = min(counts[i] + base, caps[i])
        left = instances - sum(counts)
        for _, i in sorted(((rests[i], i) for i in open_files if counts[i] < caps[i]), reverse=True)[:left]:
            counts[i] += 1
    return [count * sequence_length for count in counts]


@dataclass(frozen=True)
class MixPhase:
    """From instance ``first`` of the run on, the ``ratios`` of all sources."""

    first: int
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Mixture:
    """Which instances a run sees: of each of several sources a share, and of each source all before any again.

    ``sizes``: instances of each source, which are numbered one source behind the other. ``phases``: ratios that change during
    the run, the first from 0 on. Each source is shuffled by itself, anew in every pass over it.
    """

    sizes: tuple[int, ...]
    phases: tuple[MixPhase, ...]
    seed: int

    @cached_property
    def offsets(self) -> np.ndarray:
        """The number of each source's first instance."""
        return np.concatenate([[0], np.cumsum(self.sizes)[:-1]]).astype(np.int64)

    @cached_property
    def borders(self) -> np.ndarray:
        """Where the part of each source in a turn ends, by phase: (phases, sources) int64; rounded once, so that all agree."""
        return np.array([np.round(np.cumsum(phase.ratios) * TURN) for phase in self.phases]).astype(np.int64)

    def counts(self, n: int) -> np.ndarray:
        """How many of the first ``n`` instances of the run are of each source: (sources,) int64, their sum is ``n``."""
        found = np.zeros(len(self.sizes), np.int64)
        for phase, borders, end in zip(self.phases, self.borders, self._ends(), strict=True):
            if n <= phase.first:
                break
            stop = n if end is None else min(n, end)
            below = [0, *(_below(int(b), stop) - _below(int(b), phase.first) for b in borders)]
            found += np.diff(below)
        return found

    def __call__(self, first: int, count: int) -> np.ndarray:
        """The numbers of the ``count`` instances of the run after ``first`` others: (count,) int64."""
        source = self.sources(first, count)
        numbers, before = np.empty(count, np.int64), self.counts(first)
        for s in np.unique(source):
            at = np.flatnonzero(source == s)
            drawn = before[s] + np.arange(len(at))
            passes, places = np.divmod(drawn, self.sizes[s])
            for nth in np.unique(passes):
                these = np.flatnonzero(passes == nth)  # one behind the other
                start, seed = int(places[these[0]]), self.seed + 1_000_003 * int(s)
                inside = keyed_range(start, start + len(these), self.sizes[s], seed, int(nth) + 1)
                numbers[at[these]] = self.offsets[s] + inside
        return numbers

    def sources(self, first: int, count: int) -> np.ndarray:
        """Of which source those instances are: (count,) int64."""
        i = np.arange(first, first + count, dtype=np.uint64)
        turn = (i * np.uint64(STRIDE)) % np.uint64(TURN)
        phase = np.searchsorted([p.first for p in self.phases], i, side="right") - 1
        return (turn[:, None].astype(np.int64) >= self.borders[phase]).sum(axis=1)

    def _ends(self) -> list[int | None]:
        return [*(phase.first for phase in self.phases[1:]), None]


@lru_cache(maxsize=4096)
def _below(border: int, n: int) -> int:
    """How many i in 0, …, n - 1 have ``i · STRIDE mod TURN`` below ``border``."""
    # i·S mod T < b  <=>  floor(i·S / T) - floor((i·S - b) / T) is 1
    return _floor_sum(n, TURN, STRIDE, 0) - _floor_sum(n, TURN, STRIDE, -border)


def _floor_sum(n: int, m: int, a: int, b: int) -> int:
    """Σ floor((a i + b) / m) over i in 0, …, n - 1, by Euclid's algorithm (Graham, Knuth, Patashnik, section 3.5).

    >>> _floor_sum(4, 10, 6, 3)  # 0 + 0 + 1 + 2
    3
    """
    total = 0
    while True:
        total += (n - 1) * n // 2 * (a // m) + n * (b // m)
        a, b = a % m, b % m
        last = a * n + b
        if last < m:
            return total
        n, b = divmod(last, m)
        m, a = a, m


def _tokens(spans: np.ndarray) -> int:
    return int((spans[:, 2] - spans[:, 1]).sum())
