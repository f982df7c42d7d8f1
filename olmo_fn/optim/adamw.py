"""AdamW (Loshchilov & Hutter 2019, algorithm 2)."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.optim.base import optimizer
from olmo_fn.optim.schedules import Schedule
from olmo_fn.step import Leaf, Scalars, Slots, Transform
from olmo_fn.tree import matches

NO_DECAY = ("embed", "*norm")


def adamw(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    no_decay: tuple[str, ...] = NO_DECAY,
    moments: torch.dtype | None = None,
) -> Transform:
    """Adam with decoupled weight decay; t counts the updates that were not skipped.

        m = β₁ m + (1 - β₁) g          v = β₂ v + (1 - β₂) g²
        p = p - lr · weight_decay · p - lr · (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + eps)

    As in PyTorch and OLMo-core, the decay is multiplied by the learning rate. Parameters whose path matches
    ``no_decay`` are not decayed; ``("embed",)`` is OLMo-core's rule. ``moments``: dtype of m and v, the parameter's if
    not given; all is computed in at least fp32. Slots ``adamw_m`` and ``adamw_v``.
    """
    beta1, beta2 = betas

    def init(p: Tensor) -> Slots:
        return {"adamw_m": torch.zeros_like(p, dtype=moments), "adamw_v": torch.zeros_like(p, dtype=moments)}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        t = s["count"].double()
        wide = torch.promote_types(p.dtype, torch.float32)
        p, g, m, v = (x.to(wide) for x in (p, g, slots["adamw_m"], slots["adamw_v"]))
        m = m + (1 - beta1) * (g - m)
        v = v * beta2 + (1 - beta2) * g * g
        step_size = s["lr"] / (1 - beta1**t)
        root = (v.sqrt() / (1 - beta2**t).sqrt()) + eps
        p = p * (1 - s["lr"] * s["weight_decay"]) - step_size * (m / root)
        return p, {"adamw_m": m, "adamw_v": v}

    decayed = Leaf(init, update, scalars={"weight_decay": weight_decay})
    free = Leaf(init, update, scalars={"weight_decay": 0.0})
    return optimizer("adamw", lambda path: free if matches(path, no_decay) else decayed, lr)
