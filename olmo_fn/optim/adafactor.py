"""Adafactor (Shazeer & Stern 2018): Adam's second moment from its row and column means, no first moment."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, optimizer
from olmo_fn.optim.schedules import Schedule


def adafactor(
    lr: Schedule | float,
    decay_rate: float = 0.8,
    clip: float = 1.0,
    eps: float | None = None,
    min_rms: float = 1e-3,
    weight_decay: Decay | float = 0.0,
) -> Transform[Grads, Step]:
    """Memory of a matrix's rows plus columns instead of its size (algorithm 4; eps and learning rate as in PyTorch).

        row = (1 - t^-decay_rate) row + t^-decay_rate mean(g², over columns), col alike       v = row col / mean(row)
        u = g / max(√v, eps)       p = p - max(min_rms, rms(p)) · min(lr, 1/√t) · u / max(1, rms(u) / clip)

    So ``lr`` is relative to the size of the parameter. A vector keeps all of v. Dims before the last two are a batch of
    matrices. ``eps`` defaults to the machine's epsilon of the parameter's dtype. Slots ``adafactor_row`` (..., n, 1) and
    ``adafactor_col`` (..., 1, m) of matrices, ``adafactor_v`` of vectors.
    """

    def init(path: str, p: Tensor) -> Slots:
        if p.ndim < 2:
            return {"adafactor_v": torch.zeros_like(p)}
        return {"adafactor_row": torch.zeros_like(p[..., :1]), "adafactor_col": torch.zeros_like(p[..., :1, :])}

    def scalars(s: Scalars) -> Scalars:
        t = s["count"].double()
        return {"fresh": t**-decay_rate, "relative": torch.minimum(s["lr"], t.rsqrt())}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        small = torch.finfo(p.dtype).eps if eps is None else eps
        square = g.square()
        mean = {"adafactor_v": square}
        if p.ndim >= 2:
            mean = {"adafactor_row": square.mean(-1, keepdim=True), "adafactor_col": square.mean(-2, keepdim=True)}
        slots = {k: slots[k] + s["fresh"] * (mean[k] - slots[k]) for k in slots}
        if p.ndim < 2:
            v = slots["adafactor_v"]
        else:
            row, col = slots["adafactor_row"], slots["adafactor_col"]
            v = row * col / row.mean(-2, keepdim=True).clamp(min=small)
        u = g * v.clamp(min=small * small).rsqrt()
        size = s["relative"] * _rms(p).clamp(min=min_rms)
        return size * u / (_rms(u) / clip).clamp(min=1.0), slots

    return optimizer(
        "adafactor", Rule(init, update, scalars, elementwise=False, unlike=("adafactor_row", "adafactor_col")), lr, weight_decay
    )


def _rms(x: Tensor) -> Tensor:
    """Root mean square of each matrix, or of the vector."""
    return x.square().mean(tuple(range(max(-2, -x.ndim), 0)), keepdim=True).sqrt()
