"""How the optimizer of a leaf becomes the optimizer of a step."""

from __future__ import annotations

from collections.abc import Callable

import torch

from olmo_fn.grad import Grads, Metrics
from olmo_fn.optim.schedules import Schedule, constant
from olmo_fn.step import Leaf, Scalars, State, Step, Transform
from olmo_fn.tree import Tree


def optimizer(name: str, leaf: Callable[[str], Leaf], lr: Schedule | float) -> Transform:
    """A transform from gradients to a Step that updates each parameter with ``leaf(path)``.

    Every update gets the scalars ``lr``, ``count`` (updates done, this one included) and ``skip`` (0-d tensors). A step
    whose loss or gradient norm is not finite is skipped: parameters and slots stay as they are, bit for bit. The metrics gain
    ``lr`` and ``skipped``.
    """
    schedule = lr if callable(lr) else constant(lr)

    def init_control() -> Tree:
        return {name: {"count": torch.zeros((), dtype=torch.int64)}}

    def control(state: State, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
        finite = metrics["loss"].isfinite() & metrics["grad_norm"].isfinite()
        skip = ~finite | metrics.get("skip", False)
        done = state.slots[name]["count"]
        rate = schedule(state.step + 1)
        scalars = {"lr": rate, "count": done + 1, "skip": skip}
        report = {k: v for k, v in metrics.items() if k != "skip"}
        slot = {name: {"count": torch.where(skip, done, done + 1)}}
        return slot, scalars, {**report, "lr": rate, "skipped": skip.float()}

    return Transform(f"{name}(...)", Grads, Step, lambda grads: Step(grads, init_control, control, leaf))
