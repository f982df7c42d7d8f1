"""The learning-rate range test (Smith 2017): one short run over all rates, from far too small to far too large."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_fn.optim.schedules.base import Schedule, fraction


def exponential(lr: float, total: int, lr_min: float = 1e-9) -> Schedule:
    """Rises from ``lr_min`` at 0 to ``lr`` at ``total``, by the same factor every step; then ``lr``.

    >>> schedule = exponential(1.0, 100, lr_min=1e-4)
    >>> [round(schedule(torch.tensor(step)).item(), 6) for step in (0, 50, 100)]
    [0.0001, 0.01, 1.0]
    """
    if not 0 < lr_min < lr:
        raise ValueError(f"exponential: lr_min {lr_min:g} must be above 0 and below lr {lr:g}")
    if total < 1:
        raise ValueError(f"exponential: total {total} must be at least 1")

    def rate(step: Tensor) -> Tensor:
        return lr_min * torch.exp(math.log(lr / lr_min) * fraction(step, total))

    return rate
