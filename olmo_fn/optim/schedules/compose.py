"""Schedules out of schedules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.optim.schedules.base import Schedule, half_cosine, in_fp64, line

Shape: TypeAlias = Literal["linear", "cosine"]


def scale(schedule: Schedule, factor: float | Tensor | Schedule) -> Schedule:
    """``schedule`` times ``factor``: a number, a tensor (to train many rates at once with ``vmap``), or a schedule.

    >>> from olmo_fn.optim.schedules import constant
    >>> scale(constant(0.1), 2.0)(torch.tensor(7)).item()
    0.2
    """
    return lambda step: schedule(step) * (factor(step) if callable(factor) else factor)


def then(first: Schedule, length: int, second: Schedule) -> Schedule:
    """``first`` up to and including step ``length``; from there on ``second``, which counts from it.

    It is continuous where ``second`` begins, at its 0, with what ``first`` ends with, at ``length``.

    >>> from olmo_fn.optim.schedules import constant
    >>> schedule = then(constant(1.0), 10, constant(2.0))
    >>> schedule(torch.tensor(10)).item(), schedule(torch.tensor(11)).item()
    (1.0, 2.0)
    """
    if length < 0:
        raise ValueError(f"then: the first schedule has a length of {length}; it must not be negative")
    first, second = in_fp64(first), in_fp64(second)
    return lambda step: torch.where(step <= length, first(step), second((step - length).clamp(min=0)))


def join(schedules: Sequence[Schedule], boundaries: Sequence[int]) -> Schedule:
    """One after the other: the second takes over after step ``boundaries[0]`` and counts from it, and so on.

    >>> from olmo_fn.optim.schedules import constant
    >>> schedule = join([constant(1.0), constant(2.0), constant(3.0)], [10, 20])
    >>> [schedule(torch.tensor(step)).item() for step in (10, 11, 20, 21)]
    [1.0, 2.0, 2.0, 3.0]
    """
    if len(boundaries) != len(schedules) - 1:
        raise ValueError(f"join: {len(schedules)} schedules have {len(schedules) - 1} boundaries, not {len(boundaries)}")
    if list(boundaries) != sorted(set(boundaries)):
        raise ValueError(f"join: the boundaries {', '.join(map(str, boundaries))} must grow")
    if not boundaries:
        return schedules[0]
    return then(schedules[0], boundaries[0], join(schedules[1:], [b - boundaries[0] for b in boundaries[1:]]))


def sequential(
    lr: float, first: Sequence[tuple[Callable[[float], Schedule], int]], last: Callable[[float], Schedule]
) -> Schedule:
    """Schedules one after the other, each with the rate as its peak that the one before ended with.

    ``first`` are pairs of (peak rate -> schedule) and a length. It is continuous where no part but the first has a
    warm-up. After the length of ``last`` its own rule holds, where OLMo-core raises.

    >>> from olmo_fn.optim.schedules import constant, warmup_linear
    >>> halve = lambda lr: warmup_linear(lr, 0, 10, alpha_f=0.5)
    >>> schedule = sequential(1.0, [(halve, 10), (constant, 5)], halve)
    >>> [schedule(torch.tensor(step)).item() for step in (10, 15, 25)]
    [0.5, 0.5, 0.25]
    """
    schedules, boundaries, end = [], [], 0
    for make, length in first:
        schedules.append(make(lr))
        lr = schedules[-1](torch.tensor(length)).item()
        boundaries.append(end := end + length)
    return join([*schedules, last(lr)], boundaries)


class Piece(NamedTuple):
    """A piece of `piecewise`: over ``length`` to the rate ``end``, from ``start``, or else from where the last one ended."""

    length: int
    end: float
    shape: Shape = "linear"
    start: float | None = None


def piecewise(lr: float, pieces: Sequence[Piece]) -> Schedule:
    """Lines and half cosines; ``end`` and ``start`` of a piece are fractions of ``lr``. The last value stays.

    A step at a border belongs to the later piece. It is continuous where no piece but the first has a ``start``.

    >>> schedule = piecewise(1.0, [Piece(10, 1.0, start=0.0), Piece(20, 0.5, "cosine"), Piece(5, 0.0)])
    >>> [schedule(torch.tensor(step)).item() for step in (5, 10, 20, 30, 35, 99)]
    [0.5, 1.0, 0.75, 0.5, 0.0, 0.0]
    """
    if not pieces:
        raise ValueError("piecewise: there are no pieces; give at least one, such as Piece(length=1000, end=0.1)")
    for i, piece in enumerate(pieces):
        if piece.length < 1:
            raise ValueError(f"piecewise: piece {i + 1} has a length of {piece.length}; it must be at least 1")
    last = [1.0, *(piece.end for piece in pieces)]

    def rate(step: Tensor) -> Tensor:
        value, begin = torch.full_like(step, lr * last[0], dtype=torch.float64), 0
        for piece, before in zip(pieces, last, strict=False):
            start = before if piece.start is None else piece.start
            curve = line if piece.shape == "linear" else half_cosine
            value = torch.where(step >= begin, curve(lr * start, lr * piece.end, step - begin, piece.length), value)
            begin += piece.length
        return value

    return rate


def anneal(schedule: Schedule, begin: int, length: int, final: float = 0.0, shape: Shape = "linear") -> Schedule:
    """``schedule`` until ``begin``, and from its rate there over ``length`` to the rate ``final``, which stays.

    To end a run early, or to branch off a decay anywhere. OLMo-core's ``override_decay``.

    >>> from olmo_fn.optim.schedules import constant
    >>> [anneal(constant(1.0), 100, 10)(torch.tensor(step)).item() for step in (100, 105, 110)]
    [1.0, 0.5, 0.0]
    """
    if begin < 0 or length < 1:
        raise ValueError(f"anneal: begin {begin} must not be negative and length {length} must be at least 1")
    curve, schedule = line if shape == "linear" else half_cosine, in_fp64(schedule)

    def rate(step: Tensor) -> Tensor:
        value = schedule(torch.full_like(step, begin))
        falling = final + (value - final) * curve(1.0, 0.0, step - begin, length)
        return torch.where(step < begin, schedule(step), falling)

    return rate


def in_tokens(schedule: Schedule, tokens: int | Callable[[Tensor], Tensor]) -> Schedule:
    """A schedule of tokens as one of steps. ``tokens``: those of a step; or how many are seen after a step.

    >>> from olmo_fn.optim.schedules import warmup_linear
    >>> schedule = in_tokens(warmup_linear(1.0, 0, 1000, alpha_f=0.0), tokens=10)
    >>> schedule(torch.tensor(25)).item()
    0.75
    """
    return lambda step: schedule(tokens(step) if callable(tokens) else step * tokens)
