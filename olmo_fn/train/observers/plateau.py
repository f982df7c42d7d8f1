"""Stops a run when an evaluation no longer improves."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from pathlib import Path

from olmo_fn.train.events import Evaluated, Event, Observer, RunInfo, Started
from olmo_fn.train.observers.jsonl import read_evaluations
from olmo_fn.train.observers.shared import Switch


@dataclass(frozen=True)
class Plateau:
    """Stop a run that no longer improves."""

    on: Switch = False
    """Stop when an evaluation no longer improves; --observe.plateau turns it on."""
    evaluation: str = "heldout"
    """Which evaluation to look at."""
    value: str = "loss"
    """Which of its values."""
    patience: int = 3
    """Stop after this many evaluations in a row that are no better than the best before them."""
    least: float = 0.0
    """How much better one has to be."""
    higher: bool = False
    """Higher values are better, as accuracies are."""

    def build(self, run: RunInfo) -> Observer:
        """An observer that goes on from the evaluations in the run's ``metrics.jsonl``."""
        if self.patience < 1:
            raise ValueError(f"--observe.plateau.patience {self.patience} must be at least 1")
        return PlateauObserver(self, run.folder / "metrics.jsonl")


class PlateauObserver(Observer):
    """Remembers the best value, and how many evaluations have not been better."""

    def __init__(self, settings: Plateau, path: Path) -> None:
        self.settings, self.path, self.best, self.waited = settings, path, inf, 0

    def __call__(self, event: Event) -> str | None:
        """Why to stop, after an evaluation; else None. ValueError if the evaluation has no such value."""
        s = self.settings
        if isinstance(event, Started):
            for line in read_evaluations(self.path):
                if line["step"] <= event.step and line["eval"] == s.evaluation and s.value in line:
                    self._update(line[s.value])
        if not isinstance(event, Evaluated) or event.name != s.evaluation:
            return None
        if s.value not in event.values:
            raise ValueError(f"--observe.plateau.value {s.value}: {event.name} has {', '.join(event.values)}")
        self._update(event.values[s.value])
        if self.waited < s.patience:
            return None
        best = -self.best if s.higher else self.best
        return f"{s.evaluation} {s.value} has been no better than {best:.4f} for {self.waited} evaluations (--observe.plateau)"

    def _update(self, value: float) -> None:
        value = -value if self.settings.higher else value
        better = value < self.best - self.settings.least  # never of a NaN
        self.best, self.waited = (value, 0) if better else (self.best, self.waited + 1)
