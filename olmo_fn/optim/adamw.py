"""Adam (Kingma & Ba 2015) and AdamW (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.schedules import Schedule


def adamw(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: Decay | float = 0.1,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """Adam with decoupled weight decay; t counts the updates that were not skipped.

        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) g²
        p = p - lr · weight_decay · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)

    ``moments``: dtype of m and v, the parameter's if not given; all is computed in at least fp32. Slots ``adamw_m`` and
    ``adamw_v``.
    """
    return optimizer("adamw", adam_rule("adamw", betas, eps, moments), lr, weight_decay)


def adam(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """`adamw` without weight decay. Slots ``adam_m`` and ``adam_v``."""
    return optimizer("adam", adam_rule("adam", betas, eps, moments), lr)


def adam_rule(name: str, betas: tuple[float, float], eps: float, moments: torch.dtype | None) -> Rule:
    """Adam's step, with slots ``<name>_m`` and ``<name>_v``."""
    check_betas(name, *betas)
    beta1, beta2 = betas
    slot_m, slot_v = f"{name}_m", f"{name}_v"

    def init(path: str, p: Tensor) -> Slots:
        return {slot_m: torch.zeros_like(p, dtype=moments), slot_v: torch.zeros_like(p, dtype=moments)}

    def scalars(s: Scalars) -> Scalars:
        t = s["count"].double()
        new = {"new_m": torch.full_like(t, 1 - beta1), "new_v": torch.full_like(t, 1 - beta2), "eps": torch.full_like(t, eps)}
        return {**new, "step_size": s["lr"] / (1 - beta1**t), "unbiased": (1 - beta2**t).rsqrt()}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        m, v = slots[slot_m], slots[slot_v]
        m, v = m + s["new_m"] * (g - m), v + s["new_v"] * (g * g - v)
        return s["step_size"] * (m / (v.sqrt() * s["unbiased"] + s["eps"])), {slot_m: m, slot_v: v}

    return Rule(init, update, scalars)
