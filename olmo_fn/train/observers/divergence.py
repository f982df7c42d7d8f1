"""Stops a run whose loss is lost."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from olmo_fn.train.events import Event, Observer, RunInfo, Started, Stepped
from olmo_fn.train.observers.jsonl import read_metrics
from olmo_fn.train.observers.shared import Switch


@dataclass(frozen=True)
class Divergence:
    """Stop a run that diverges."""

    on: Switch = False
    """Stop when the loss is not finite, or far above its best, for a while; --observe.divergence turns it on."""
    metric: str = "loss"
    """Which metric of a step to look at."""
    not_finite: int = 10
    """Stop after this many steps in a row without a finite loss."""
    factor: float = 2.0
    """Stop when the running mean of the loss is more than this many times the lowest that it has been."""
    window: int = 100
    """Steps in the running mean: a single spike is no divergence."""

    def build(self, run: RunInfo) -> Observer:
        """An observer that goes on from the steps in the run's ``metrics.jsonl``."""
        if self.not_finite < 1 or self.window < 1 or not self.factor > 1:
            raise ValueError("--observe.divergence: not-finite and window must be at least 1, and factor more than 1")
        return DivergenceObserver(self, run.folder / "metrics.jsonl")


class DivergenceObserver(Observer):
    """Remembers the losses of the window, and the lowest mean of a whole window."""

    def __init__(self, settings: Divergence, path: Path) -> None:
        self.settings, self.path = settings, path
        self.losses: deque[float] = deque(maxlen=settings.window)
        self.mean = self.best = inf
        self.bad = 0

    def __call__(self, event: Event) -> str | None:
        """Why to stop, after a step; else None."""
        s = self.settings
        if isinstance(event, Started):
            for line in read_metrics(self.path):
                if line["step"] <= event.step and s.metric in line:
                    self._update(line[s.metric])
        if not isinstance(event, Stepped):
            return None
        if s.metric not in event.metrics:
            raise ValueError(f"--observe.divergence.metric {s.metric}: a step has {', '.join(event.metrics)}")
        self._update(event.metrics[s.metric])
        if self.bad >= s.not_finite:
            return f"{s.metric} has not been finite for {self.bad} steps (--observe.divergence)"
        if self.best > 0 and self.mean > s.factor * self.best:
            means = f"{self.mean:.4f} over {s.window} steps, more than {s.factor:g} times its lowest, {self.best:.4f}"
            return f"the mean {s.metric} is {means} (--observe.divergence)"
        return None

    def _update(self, loss: float) -> None:
        self.bad = streak(self.bad, loss)
        if self.bad:
            return
        self.losses.append(loss)
        if len(self.losses) == self.settings.window:
            self.mean = sum(self.losses) / len(self.losses)
            self.best = min(self.best, self.mean)


def streak(before: int, loss: float) -> int:
    """How many steps in a row have had no finite loss, from how many it were before this one."""
    return 0 if isfinite(loss) else before + 1
