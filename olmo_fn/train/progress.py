"""What a run shows while it goes: one live line on a terminal, a plain line every so many steps elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table


def describe(line: Mapping[str, Any], steps: int, seconds_left: float | None) -> str:
    """One line of a run's metrics as text.

    >>> describe({"step": 3, "loss": 4.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 5000.0, "mfu": 0.81,
    ...           "peak_mb": 900.0, "skipped": 0.0}, 10, 65)
    'step 3/10  loss 4.5000  lr 1.00e-03  |g| 0.50  5,000 tok/s  MFU 81 %  0.9 GB  1:05 left'
    """
    skipped = "  SKIPPED" if line["skipped"] else ""
    left = "" if seconds_left is None else f"  {clock(seconds_left)} left"
    mfu = f"  MFU {line['mfu']:.0%}".replace("%", " %") if line.get("mfu") else ""
    return (
        f"step {line['step']}/{steps}  loss {line['loss']:.4f}  lr {line['lr']:.2e}  |g| {line['grad_norm']:.2f}  "
        f"{line['tokens_per_s']:,.0f} tok/s{mfu}  {line['peak_mb'] / 1000:.1f} GB{left}{skipped}"
    )


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock(65), clock(3700)
    ('1:05', '1:01:40')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


class Progress:
    """Shows each step of a run of ``steps`` that begins at step ``first``."""

    def __init__(self, steps: int, first: int, every: int, console: Console | None = None, quiet: bool = False) -> None:
        self.steps, self.first, self.every = steps, first, max(1, every)
        self.console = console or Console(quiet=quiet)
        self.started: float | None = None
        self.live = Live(console=self.console, transient=True) if self.console.is_terminal else None

    def __enter__(self) -> Progress:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def show(self, line: Mapping[str, Any]) -> None:
        """Show the metrics of one step."""
        done = line["step"] - self.first
        left = None
        if self.started is None:  # the first step compiles; it would spoil the estimate
            self.started = time.monotonic()
        else:
            left = (time.monotonic() - self.started) / (done - 1) * (self.steps - line["step"])
        text = describe(line, self.steps, left)
        if self.live:
            table = Table.grid(padding=(0, 1))
            table.add_row(ProgressBar(total=self.steps, completed=line["step"], width=20), text)
            self.live.update(table)
        elif done == 1 or line["step"] % self.every == 0 or line["step"] == self.steps or line["skipped"]:
            self.say(text)
