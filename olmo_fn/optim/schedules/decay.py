"""Schedules with a decay of its own length at the end: it can be moved to train on from before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_fn.optim.schedules.base import Length, Schedule, check_fit, constant, fraction, half_cosine, ramp, whole
from olmo_fn.optim.schedules.warmup import _at_least_one

TENTH = 0.1


def wsd(lr: float, warmup: Length, total: int, decay: Length | None = None, final: float = 0.0, start: float = 0.0) -> Schedule:
    """Warm-up, stable, decay (Hu et al. 2024): ``lr`` until ``total - decay``, then linear to ``final`` at ``total``.

    ``decay``: a tenth of ``total`` when not given. Beyond ``total`` the rate stays ``final``, where OLMo-core's goes on
    falling, below 0; and without a warm-up step 0 has the rate ``lr``, where OLMo-core divides by zero.

    >>> [round(wsd(1.0, 10, 100)(torch.tensor(s)).item(), 6) for s in (5, 50, 95, 100)]
    [0.5, 1.0, 0.5, 0.0]
    """
    up, down = _lengths("wsd", warmup, decay, total)

    def rate(step: Tensor) -> Tensor:
        after = _tail(constant(lr), step, total, down, final)
        return torch.where(step <= up, ramp(lr, step, up, start), after) if up else after

    return rate


def warmup_cosine_linear(
    lr: float,
    warmup: Length,
    total: int,
    alpha_f: float = 0.1,
    decay: Length | None = None,
    final: float = 0.0,
    start: float = 0.0,
) -> Schedule:
    """`warmup_cosine` until ``total - decay``, and from its value there linear to ``final`` at ``total``.

    >>> schedule = warmup_cosine_linear(1.0, 0, 100, alpha_f=0.0, decay=50)
    >>> [round(schedule(torch.tensor(s)).item(), 6) for s in (50, 75, 100)]
    [0.5, 0.25, 0.0]
    """
    up, down = _lengths("warmup_cosine_linear", warmup, decay, total)

    def cosine(step: Tensor) -> Tensor:
        return half_cosine(lr, alpha_f * lr, step - up, max(1, total - up))

    def rate(step: Tensor) -> Tensor:
        return torch.where(step < up, ramp(lr, step, up, start), _tail(cosine, step, total, down, final))

    return rate


def power(
    lr: float,
    warmup: Length,
    total: int,
    b: float = -0.51,
    decay: Length | None = None,
    final: float = 0.0,
    start: float = 0.0,
) -> Schedule:
    """``lr · (step / warmup)ᵇ`` after the warm-up (Shen et al. 2024), and at the end linear to ``final``.

    A warm-up of 0 is refused: OLMo-core would divide by it.

    >>> [round(power(1.0, 10, 1000, b=-0.5)(torch.tensor(s)).item(), 6) for s in (5, 10, 40, 1000)]
    [0.5, 1.0, 0.5, 0.0]
    """
    up, down = _lengths("power", warmup, decay, total)
    _at_least_one("power", up)

    def curve(step: Tensor) -> Tensor:
        return lr * (step.double().clamp(min=up) / up) ** b

    def rate(step: Tensor) -> Tensor:
        return torch.where(step <= up, ramp(lr, step, up, start), _tail(curve, step, total, down, final))

    return rate


def wsds(
    lr: float,
    warmup: Length,
    periods: Sequence[int],
    decay: Length = TENTH,
    multipliers: Sequence[float] = (),
    final: float = 0.0,
    start: float = 0.0,
) -> Schedule:
    """Warm-up, stable, decay, and again stable, decay (Wen et al. 2024): a finished model after each of ``periods``.

    Period i keeps ``multipliers[i] · lr`` (1 when not given) and falls in a line to ``final`` over its last ``decay``
    steps, or that fraction of it. Its last step is at ``final``, the next one at the next period's rate. The warm-up
    is inside the first period; a fraction is one of that. After the last period the rate stays ``final``.

    >>> [round(wsds(1.0, 10, [100, 100])(torch.tensor(s)).item(), 6) for s in (5, 50, 95, 100, 101, 195)]
    [0.5, 1.0, 0.5, 0.0, 1.0, 0.5]
    """
    if not periods:
        raise ValueError("wsds: there are no periods; give the length of each, such as 1000 1000 2000")
    if multipliers and len(multipliers) != len(periods):
        raise ValueError(f"wsds: {len(multipliers)} multipliers for {len(periods)} periods; give one for each")
    up = whole("warmup", warmup, periods[0])
    downs = [whole("decay", decay, period) for period in periods]
    for i, (period, down) in enumerate(zip(periods, downs, strict=True)):
        check_fit(f"wsds, period {i + 1}", period, warmup=0 if i else up, decay=down)
    peaks = [lr * multiplier for multiplier in multipliers or [1.0] * len(periods)]

    def rate(step: Tensor) -> Tensor:
        value, begin = ramp(peaks[0], step, up, start), 0
        for peak, period, down in zip(peaks, periods, downs, strict=True):
            end = begin + period
            value = torch.where(step > max(begin, up), _tail(constant(peak), step, end, down, final), value)
            begin = end
        return value

    return rate


def _lengths(schedule: str, warmup: Length, decay: Length | None, total: int) -> tuple[int, int]:
    up, down = whole("warmup", warmup, total), whole("decay", TENTH if decay is None else decay, total)
    check_fit(schedule, total, warmup=up, decay=down)
    return up, down


def _tail(before: Schedule, step: Tensor, total: int, decay: int, final: float) -> Tensor:
    """``before`` until ``total - decay``, from then on a line from its value there to ``final`` at ``total``."""
    begin = total - decay
    value = before(torch.full_like(step, begin))
    return torch.where(step >= begin, final + (value - final) * fraction(total - step, decay), before(step))
