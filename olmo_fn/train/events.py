"""What happens in a run, as values: the loop yields them, and observers get them one after the other. Imports no torch.

An observer is anything that can be called with an event, and closed:

    class Printer(Observer):
        def __call__(self, event: Event) -> None:
            if isinstance(event, Stepped):
                print(event.step, event.metrics["loss"])

What it returns, if it is not None, asks the run to stop, and says why: the run saves its state first. A `Failure` makes the
exit code 1. The order of events is
`Started`, then for each step `Stepped`, `Saved` and `Evaluated` (a step is seen before it is saved, so that no crash leaves a
saved step that nobody saw), then `Stopped`, unless the run fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias


@dataclass(frozen=True)
class Started:
    """The run begins, or goes on, after step ``step`` of ``steps``."""

    step: int
    steps: int
    resumed_from: Path | None = None


@dataclass(frozen=True)
class Stepped:
    """Step ``step`` is done. ``metrics`` are the step's, and tokens, seconds, speed and memory, by name.

    Each is a plain number, or a list of numbers (such as the load of each expert), not a tensor.
    """

    step: int
    metrics: Mapping[str, Any]


@dataclass(frozen=True)
class Evaluated:
    """An evaluation after step ``step``: ``name`` says of what (``heldout``), ``values`` are numbers by name (``loss``)."""

    step: int
    name: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Saved:
    """The state after step ``step`` is on disk, whole."""

    step: int
    path: Path


@dataclass(frozen=True)
class Said:
    """A line for whoever looks on."""

    text: str


@dataclass(frozen=True)
class Stopped:
    """The run ends after step ``step``; ``reason`` is empty when its steps are done."""

    step: int
    reason: str = ""


Event: TypeAlias = Started | Stepped | Evaluated | Saved | Said | Stopped


@dataclass(frozen=True)
class RunInfo:
    """What an observer may want to know of its run: its folder, its name, and its config as nested dicts of plain values."""

    folder: Path
    name: str
    config: Mapping[str, Any]


class Failure(str):
    """An observer's reason to stop that is a failure: the state is saved as ever, and the exit code is 1."""


class Observer(Protocol):
    """Who looks on; subclasses need no ``close``. Only the first rank of a job has observers, and they may print."""

    def __call__(self, event: Event) -> str | None:
        """Take note of an event; a text that is returned stops the run, and says why."""

    def close(self) -> None:
        """The run is over, in whatever way."""
        return None
