"""Lion (Chen et al. 2023, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.schedules import Schedule


def lion(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: Decay | float = 0.1,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """The sign of an interpolated momentum, so every entry moves by lr: take about a tenth of AdamW's, and more decay.

        p = p - lr · weight_decay · p - lr · sign(β₁ m + (1 - β₁) g)          m = β₂ m + (1 - β₂) g

    Slot ``lion_m``, in dtype ``moments`` or the parameter's.
    """
    check_betas("lion", *betas)
    beta1, beta2 = betas

    def init(path: str, p: Tensor) -> Slots:
        return {"lion_m": torch.zeros_like(p, dtype=moments)}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        m = slots["lion_m"]
        return s["lr"] * (beta1 * m + (1 - beta1) * g).sign(), {"lion_m": beta2 * m + (1 - beta2) * g}

    return optimizer("lion", Rule(init, update), lr, weight_decay)
