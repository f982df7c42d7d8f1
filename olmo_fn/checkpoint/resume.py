"""Which checkpoint to go on from: the newest that is whole."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from olmo_fn.checkpoint.folder import step_path, steps
from olmo_fn.checkpoint.index import BrokenCheckpoint, Index
from olmo_fn.checkpoint.ranks import ALONE, Meeting, Ranks, beating
from olmo_fn.checkpoint.reading import load
from olmo_fn.checkpoint.verifying import verify
from olmo_fn.tree import Tree

log = logging.getLogger(__name__)


def newest_whole(folder: str | Path, *, deep: bool = True, on_skip: Callable[[str], None] = log.warning) -> Path | None:
    """The newest checkpoint in ``folder`` that `verify` finds whole; None without any.

    ``on_skip`` gets one line for each newer one that is not, with its first problem; the default logs a
    warning.

    >>> newest_whole("/nowhere") is None
    True
    """
    for step in reversed(steps(folder)):
        path = step_path(folder, step)
        problems = verify(path, deep=deep)
        if not problems:
            return path
        on_skip(_skipped(path, problems))
    return None


def load_newest(
    folder: str | Path,
    like: Mapping[str, Any] | Callable[[Index], Mapping[str, Any]] | None = None,
    *,
    select: Collection[str] | None = None,
    subset: bool = False,
    device: torch.device | str = "cpu",
    on_skip: Callable[[str], None] = log.warning,
    ranks: Ranks = ALONE,
    before: int = sys.maxsize,
) -> tuple[Path, Tree, dict[str, Any]] | None:
    """Path, tree and ``meta`` of the newest whole checkpoint of a step below ``before``, as `load` gives them, or None.

    It reads each byte once, so it is the way to resume. A checkpoint that is damaged is skipped, and
    ``on_skip`` told why; one that is whole but not like ``like`` is the caller's error and raises ValueError.
    With ``ranks``, all of them call this, and get the same checkpoint: the newest in which none of them finds
    damage in what it needs. If one of them fails, the others raise `RankLost`, which names it.

    >>> load_newest("/nowhere") is None
    True
    """
    with beating(ranks):
        while True:
            with Meeting(ranks) as meeting:
                meeting.gather("hello")
                newest = max((step for step in steps(folder) if step < before), default=-1)
                before = int(meeting.broadcast("go", b"%d" % newest))
                if before < 0:
                    return None
                path, problem, found = step_path(folder, before), "", None
                try:
                    found = load(path, like, select=select, subset=subset, device=device)
                except BrokenCheckpoint as error:
                    problem = str(error)
                problems = filter(None, meeting.gather("done", problem.encode()))
                problem = meeting.broadcast("outcome", next(problems, b"")).decode()
            if found and not problem:
                return path, *found
            on_skip(_skipped(path, [problem]))


def _skipped(path: Path, problems: list[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"skipping {path}, it is broken: {problems[0]}{more}"
