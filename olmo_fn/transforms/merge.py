"""The mean of the weights over the last steps before a checkpoint (OLMo-core's model merging)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from olmo_fn.core.chain import Metrics
from olmo_fn.core.gradients import Signals
from olmo_fn.core.pipe import Transform, averaging
from olmo_fn.core.step import Leaf, Scalars, Slots, State, Step
from olmo_fn.kernels import Function
from olmo_fn.tree import Tree


def merge(last: int, at: Sequence[int]) -> Transform[Step, Step]:
    """Keep in the slot ``merge`` the mean of the parameters after the ``last`` steps up to and including each step of ``at``.

    Between them it keeps the last mean: the checkpoint of step ``at`` holds the merged weights in ``slots.merge``. Skipped
    steps do not count; before the first window the slot is the initial parameters. ValueError if two windows overlap.

        merge = merge + (params - merge) / k          with k = 1, 2, … the updates in this window
    """
    ends = sorted(at)
    if last < 1 or not ends or ends[0] < last:
        raise ValueError(
            f"merge: the last {last} steps before {ends[0] if ends else 'none'}; give 1 to as many as there are before"
        )
    for a, b in pairwise(ends):
        if b - a < last:
            raise ValueError(
                f"merge: the last {last} steps before {b} overlap with those before {a}; merge fewer or less often"
            )
    name, counter, spans = "merge", "merge_window", ranges(ends)

    def apply(inner: Step) -> Step:
        def init_control() -> Tree:
            return {**inner.init_control(), counter: {"count": torch.zeros((), dtype=torch.int64)}}

        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            own, scalars, metrics = inner.control(state, signals, metrics)
            device = state.step.device  # where they are made, since to bring them there would wait for it
            now = torch.cat([torch.arange(r.start, r.stop, r.step, device=device) for r in spans]) - (state.step + 1)  # to go
            inside = ((now >= 0) & (now < last)).any()
            count = torch.where((now == last - 1).any(), 0, state.slots[counter]["count"])
            entered = inside & ~scalars["skip"]
            count = torch.where(entered, count + 1, count)
            weight = torch.where(entered, 1 / count.clamp(min=1).double(), 0.0)
            return {**own, counter: {"count": count}}, {**scalars, "merge_weight": weight}, metrics

        def leaf(path: str) -> Leaf:
            plain = inner.leaf(path)
            init = lambda p: {**plain.init(p), name: p.clone()}  # noqa: E731
            return plain._replace(init=init, update=_merging(plain.update, name))

        return replace(inner, init_control=init_control, control=control, leaf=leaf)

    return Transform(f"merge({last}, {len(ends)} times)", Step, Step, apply, **averaging(name))


def ranges(numbers: Sequence[int]) -> list[range]:
    """Rising numbers as few ranges.

    >>> ranges([2, 4, 6, 7])
    [range(2, 7, 2), range(7, 8)]
    """
    found: list[range] = []
    for n in numbers:
        last = found[-1] if found else range(0)
        if len(last) == 1 or (last and n - last[-1] == last.step):
            found[-1] = range(last[0], n + 1, n - last[-1])
        else:
            found.append(range(n, n + 1))
    return found


@cache
def _merging(leaf_update: Function, name: str) -> Function:
    def update(p: Tensor, g: Tensor, slots: Slots, scalars: Scalars) -> tuple[Tensor, Slots]:
        mean = slots[name]
        new_p, new = leaf_update(p, g, {k: v for k, v in slots.items() if k != name}, scalars)
        return new_p, {**new, name: mean + scalars["merge_weight"] * (new_p.to(mean.dtype) - mean)}

    return update
