"""What may follow what in a `pipe`; a wrong order is refused before anything runs, with the fix in the message."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from olmo_fn.core.pipe import Transform

LAWFUL_ORDER = "a loss, then grad(), then accumulate and clip, then an optimizer, then everything else"
KINDS = ("Loss", "Grads", "Step")
MISSING = {"Grads": "grad()", "Step": "an optimizer such as adamw(1e-3)"}
"""What gives each kind."""

SHARED_SLOT = "would share its slot"
PARTS_CLIPPED = dict.fromkeys(("clip", "clip_value", "clip_groups"), "would clip every part of the batch by itself")
"""What accumulation must not follow."""
FROZEN_TOO = dict.fromkeys(("freeze", "train_only"), "would keep averages of parameters that do not move")
"""What averages of weights must not follow."""
NOT_YET_UNIT = dict.fromkeys(("ema", "merge"), "would leave its average of weights that are not yet normalised")
"""What normalisation must not follow."""


def check_order(transform: Transform, kind: str, before: tuple[Transform, ...]) -> None:
    """ValueError with the fix if ``transform`` must not follow those ``before`` it, which give a ``kind``."""
    name, takes = transform.name, transform.takes.__name__
    if kind != takes:
        last = before[-1].name if before else "the loss"
        raise ValueError(
            f"{name} takes a {takes}, but it follows {last}, which is a {kind}; {_fix(transform, kind, before)} "
            f"(the order is {LAWFUL_ORDER})"
        )
    if transform.needs and transform.needs not in {other.word for other in before}:
        raise ValueError(f"{name} needs {transform.needs}, which is nowhere before it in the pipe; add it")
    for other in before:
        if other.word in transform.not_after:
            fix = "leave out one of them" if other.word == transform.word else f"put {name} before {other.name}"
            raise ValueError(f"{name} after {other.name} {transform.not_after[other.word]}; {fix}")


def _fix(transform: Transform, kind: str, before: tuple[Transform, ...]) -> str:
    """How to bring a transform to where the kind is that it takes."""
    at, wanted = KINDS.index(kind), KINDS.index(transform.takes.__name__)
    if at < wanted:
        return f"put {' and '.join(MISSING[kind] for kind in KINDS[at + 1 : wanted + 1])} before it"
    first = next(other for other in before if KINDS.index(other.gives.__name__) > wanted)
    if transform.gives is not first.gives:
        return f"put it before {first.name}"
    return "leave out one of the two" + (", or join them with partition" if transform.gives.__name__ == "Step" else "")
