"""Learning-rate schedules: pure functions of the step (a 0-d integer tensor, the first step is 1), in fp64.

Formulas and the ≤ / < at the ends of the phases are OLMo-core's, so a run there has the same rates here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor], Tensor]


def constant(lr: float) -> Schedule:
    """The same rate at every step.

    >>> constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    return lambda step: torch.full_like(step, lr, dtype=torch.float64)


def warmup_cosine(lr: float, warmup: int, total: int, alpha_f: float = 0.1) -> Schedule:
    """Linear from 0 to ``lr`` over ``warmup`` steps, then half a cosine down to ``alpha_f · lr`` at ``total``.

    >>> round(warmup_cosine(1.0, 10, 110)(torch.tensor(60)).item(), 6)
    0.55
    """
    _check(warmup, total)

    def rate(step: Tensor) -> Tensor:
        phase = math.pi * (_after(step, warmup) / max(1, total - warmup)).clamp(max=1.0)
        decayed = alpha_f * lr + (lr - alpha_f * lr) * (1 + phase.cos()) / 2
        return torch.where(step < warmup, _ramp(lr, step, warmup), decayed)

    return rate


def warmup_linear(lr: float, warmup: int, total: int, alpha_f: float = 0.1) -> Schedule:
    """Linear from 0 to ``lr`` over ``warmup`` steps, then linear down to ``alpha_f · lr`` at ``total``.

    >>> round(warmup_linear(1.0, 10, 110)(torch.tensor(60)).item(), 6)
    0.55
    """
    _check(warmup, total)

    def rate(step: Tensor) -> Tensor:
        part = (_after(step, warmup) / max(1, total - warmup)).clamp(max=1.0)
        return torch.where(step < warmup, _ramp(lr, step, warmup), lr - (lr - alpha_f * lr) * part)

    return rate


def wsd(lr: float, warmup: int, total: int, decay: int | None = None, final: float = 0.0) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024): ``lr`` until ``total - decay``, then linear to ``final`` at ``total``.

    ``decay`` is in steps, a tenth of ``total`` when not given.

    >>> [round(wsd(1.0, 10, 100)(torch.tensor(s)).item(), 6) for s in (5, 50, 95, 100)]
    [0.5, 1.0, 0.5, 0.0]
    """
    length = round(0.1 * total) if decay is None else decay
    _check(warmup + length, total)

    def rate(step: Tensor) -> Tensor:
        left = (total - step).double().clamp(min=0)
        tail = final + (lr - final) * left.clamp(max=length) / max(1, length)
        late = torch.where(step >= total - length, tail, torch.full_like(tail, lr))
        return torch.where(step <= warmup, _ramp(lr, step, warmup), late) if warmup else late

    return rate


def warmup_constant(lr: float, warmup: int) -> Schedule:
    """Linear from 0 to ``lr`` over ``warmup`` steps, then ``lr``.

    >>> [warmup_constant(1.0, 4)(torch.tensor(s)).item() for s in (1, 4, 9)]
    [0.25, 1.0, 1.0]
    """
    return lambda step: _ramp(lr, step, warmup)


def _ramp(lr: float, step: Tensor, warmup: int) -> Tensor:
    return lr * step.double().clamp(max=warmup) / warmup if warmup else constant(lr)(step)


def _after(step: Tensor, warmup: int) -> Tensor:
    return (step - warmup).double().clamp(min=0)


def _check(used: int, total: int) -> None:
    if used > total:
        raise ValueError(
            f"warm-up and decay take {used} steps, but the schedule has only {total}; shorten --schedule.warmup or train longer"
        )
