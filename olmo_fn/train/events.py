"""What happens in a run, as values: the loop yields them, and observers get them one after the other. Imports no torch.

An observer is anything that can be called with an event, and closed:

    @dataclass
    class Printer:
        def __call__(self, event: Event) -> str | None:
            if isinstance(event, Stepped):
                print(event.step, event.metrics["loss"])
            return None

        def close(self) -> None: ...

What it returns, if it is not None, asks the run to stop, and says why: the run saves its state first.
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
    """Step ``step`` is done. ``metrics`` are numbers: the step's, and tokens, seconds, speed and memory."""

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


class Observer(Protocol):
    """Who looks on. Only the first rank of a job has observers."""

    def __call__(self, event: Event) -> str | None:
        """Take note of an event; a text that is returned stops the run, and says why."""

    def close(self) -> None:
        """The run is over, in whatever way."""
