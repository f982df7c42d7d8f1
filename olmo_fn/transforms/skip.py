"""Skipping steps by their number: their batches are read, and nothing is learned from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from olmo_fn.core.chain import Metrics
from olmo_fn.core.gradients import Signals
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, State, Step
from olmo_fn.tree import Tree


def skip_steps(ranges: Sequence[tuple[int, int]]) -> Transform[Step, Step]:
    """Make no update in the steps of ``ranges``, both ends included; steps count from 1. OLMo-core's ``steps_to_skip``.

    For data that is known to hurt: start again from a checkpoint before it, and skip it. As in any skipped step,
    parameters and slots keep their bits.

    >>> skip_steps([(100, 120)]).name
    'skip_steps(100-120)'
    """
    for first, last in ranges:
        if not 1 <= first <= last:
            raise ValueError(f"skip_steps: {first} to {last} is no range of steps; the first is 1, and both ends are included")

    def apply(inner: Step) -> Step:
        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            now = state.step + 1
            skip = torch.zeros_like(now, dtype=torch.bool)
            for first, last in ranges:
                skip = skip | ((now >= first) & (now <= last))
            return inner.control(state, signals.skipping(skip), metrics)

        return replace(inner, control=control)

    return Transform(f"skip_steps({', '.join(f'{a}-{b}' for a, b in ranges)})", Step, Step, apply)
