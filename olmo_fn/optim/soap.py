"""SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's preconditioner."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.muon import check_matrix
from olmo_fn.optim.schedules import Schedule


def soap(
    lr: Schedule | float,
    betas: tuple[float, float] = (0.95, 0.95),
    shampoo_beta: float = 0.95,
    eps: float = 1e-8,
    every: int = 10,
    max_dim: int = 8192,
    weight_decay: Decay | float = 0.1,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """Algorithm 3, for matrices (..., n, k): the gradient is turned into eigenbases of L and R, and Adam's step back.

        L = β L + (1 - β) g gᵀ     R = β R + (1 - β) gᵀ g     every ``every`` steps: Q_L = qr(L Q_L), Q_R = qr(R Q_R)
        m = β₁ m + (1 - β₁) g      v = β₂ v + (1 - β₂) (Q_Lᵀ g Q_R)²
        p = p - lr · weight_decay · p - lr · Q_L (Q_Lᵀ m̂ Q_R / (√v̂ + eps)) Q_Rᵀ

    m̂ and v̂ are without bias, as in Adam. The first step finds the bases by an eigendecomposition. A side of more than
    ``max_dim`` keeps its own basis. Slots ``soap_m``, ``soap_v`` and, in fp32 at least, ``soap_l``, ``soap_r`` (..., n, n)
    and their bases ``soap_ql``, ``soap_qr``.
    """
    check_betas("soap", *betas, shampoo_beta)
    beta1, beta2 = betas

    def init(path: str, p: Tensor) -> Slots:
        check_matrix("soap", path, p)
        slots = {"soap_m": torch.zeros_like(p, dtype=moments), "soap_v": torch.zeros_like(p, dtype=moments)}
        for side, n in (("l", p.shape[-2]), ("r", p.shape[-1])):
            if n <= max_dim:
                square = p.new_zeros((*p.shape[:-2], n, n), dtype=torch.promote_types(p.dtype, torch.float32))
                eye = torch.eye(n, dtype=square.dtype, device=square.device)
                slots |= {f"soap_{side}": square, f"soap_q{side}": eye.expand_as(square).clone()}
        return slots

    def scalars(s: Scalars) -> Scalars:
        t = s["count"].double()
        return {"unbiased_m": 1 / (1 - beta1**t), "unbiased_v": (1 - beta2**t).rsqrt()}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        new = dict(slots)
        for side, x in (("l", g), ("r", g.mT)):
            if f"soap_{side}" in slots:
                new[f"soap_{side}"] = shampoo_beta * slots[f"soap_{side}"] + (1 - shampoo_beta) * x @ x.mT
                new[f"soap_q{side}"] = basis(new[f"soap_{side}"], slots[f"soap_q{side}"], s["count"])
        left, right = new.get("soap_ql"), new.get("soap_qr")
        m = beta1 * slots["soap_m"] + (1 - beta1) * g
        v = beta2 * slots["soap_v"] + (1 - beta2) * turn(g, left, right).square()
        step = turn(m, left, right) * s["unbiased_m"] / (v.sqrt() * s["unbiased_v"] + eps)
        return s["lr"] * turn_back(step, left, right), {**new, "soap_m": m, "soap_v": v}

    def basis(a: Tensor, q: Tensor, count: Tensor) -> Tensor:
        q = when(count == 1, lambda a, q: torch.linalg.eigh(a).eigenvectors, a, q)
        return when((count % every == 0) & (count > 1), lambda a, q: torch.linalg.qr(a @ q).Q, a, q)

    return optimizer(
        "soap",
        Rule(init, update, scalars, elementwise=False, unlike=("soap_l", "soap_ql", "soap_r", "soap_qr")),
        lr,
        weight_decay,
    )


def turn(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_Lᵀ x Q_R."""
    x = x if left is None else left.mT @ x
    return x if right is None else x @ right


def turn_back(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Q_L x Q_Rᵀ."""
    x = x if left is None else left @ x
    return x if right is None else x @ right.mT


def when(condition: Tensor, compute: Callable[..., Tensor], a: Tensor, q: Tensor) -> Tensor:
    """``compute(a, q)`` where the condition (0-d) holds, else ``q``; only one of the two is computed, but inside vmap."""
    if torch.compiler.is_compiling():
        new = lambda a, q: compute(a, q).reshape(q.shape).contiguous()  # noqa: E731
        found: Any = torch.cond(condition, new, lambda a, q: q.clone(), (a, q))
        return found
    if torch._C._are_functorch_transforms_active():  # where each run has a condition of its own
        return torch.where(condition, compute(a, q), q)
    return compute(a, q) if condition else q
