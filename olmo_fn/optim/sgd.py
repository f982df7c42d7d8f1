"""Stochastic gradient descent, the shortest optimizer there is."""

from __future__ import annotations

from torch import Tensor

from olmo_fn.optim.base import optimizer
from olmo_fn.optim.schedules import Schedule
from olmo_fn.step import Leaf, Scalars, Slots, Transform


def sgd(lr: Schedule | float) -> Transform:
    """``p - lr · g``."""

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        return p - s["lr"] * g, slots

    leaf = Leaf(lambda p: {}, update)
    return optimizer("sgd", lambda path: leaf, lr)
