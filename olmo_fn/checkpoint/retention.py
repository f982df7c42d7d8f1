"""Which checkpoints to delete: a pure function of the steps that are there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """Keep the newest ``keep_last`` checkpoints and all whose step is a multiple of ``keep_every``.

    What neither rule keeps is deleted; without any rule, the default, nothing is.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("keep_last", self.keep_last), ("keep_every", self.keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: must be 1 or more; leave it out (None) to do without this rule")


def to_delete(steps: Collection[int], retention: Retention, protected: Collection[int] = ()) -> list[int]:
    """The steps that ``retention`` gives up, oldest first; never the newest and never one in ``protected``.

    >>> to_delete([100, 200, 300, 400, 500], Retention(keep_last=2, keep_every=300))
    [100, 200]
    >>> to_delete([100, 200, 300], Retention())
    []
    """
    if retention == Retention() or not steps:
        return []
    ordered = sorted(steps)
    kept = {ordered[-1], *protected}
    if retention.keep_last is not None:
        kept.update(ordered[-retention.keep_last :])
    if retention.keep_every is not None:
        kept.update(step for step in ordered if step % retention.keep_every == 0)
    return [step for step in ordered if step not in kept]
