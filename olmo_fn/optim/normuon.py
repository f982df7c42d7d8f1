"""NorMuon (Li et al. 2025): Muon with a learning rate of its own for every output neuron."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.muon import DION, NewtonSchulz, Scale, check_matrix, orthogonalize, scale_of
from olmo_fn.optim.schedules import Schedule


def normuon(
    lr: Schedule | float,
    momentum: float = 0.95,
    beta2: float = 0.95,
    nesterov: bool = True,
    weight_decay: Decay | float = 0.1,
    iteration: NewtonSchulz = DION,
    scale: Scale = "rms",
    dtype: torch.dtype = torch.bfloat16,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """`muon`, whose step u is divided by the root of its neurons' mean squares and brought back to its norm (algorithm 1).

        v = β₂ v + (1 - β₂) mean(u², over in)          û = u / (√v + 1e-8)          u = û · ‖u‖ / ‖û‖

    Slots ``normuon_momentum`` and ``normuon_v``, which is (..., 1, out). OLMo-core's is ``normuon(lr, nesterov=False)``.
    """
    check_betas("normuon", momentum, beta2)
    factor = scale_of("normuon", scale)
    norm = torch.linalg.matrix_norm

    def init(path: str, p: Tensor) -> Slots:
        check_matrix("normuon", path, p)
        return {"normuon_momentum": torch.zeros_like(p, dtype=moments), "normuon_v": torch.zeros_like(p[..., :1, :])}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        m = momentum * slots["normuon_momentum"] + g
        u = orthogonalize(g + momentum * m if nesterov else m, iteration, dtype)
        v = beta2 * slots["normuon_v"] + (1 - beta2) * u.square().mean(-2, keepdim=True)
        even = u / (v.sqrt() + 1e-8)
        even = even * (norm(u, keepdim=True) / norm(even, keepdim=True).clamp(min=1e-8))
        return s["lr"] * factor(*p.shape[-2:]) * even, {"normuon_momentum": m, "normuon_v": v}

    return optimizer("normuon", Rule(init, update, elementwise=False, unlike=("normuon_v",)), lr, weight_decay)
