"""A warm-up, and then one shape to the end."""

from __future__ import annotations

import torch

from olmo_fn.optim.schedules.base import Length, Schedule, check_fit, half_cosine, line, ramp, whole


def warmup_constant(lr: float, warmup: Length, total: int | None = None, start: float = 0.0) -> Schedule:
    """Linear from ``start`` to ``lr`` over ``warmup``, then ``lr``. ``total`` is only needed for a fraction.

    >>> [warmup_constant(1.0, 4)(torch.tensor(s)).item() for s in (1, 4, 9)]
    [0.25, 1.0, 1.0]
    """
    length = whole("warmup", warmup, total)
    if total is not None:
        check_fit("warmup_constant", total, warmup=length)
    return lambda step: ramp(lr, step, length, start)


def warmup_linear(lr: float, warmup: Length, total: int, alpha_f: float = 0.1, start: float = 0.0) -> Schedule:
    """Linear from ``start`` to ``lr`` over ``warmup``, then linear down to ``alpha_f · lr`` at ``total``.

    >>> round(warmup_linear(1.0, 10, 110)(torch.tensor(60)).item(), 6)
    0.55
    """
    length = _warmup("warmup_linear", warmup, total)
    decay = max(1, total - length)
    return _then(lr, length, start, lambda step: line(lr, alpha_f * lr, step - length, decay))


def warmup_cosine(lr: float, warmup: Length, total: int, alpha_f: float = 0.1, start: float = 0.0) -> Schedule:
    """Linear from ``start`` to ``lr`` over ``warmup``, then half a cosine down to ``alpha_f · lr`` at ``total``.

    Loshchilov & Hutter 2017, without restarts.

    >>> round(warmup_cosine(1.0, 10, 110)(torch.tensor(60)).item(), 6)
    0.55
    """
    length = _warmup("warmup_cosine", warmup, total)
    decay = max(1, total - length)
    return _then(lr, length, start, lambda step: half_cosine(lr, alpha_f * lr, step - length, decay))


def warmup_half_cosine(lr: float, warmup: Length, total: int, alpha_f: float = 0.1, start: float = 0.0) -> Schedule:
    """The second half of a cosine from ``lr`` to ``alpha_f · lr``, after a warm-up to its middle.

    For going on with a run that followed a cosine for the first half: OLMo 3 7B's second part of pretraining.

    >>> [round(warmup_half_cosine(1.0, 10, 110, 0.0)(torch.tensor(s)).item(), 6) for s in (5, 10, 60, 110)]
    [0.25, 0.5, 0.146447, 0.0]
    """
    length = _warmup("warmup_half_cosine", warmup, total)
    decay, end = max(1, total - length), alpha_f * lr
    middle = end + (lr - end) / 2
    return _then(middle, length, start, lambda step: half_cosine(lr, end, step - length + decay, 2 * decay))


def warmup_inv_sqrt(lr: float, warmup: Length, total: int | None = None, alpha_f: float = 0.1, start: float = 0.0) -> Schedule:
    """Linear to ``lr`` over ``warmup``, then ``alpha_f · lr + (1 - alpha_f) · lr · √(warmup / step)``, without end.

    Vaswani et al. 2017, section 5.3, with a floor. ``total`` is only needed for a fraction. A warm-up of 0 is refused:
    OLMo-core would train at ``alpha_f · lr`` throughout.

    >>> [round(warmup_inv_sqrt(1.0, 100, alpha_f=0.0)(torch.tensor(s)).item(), 6) for s in (50, 100, 400)]
    [0.5, 1.0, 0.5]
    """
    length = _at_least_one("warmup_inv_sqrt", whole("warmup", warmup, total))
    if total is not None:
        check_fit("warmup_inv_sqrt", total, warmup=length)

    floor = alpha_f * lr
    return _then(lr, length, start, lambda step: floor + (lr - floor) * (length / step.double().clamp(min=length)).sqrt())


def _then(top: float, length: int, start: float, falling: Schedule) -> Schedule:
    """A warm-up from ``start`` to ``top`` over ``length`` steps, and then another schedule."""
    return lambda step: torch.where(step < length, ramp(top, step, length, start), falling(step))


def _warmup(schedule: str, warmup: Length, total: int) -> int:
    length = whole("warmup", warmup, total)
    check_fit(schedule, total, warmup=length)
    return length


def _at_least_one(schedule: str, warmup: int) -> int:
    if warmup < 1:
        raise ValueError(f"{schedule}: the rate falls as a power of step / warmup, so warmup must be at least 1, not {warmup}")
    return warmup
