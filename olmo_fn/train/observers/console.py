"""What a run shows while it goes: one live line on a terminal, a plain line every so many steps elsewhere.

What varies from batch to batch is shown as its mean: since the last plain line, or over as many steps on a live one.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, TypeAlias

from olmo_fn.train.events import Evaluated, Event, Observer, Said, Started, Stepped, Stopped

if TYPE_CHECKING:
    import rich.console
    import rich.text

Metrics: TypeAlias = Mapping[str, Any]
BAR = 20
"""Columns of the bar of a live line, where there is room."""
SKIPPED = """SKIPPED: no update, for the loss or |g| is not finite or far above the last ones
(--recipe.skip-sigma), or the step is one of --recipe.skip-steps"""


def short(x: float) -> str:
    """A number in three digits and a letter.

    >>> short(361.4), short(19_751), short(999_700), short(1.518e6)
    ('361', '19.8k', '1M', '1.52M')
    """
    for unit in ("", "k", "M"):
        if x < 999.5:
            return f"{x:.3g}{unit}"
        x /= 1000
    return f"{x:.3g}G"


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``.

    >>> clock(65), clock(3700)
    ('1:05', '1:01:40')
    """
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"


FIELDS: dict[str, tuple[Callable[[Any], str], int]] = {
    "loss": (lambda x: f"loss {x:.3f}" if abs(x) < 1e4 else f"loss {x:.3g}", 1),
    "heldout": (lambda x: f"held-out {x:.3f}", 3),
    "lr": (lambda x: f"lr {x:.1e}".replace("e-0", "e-"), 5),
    "grad_norm": (lambda x: f"|g| {x:.3g}", 7),
    "tokens_per_s": (lambda x: f"{short(x)} tok/s", 4),
    "mfu": (lambda x: f"MFU {100 * x:.0f}%" if x else "", 6),
    "peak_mb": (lambda x: f"{x / 1000:.1f} GB", 8),
    "left": (lambda x: f"{clock(x)} left", 2),
}
"""What a line has, in this order: how it is shown, and a number; in a narrow line the largest number goes first."""


def describe(values: Metrics, step: int, steps: int, width: float = inf) -> str:
    """A line of at most ``width`` columns, if it holds the step and the loss.

    >>> values = {"loss": 4.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 5000.0, "mfu": 0.81, "left": 65}
    >>> describe(values, 3, 10)
    'step 3/10  loss 4.500  lr 1.0e-3  |g| 0.5  5k tok/s  MFU 81%  1:05 left'
    >>> describe(values, 3, 10, width=50)
    'step 3/10  loss 4.500  5k tok/s  1:05 left'
    """
    shown = {name: show(values[name]) for name, (show, _) in FIELDS.items() if values.get(name) is not None}
    shown = {"step": f"step {step}/{steps}", **{name: text for name, text in shown.items() if text}}
    for name in sorted(shown.keys() - {"step", "loss"}, key=lambda name: -FIELDS[name][1]):
        if len("  ".join(shown.values())) > width:
            del shown[name]
    return "  ".join(shown.values())


def means(lines: Sequence[Metrics]) -> Metrics:
    """The last of the metrics, with means of what varies: of speeds over the time, of losses over the steps that were made.

    >>> steps = [{"loss": 2.0, "tokens_per_s": 10.0, "seconds": 3.0}, {"loss": 4.0, "tokens_per_s": 50.0, "seconds": 1.0}]
    >>> means([*steps, {"loss": 9.0, "skipped": 1.0, "tokens_per_s": 10.0, "seconds": 4.0}])
    {'loss': 3.0, 'skipped': 1.0, 'tokens_per_s': 15.0, 'seconds': 4.0}
    """
    made = [line for line in lines if not line.get("skipped")] or lines

    def mean(name: str, of: Sequence[Metrics], by_time: bool = False) -> dict[str, float]:
        pairs = [(line[name], line.get("seconds", 1.0) if by_time else 1.0) for line in of if name in line]
        total = sum(weight for _, weight in pairs)
        return {name: sum(x * weight for x, weight in pairs) / total} if total else {}

    speeds = mean("tokens_per_s", lines, by_time=True) | mean("mfu", lines, by_time=True)
    return {**lines[-1], **mean("loss", made), **mean("grad_norm", made), **speeds}


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


@dataclass(frozen=True)
class Line:
    """A live line: a bar, if there is room for it, and the text. It leaves room for the ^C that a terminal writes behind it."""

    values: Metrics
    step: int
    steps: int

    def __rich_console__(self, console: rich.console.Console, options: rich.console.ConsoleOptions) -> Iterator[rich.text.Text]:
        from rich.text import Text

        room = options.max_width - 3
        text = describe(self.values, self.step, self.steps, room - 11 if room > 50 else room)
        bar = min(BAR, room - len(text) - 1)
        done, rest = "#-" if options.ascii_only else "━─"
        made = round(bar * self.step / max(self.steps, 1))
        parts = ((done * made, "green"), (rest * (bar - made), "dim"), " ") if bar >= 5 else ()
        yield Text.assemble(*parts, text[:room], no_wrap=True, overflow="crop", end="")


class Console(Observer):
    """Shows a run: every step on a terminal, every ``every`` steps as a plain line where the output is none, or a dumb one."""

    def __init__(self, every: int = 10, console: rich.console.Console | None = None) -> None:
        self.every = max(1, every)
        from rich.live import Live

        self.console = console or terminal()
        moves = self.console.is_terminal and not self.console.is_dumb_terminal
        self.live = Live(console=self.console, transient=True) if moves else None
        self.steps = self.first = 0
        self.clock_start: float | None = None
        self.since: list[Metrics] = []
        self.heldout: float | None = None
        self.has_skipped = False

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
            case Evaluated(name=name, values=values):
                self.heldout = values.get("loss") if name == "heldout" else self.heldout
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

    def _show(self, step: int, metrics: Metrics) -> None:
        done, left = step - self.first, None
        if self.clock_start is None:  # the first step compiles; it would spoil the estimate
            self.clock_start = time.monotonic()
        elif done > 1:
            left = (time.monotonic() - self.clock_start) / (done - 1) * (self.steps - step)
        if metrics.get("skipped"):
            self._print(f"{describe({name: metrics.get(name) for name in ('loss', 'grad_norm')}, step, self.steps)}  SKIPPED")
            if not self.has_skipped:
                self._print(SKIPPED)
            self.has_skipped = True
        self.since.append(metrics)
        shown = {**means(self.since), "heldout": self.heldout, "left": left}
        if self.live:
            self.live.update(Line(shown, step, self.steps))
            self.since = self.since[1 - self.every :] if done > 1 and self.every > 1 else []
        elif done == 1 or step % self.every == 0 or step == self.steps:
            self._print(describe(shown, step, self.steps, self.console.width))
            self.since = []
