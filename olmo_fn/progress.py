"""How far a job is, on a terminal; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Advance(Protocol):
    """Says that so many more units are done, and what is going on."""

    def __call__(self, units: float, note: str = "") -> None: ...


@contextmanager
def progress(label: str, total: float, show: bool = True, console: Console | None = None) -> Iterator[Advance]:
    """A bar for a job of ``total`` units, on stderr unless another ``console`` is given.

    >>> with progress("copying", 10) as advance:
    ...     advance(10, "10 files")
    """
    console = console or Console(stderr=True)
    times = (TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), *times, TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console, disable=not (show and console.is_terminal)) as bar:
        task = bar.add_task(label, total=total, note="")

        def advance(units: float, note: str = "") -> None:
            bar.update(task, advance=units, note=note)

        yield advance
