"""Stochastic gradient descent, with momentum if wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.schedules import Schedule


def sgd(
    lr: Schedule | float,
    momentum: float = 0.0,
    nesterov: bool = False,
    weight_decay: Decay | float = 0.0,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """``p - lr · g``; with momentum μ as in PyTorch (Sutskever et al. 2013, without dampening):

        m = μ m + g          p = p - lr · m,   or with nesterov   p = p - lr · (g + μ m)

    Slot ``sgd_momentum``, in dtype ``moments`` or the parameter's; none without momentum.
    """
    check_betas("sgd", momentum)
    if nesterov and not momentum:
        raise ValueError("sgd(nesterov=True) needs a momentum; give momentum=0.9, or leave nesterov out")

    def init(path: str, p: Tensor) -> Slots:
        return {"sgd_momentum": torch.zeros_like(p, dtype=moments)} if momentum else {}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        if not momentum:
            return s["lr"] * g, {}
        m = momentum * slots["sgd_momentum"] + g
        return s["lr"] * (g + momentum * m if nesterov else m), {"sgd_momentum": m}

    return optimizer("sgd", Rule(init, update), lr, weight_decay)
