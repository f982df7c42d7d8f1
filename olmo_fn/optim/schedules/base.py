"""What a schedule is, and what all of them share: lengths, the warm-up, and the check that all fits."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any, TypeAlias

import torch
from torch import Tensor

Schedule: TypeAlias = Callable[[Tensor], Tensor]
"""``(0-d integer tensor) -> 0-d fp64 tensor``: the rate at a step, counted from 1, or at a number of tokens.

A plain number will do as the rate (`in_fp64`). ``if`` and the functions of ``math`` read the step's value, for which a GPU is
waited for, and which is not there inside ``vmap``: write ``torch.where`` and ``torch.cos`` in their place there.
"""
Length: TypeAlias = int | float
"""A whole number of steps or tokens; or a float, a fraction of the whole schedule."""


def constant(lr: float) -> Schedule:
    """The same rate at every step.

    >>> constant(0.1)(torch.tensor(7)).item()
    0.1
    """
    return lambda step: torch.full_like(step, lr, dtype=torch.float64)


def in_fp64(schedule: Schedule | float) -> Schedule:
    """A schedule whose rates are tensors, out of one whose rates may be plain numbers; or out of one number.

    >>> in_fp64(lambda step: 1e-3 if step < 10 else 1e-4)(torch.tensor(7))
    tensor(0.0010, dtype=torch.float64)
    """

    def rate(step: Tensor) -> Tensor:
        found: Any = schedule(step) if callable(schedule) else schedule
        if not isinstance(found, (Tensor, Real)):
            raise ValueError(f"a learning rate is a number, or a schedule that gives one, and this is a {type(found).__name__}")
        return found if isinstance(found, Tensor) else torch.full_like(step, float(found), dtype=torch.float64)

    return rate


def whole(name: str, value: Length, total: int | None) -> int:
    """``value`` as a whole number of steps or tokens, rounded to the nearest (half to even, as OLMo-core does).

    >>> whole("warmup", 0.05, 1000), whole("warmup", 30, 1000)
    (50, 30)
    """
    if isinstance(value, float):
        if not 0 <= value <= 1:
            raise ValueError(
                f"{name} {value} has a point, so it is a fraction and must be from 0 to 1; write {value:.0f} for steps"
            )
        if total is None:
            raise ValueError(f"{name} {value} is a fraction of the schedule; give total as well, or {name} in steps")
        return round(value * total)
    if value < 0:
        raise ValueError(f"{name} {value} must not be negative")
    return value


def check_fit(schedule: str, total: int, **parts: int) -> None:
    """ValueError with all the names unless the parts of a schedule fit into ``total``."""
    if sum(parts.values()) > total:
        names = " and ".join(f"{name} {value}" for name, value in parts.items() if value)
        be = "together are" if " and " in names else "is"
        raise ValueError(f"{schedule}: {names} {be} longer than the whole schedule of {total}; shorten it or train longer")


def ramp(lr: float, step: Tensor, warmup: int, start: float = 0.0) -> Tensor:
    """From ``start`` at 0 in a line to ``lr`` at ``warmup``, then ``lr``; ``lr`` at once without a warm-up."""
    return line(start, lr, step, warmup) if warmup else constant(lr)(step)


def line(start: float, end: float, at: Tensor, length: int) -> Tensor:
    """From ``start`` at 0 in a line to ``end`` at ``length``; constant before and after."""
    return start + (end - start) * fraction(at, length)


def half_cosine(start: float, end: float, at: Tensor, length: int) -> Tensor:
    """From ``start`` at 0 along half a cosine to ``end`` at ``length``; constant before and after."""
    return end + (start - end) * (1 + (torch.pi * fraction(at, length)).cos()) / 2


def fraction(at: Tensor, length: int) -> Tensor:
    """How much of ``length`` is done, from 0 to 1, in fp64; all of it if the length is 0."""
    return (at.double() / length).clamp(0, 1) if length else (at >= 0).double()
