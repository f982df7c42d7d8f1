"""A profile of many sequences from two of few: everything in it is a constant plus so much a sequence."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from olmo_fn.planner.job import Label
from olmo_fn.planner.profile import Piece, Profile
from olmo_fn.planner.trace import Seen


def extrapolated(few: Profile, more: Profile, by: float) -> Profile:
    """``few + by * (more - few)``, piece by piece: with 1 and 2 sequences, ``by`` is the number wanted less 1."""

    def table(a: dict[Label, Piece], b: dict[Label, Piece]) -> dict[Label, Piece]:
        return {label: _piece(a[label], b[label], by) for label in a}

    return replace(
        few,
        begin=_piece(few.begin, more.begin, by),
        forward=table(few.forward, more.forward),
        backward=table(few.backward, more.backward),
        end=_piece(few.end, more.end, by),
        update=_piece(few.update, more.update, by),
    )


def _piece(a: Piece, b: Piece, by: float) -> Piece:
    start, peak, traffic = (_mixed(getattr(a.seen, name), getattr(b.seen, name), by) for name in ("start", "peak", "traffic"))
    linear, batched, moved = (
        getattr(a.seen, name) + round(by * (getattr(b.seen, name) - getattr(a.seen, name)))
        for name in ("linear", "batched", "moved")
    )
    return Piece(_mixed(a.grown, b.grown, by), Seen(start, peak, linear, batched, moved, traffic))


def _mixed(a: Counter[Any], b: Counter[Any], by: float) -> Counter[Any]:
    return Counter({key: a[key] + round(by * (b[key] - a[key])) for key in {*a, *b}})
