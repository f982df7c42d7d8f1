"""Batch size and sequence length that change during a run: pure functions of the step, with an exact account of the tokens.

Windows are always of the longest length and are read in the one order of `olmo_fn.data.shuffle`. A step takes the next
``batch_size`` of them; with a shorter sequence length it cuts each into as many sequences as it holds. So every token comes
up once an epoch, whatever the sizes, and a resumed run asks for its next step. Imports no torch but for tensors.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Phase(NamedTuple):
    """From ``step`` (from 0) on: windows a step, and the length of the sequences that they are cut into.

    ``used``: leading tokens of a window that are trained on, 0 for all.
    """

    step: int
    batch_size: int
    sequence_length: int
    used: int = 0


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run's steps. ``window``: tokens of a window, the longest sequence length.

    >>> sizes = Sizes(8, (Phase(0, 2, 4), Phase(10, 4, 8)))
    >>> sizes.at(12).batch_size, sizes.first_window(12), sizes.tokens_before(12)
    (4, 28, 224)
    """

    window: int
    phases: tuple[Phase, ...]

    def __post_init__(self) -> None:
        starts = [phase.step for phase in self.phases]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            raise ValueError(
                f"sizes must begin at step 0 and their steps must grow, not {', '.join(map(str, starts)) or 'be none'}"
            )
        for phase in self.phases:
            if phase.batch_size < 1 or phase.sequence_length < 2:
                raise ValueError(
                    f"from step {phase.step} on, a batch of {phase.batch_size} x {phase.sequence_length} is too small"
                )
            if not phase.used <= self.window or self._used(phase) % phase.sequence_length:
                used, length = self._used(phase), phase.sequence_length
                raise ValueError(f"from step {phase.step} on, sequences of {length} do not fill windows of {used}")

    @cached_property
    def largest(self) -> int:
        """The largest batch size, in windows; an epoch is cut to whole batches of it."""
        return max(phase.batch_size for phase in self.phases)

    def at(self, step: int) -> Phase:
        """The sizes of ``step`` (from 0)."""
        return self.phases[bisect_right(self.phases, step, key=lambda phase: phase.step) - 1]

    def rows_per_window(self, step: int) -> int:
        """Rows that each window of ``step`` is cut into."""
        phase = self.at(step)
        return self._used(phase) // phase.sequence_length

    def rows(self, step: int) -> int:
        """Rows of the batch of ``step``, over all ranks."""
        return self.at(step).batch_size * self.rows_per_window(step)

    def first_window(self, step: int) -> int:
        """Windows taken by all steps before ``step``."""
        return sum(phase.batch_size * steps for phase, steps in self._steps_before(step))

    def tokens_before(self, step: int) -> int:
        """Tokens trained on in all steps before ``step``, masked ones included."""
        return sum(self._a_step(phase) * steps for phase, steps in self._steps_before(step))

    def tokens(self, steps: Tensor) -> Tensor:
        """`tokens_before` as a function of a 0-d integer tensor, which compiles: for `schedules.in_tokens`."""
        import torch

        seen = torch.zeros_like(steps)
        for phase, end in self._ends():
            seen = seen + (steps - phase.step).clamp(min=0, max=None if end is None else end - phase.step) * self._a_step(phase)
        return seen

    def lr_ratio(self, steps: Tensor) -> Tensor:
        """√(batch size / first batch size), fp64: how OLMo-core raises the rate of Adam with the batch.

        ``steps`` counts from 1, as schedules do: for `schedules.scale`.
        """
        import torch

        ratio = torch.ones_like(steps, dtype=torch.float64)
        for phase in self.phases:
            factor = (phase.batch_size / self.phases[0].batch_size) ** 0.5
            ratio = torch.where(steps > phase.step, factor, ratio)
        return ratio

    def _used(self, phase: Phase) -> int:
        return phase.used or self.window

    def _a_step(self, phase: Phase) -> int:
        return phase.batch_size * self._used(phase)

    def _ends(self) -> Iterator[tuple[Phase, int | None]]:
        """Each phase, and the first step after it."""
        return zip_longest(self.phases, (phase.step for phase in self.phases[1:]))

    def _steps_before(self, step: int) -> Iterator[tuple[Phase, int]]:
        """Each phase that begins before ``step``, and its steps before it."""
        phases = ((phase, end) for phase, end in self._ends() if phase.step < step)
        return ((phase, (step if end is None else min(step, end)) - phase.step) for phase, end in phases)


def constant_sizes(batch_size: int, sequence_length: int) -> Sizes:
    """The same sizes throughout."""
    return Sizes(sequence_length, (Phase(0, batch_size, sequence_length),))


def batch_phases(batch_sizes: Sequence[int], starts: Sequence[int], window: int, units: str = "steps") -> list[tuple[int, int]]:
    """``(first step, batch size)`` for ``batch_sizes``, each of which holds from its entry of ``starts`` on, the first from 0.

    OLMo-core's batch-size schedule. In tokens, a size begins with the first step before which so many are seen.

    >>> batch_phases([2, 4, 8], [0, 1000, 5000], window=100, units="tokens")
    [(0, 2), (5, 4), (15, 8)]
    """
    if len(batch_sizes) != len(starts) or list(starts) != sorted(set(starts)) or not starts or starts[0] != 0:
        raise ValueError(
            f"{len(batch_sizes)} batch sizes begin at {', '.join(map(str, starts)) or 'nothing'}; give one start for each, "
            "the first 0, and growing"
        )
    if units == "steps":
        return list(zip(starts, batch_sizes, strict=True))
    phases, step, seen = [(0, batch_sizes[0])], 0, 0
    for start, before, size in zip(starts[1:], batch_sizes, batch_sizes[1:], strict=False):
        more = max(0, -(-(start - seen) // (before * window)))  # 0: the size before has no step
        step, seen = step + more, seen + more * before * window
        phases.append((step, size))
    return phases


def length_phases(shortest: int, steps: int, window: int, multiple: int = 128, truncate: bool = False) -> list[tuple[int, int]]:
    """``(first step, sequence length)`` that grows in a line from ``shortest`` at step 0 to ``window`` at ``steps``.

    OLMo-core's sequence-length schedule: lengths are multiples of ``multiple``, rounded down. Unless ``truncate``, they
    also divide the window, so that no token is lost; it is then the largest such length that the line has reached.

    >>> length_phases(128, 100, 1024)
    [(0, 128), (15, 256), (43, 512), (100, 1024)]
    >>> length_phases(128, 100, 512, truncate=True)
    [(0, 128), (34, 256), (67, 384), (100, 512)]
    """
    lengths = [n for n in range(multiple, window + 1, multiple) if n >= shortest and (truncate or window % n == 0)]
    if not 2 <= shortest <= window or not lengths or lengths[0] != shortest or lengths[-1] != window:
        kind = "multiples" if truncate else "multiples that divide it"
        raise ValueError(
            f"sequence lengths from {shortest} to {window} must be {kind} of {multiple}; there are "
            f"{', '.join(map(str, lengths[:8])) or 'none'}"
        )
    if steps < 1:
        raise ValueError(f"the sequence length must grow over at least 1 step, not {steps}")
    if shortest == window:
        return [(0, window)]
    reached = {-(-(n - shortest) * steps // (window - shortest)): n for n in lengths}  # the longest, if several at one step
    return sorted(reached.items())


def together(
    window: int, batches: Sequence[tuple[int, int]], lengths: Sequence[tuple[int, int]], truncate: bool = False
) -> Sizes:
    """Batch sizes and sequence lengths, each with its own first steps, as the sizes of a run.

    >>> [tuple(phase) for phase in together(8, [(0, 2), (10, 4)], [(0, 4), (5, 8)]).phases]
    [(0, 2, 4, 0), (5, 2, 8, 0), (10, 4, 8, 0)]
    """
    phases = []
    for step in sorted({start for start, _ in (*batches, *lengths)}):
        (batch_size, length) = (next(v for start, v in reversed(list(part)) if start <= step) for part in (batches, lengths))
        phases.append(Phase(step, batch_size, length, length if truncate else 0))
    return Sizes(window, tuple(phases))
