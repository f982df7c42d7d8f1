"""Schedule-Free AdamW (Defazio et al. 2024): an average of the iterates instead of a decaying learning rate."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.schedules import Schedule


def schedule_free_adamw(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float | Decay = 0.1,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """The parameters are the average x, to be evaluated and kept at any time; gradients are taken at y (algorithm 1).

        y = (1 - β₁) z + β₁ x          v = β₂ v + (1 - β₂) g(y)²          γ = lr √(1 - β₂ᵗ)
        z = z - γ (g / (√v + eps) + weight_decay · y)          x = (1 - c) x + c z,   c = γ² / Σ γ²

    Give a constant rate, perhaps with a warm-up. Slots ``schedule_free_z``, which starts at the parameters, and
    ``schedule_free_v`` in dtype ``moments`` or the parameter's; ``schedule_free`` holds Σ γ². y lives only as long as the
    gradient is computed.
    """
    check_betas("schedule_free", *betas)
    beta1, beta2 = betas
    decay = weight_decay if isinstance(weight_decay, Decay) else Decay(weight_decay)

    def init(path: str, p: Tensor) -> Slots:
        return {"schedule_free_z": p.clone(), "schedule_free_v": torch.zeros_like(p, dtype=moments)}

    def point(p: Tensor, slots: Slots) -> Tensor:
        return slots["schedule_free_z"].lerp(p, beta1)

    def scalars(s: Scalars) -> Scalars:
        gamma = s["lr"] * (1 - beta2 ** s["count"].double()).sqrt()
        total = s["sum"] + gamma.square()
        return {"gamma": gamma, "sum": total, "c": torch.where(total > 0, gamma.square() / total, 0.0)}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        z, v = slots["schedule_free_z"], slots["schedule_free_v"]
        v = beta2 * v + (1 - beta2) * g * g
        step, y = g / (v.sqrt() + eps), z.lerp(p, beta1)
        z = z - s["gamma"] * (step + decay_of(step, y, s))
        return s["c"] * (p - z), {"schedule_free_z": z, "schedule_free_v": v}

    def decay_of(step: Tensor, y: Tensor, s: Scalars) -> Tensor:
        return s["weight_decay"] * y * (step.sign() * y.sign() >= 0 if decay.cautious else 1.0)

    rule = Rule(init, update, scalars, {"sum": 0.0}, point=point, decays=True)
    return optimizer("schedule_free", rule, lr, decay)
