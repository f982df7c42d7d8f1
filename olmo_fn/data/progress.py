"""A progress bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Advance = Callable[[float, str], None]
SECONDS_A_LINE = 10.0


@contextmanager
def progress(label: str, total: float, show: bool = True) -> Iterator[Advance]:
    """Show how far a job of ``total`` units is, on stderr. Yields ``advance(units, note)``.

    >>> with progress("copying", 10, show=False) as advance:
    ...     advance(10, "10 files")
    """
    console = Console(stderr=True)
    if not show:
        yield lambda units, note: None
    elif console.is_terminal:
        columns = (
            TextColumn(label),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
        )
        with Progress(*columns, TimeRemainingColumn(), TextColumn("{task.fields[note]}"), console=console) as bar:
            task = bar.add_task(label, total=total, note="")
            yield lambda units, note: bar.update(task, advance=units, note=note)
    else:
        yield _lines(label, total)


def _lines(label: str, total: float) -> Advance:
    start = last = time.monotonic()
    done = 0.0

    def advance(units: float, note: str) -> None:
        nonlocal done, last
        done += units
        now = time.monotonic()
        if now - last < SECONDS_A_LINE and done < total:
            return
        last = now
        left = (now - start) * (total - done) / done if done else float("inf")
        eta = f", {left:.0f} s left" if 0 < left < float("inf") else ""
        print(
            f"{label}: {done / total if total else 1:.0%} in {now - start:.0f} s{eta}, {note}",
            file=sys.stderr,
        )

    return advance
