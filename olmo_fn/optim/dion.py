"""Dion (Ahn et al. 2025): orthonormal steps of low rank, by one power iteration a step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.muon import check_matrix
from olmo_fn.optim.schedules import Schedule
from olmo_fn.spec import Init, Spec, init_leaf


def dion(
    lr: Schedule | float,
    momentum: float = 0.95,
    rank: float = 1.0,
    weight_decay: Decay | float = 0.1,
    seed: int = 0,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """Steps of rank r = ``rank`` · min(in, out), at least 1 (algorithm 1, with our matrices (..., in, out)).

        m = m + g          P = orthonormal(mᵀ Q)          R = m P          m = m - (1 - μ) R Pᵀ
        Q = R / (column norms + 1e-8)          p = p - lr · weight_decay · p - lr · √(out / in) · Q Pᵀ

    What the step leaves out of m stays there for the next. Slots ``dion_momentum`` and ``dion_q``, which is (..., in, r)
    and starts normally distributed, a function of ``seed`` and the parameter's path.
    """
    check_betas("dion", momentum)
    if not 0 < rank <= 1:
        raise ValueError(f"dion(rank={rank}) is a fraction of the matrix's smaller side: more than 0, at most 1")

    def init(path: str, p: Tensor) -> Slots:
        check_matrix("dion", path, p)
        n_in, n_out = p.shape[-2:]
        shape = (*p.shape[:-2], n_in, math.ceil(rank * min(n_in, n_out)))
        q = torch.empty(shape, device="meta") if p.is_meta else init_leaf(Spec(shape, (), Init("normal", 1.0)), seed, path)
        return {"dion_momentum": torch.zeros_like(p, dtype=moments), "dion_q": q.to(p)}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        m = slots["dion_momentum"] + g
        basis = torch.linalg.qr(m.mT @ slots["dion_q"]).Q  # (..., out, r)
        r = m @ basis
        q = r / (r.norm(dim=-2, keepdim=True) + 1e-8)
        step = s["lr"] * (p.shape[-1] / p.shape[-2]) ** 0.5 * (q @ basis.mT)
        return step, {"dion_momentum": m - (1 - momentum) * (r @ basis.mT), "dion_q": q}

    return optimizer("dion", Rule(init, update, elementwise=False, unlike=("dion_q",)), lr, weight_decay)
