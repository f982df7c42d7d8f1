"""What a run shows while it goes: one live line on a terminal, a plain line every so many steps elsewhere."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from olmo_fn.train.events import Evaluated, Event, Observer, Said, Started, Stepped, Stopped

if TYPE_CHECKING:
    import rich.console

SHOWN: dict[str, Callable[[Any], str]] = {
    "loss": lambda x: f"loss {x:.4f}",
    "lr": lambda x: f"lr {x:.2e}",
    "grad_norm": lambda x: f"|g| {x:.2f}",
    "tokens_per_s": lambda x: f"{x:,.0f} tok/s",
    "mfu": lambda x: f"MFU {100 * x:.0f} %" if x else "",
    "peak_mb": lambda x: f"{x / 1000:.1f} GB",
}
"""The metrics that a line has, in this order, and how it shows them; those that a step has not are left out."""


def describe(metrics: Mapping[str, Any], step: int, steps: int, seconds_left: float | None) -> str:
    """One step as text.

    >>> describe({"loss": 4.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 5000.0, "mfu": 0.81, "peak_mb": 900.0,
    ...           "skipped": 0.0}, 3, 10, 65)
    'step 3/10  loss 4.5000  lr 1.00e-03  |g| 0.50  5,000 tok/s  MFU 81 %  0.9 GB  1:05 left'
    """
    left = "" if seconds_left is None else f"{clock(seconds_left)} left"
    shown = [show(metrics[name]) for name, show in SHOWN.items() if name in metrics]
    return "  ".join(filter(None, (f"step {step}/{steps}", *shown, left, "SKIPPED" if metrics.get("skipped") else "")))


def describe_evaluation(event: Evaluated) -> str:
    """One evaluation as text.

    >>> describe_evaluation(Evaluated(30, "heldout", {"loss": 2.5, "bits_per_byte": 1.25, "tokens": 4096}))
    'held-out after step 30: loss 2.5000, 1.2500 bits per byte (4,096 tokens)'
    """
    name = "held-out" if event.name == "heldout" else event.name
    tokens = f" ({event.values['tokens']:,.0f} tokens)" if "tokens" in event.values else ""
    rest = {name: value for name, value in event.values.items() if name != "tokens" and value is not None}
    shown = [f"{x:.4f} bits per byte" if name == "bits_per_byte" else f"{name} {x:.4f}" for name, x in rest.items()]
    return f"{name} after step {event.step}: {', '.join(shown)}{tokens}"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock(65), clock(3700)
    ('1:05', '1:01:40')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


def terminal() -> rich.console.Console:
    """Standard output. That its reader goes away (``| head``) is an OSError like another: rich would end the process."""
    import rich.console

    class Terminal(rich.console.Console):
        def on_broken_pipe(self) -> None:
            raise  # where this is called the error is handled

    return Terminal()


def mute() -> None:
    """Send standard output nowhere from here on: nobody reads it any more, or its disk is full."""
    with suppress(OSError, AttributeError, ValueError):  # it is no file, or closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.stdout.flush()


class Console(Observer):
    """Shows a run: every step on a terminal, every ``every`` steps as a plain line where the output is none."""

    def __init__(self, every: int = 10, console: rich.console.Console | None = None) -> None:
        self.every = max(1, every)
        from rich.live import Live

        self.console = console or terminal()
        self.live = Live(console=self.console, transient=True) if self.console.is_terminal else None
        self.steps = self.first = 0
        self.clock_start: float | None = None

    def __call__(self, event: Event) -> None:
        try:
            self._tell(event)
        except OSError:  # progress that cannot be shown is none of the run's business
            mute()

    def _tell(self, event: Event) -> None:
        match event:
            case Started(step, steps):
                self.first, self.steps = step, steps
                if self.live:
                    self.live.start()
            case Stepped(step, metrics):
                self._show(step, metrics)
            case Evaluated():
                self._print(describe_evaluation(event))
            case Said(text):
                self._print(text)
            case Stopped(step, reason) if reason:
                self._print(f"stopped after step {step}: {reason}")

    def close(self) -> None:
        if self.live:
            with suppress(OSError):
                self.live.stop()

    def _print(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _show(self, step: int, metrics: Mapping[str, Any]) -> None:
        done, left = step - self.first, None
        if self.clock_start is None:  # the first step compiles; it would spoil the estimate
            self.clock_start = time.monotonic()
        elif done > 1:
            left = (time.monotonic() - self.clock_start) / (done - 1) * (self.steps - step)
        text = describe(metrics, step, self.steps, left)
        if self.live:
            from rich.progress_bar import ProgressBar
            from rich.table import Table

            table = Table.grid(padding=(0, 1))
            table.add_row(ProgressBar(total=self.steps, completed=step, width=20), text)
            self.live.update(table)
        elif done == 1 or step % self.every == 0 or step == self.steps or metrics.get("skipped"):
            self._print(text)
