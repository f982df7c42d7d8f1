"""Who looks on while a run goes: the console, files, trackers, alarms. One file each; imports no torch and no tracker."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Literal

from tyro.conf import Suppress

from olmo_fn.train.events import Event, Failure, Observer, RunInfo
from olmo_fn.train.observers.comet import Comet
from olmo_fn.train.observers.console import Console
from olmo_fn.train.observers.divergence import Divergence
from olmo_fn.train.observers.gc import GarbageCollection
from olmo_fn.train.observers.jsonl import Jsonl, read_evaluations, read_metrics
from olmo_fn.train.observers.plateau import Plateau
from olmo_fn.train.observers.profiler import Profiler
from olmo_fn.train.observers.tensorboard import TensorBoard
from olmo_fn.train.observers.trackio import Trackio
from olmo_fn.train.observers.wandb import WandB

__all__ = [
    "Console",
    "Jsonl",
    "NoObserver",
    "Observe",
    "ObserverSettings",
    "build_observers",
    "close_observers",
    "fan_out",
    "read_evaluations",
    "read_metrics",
]


@dataclass(frozen=True)
class ObserverSettings:
    """The settings of an observer of your own: derive them from it, with a ``name`` to choose it by."""

    name: Suppress[str] = ""
    on: Suppress[bool] = True

    def build(self, run: RunInfo) -> Observer:
        """The observer of a run."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


@dataclass(frozen=True)
class NoObserver(ObserverSettings):
    """Nobody more."""

    name: Suppress[Literal["none"]] = "none"
    on: Suppress[bool] = False


@dataclass(frozen=True)
class Observe:
    """Observers that are off unless asked for; the console and ``metrics.jsonl`` are always there."""

    wandb: WandB = field(default_factory=WandB)
    tensorboard: TensorBoard = field(default_factory=TensorBoard)
    comet: Comet = field(default_factory=Comet)
    trackio: Trackio = field(default_factory=Trackio)
    profiler: Profiler = field(default_factory=Profiler)
    gc: GarbageCollection = field(default_factory=GarbageCollection)
    plateau: Plateau = field(default_factory=Plateau)
    divergence: Divergence = field(default_factory=Divergence)
    own: ObserverSettings = field(default_factory=NoObserver)
    """One of your own (``--use my_parts.py --observe.own.name NAME``)."""


def build_observers(observe: Observe, run: RunInfo) -> list[Observer]:
    """The observers that are on. ValueError, in one line, when one cannot begin: no package, no key, no network.

    They write into the folder of the run, so this comes after whatever else may refuse the run.
    """
    observers: list[Observer] = []
    for name in (each.name for each in fields(observe)):
        settings = getattr(observe, name)
        try:
            if settings.on:
                observers.append(settings.build(run))
        except Exception as error:
            close_observers(observers)
            if isinstance(error, ValueError) and str(error).startswith("--observe."):
                raise
            raise ValueError(f"--observe.{name}: {_one_line(error)}") from error
    return observers


def fan_out(observers: list[Observer], event: Event) -> str | None:
    """Pass an event to all observers; the reasons of those that ask the run to stop, or None.

    An observer that fails does not end the run: it is named in one line, closed, and taken out of ``observers``.
    """
    reasons = []
    for observer in tuple(observers):
        try:
            reasons.append(observer(event))
        except Exception as error:
            _warn(f"{type(observer).__name__} failed, and is off from here on: {_one_line(error)}")
            observers[:] = [other for other in observers if other is not observer]
            close_observers([observer])
    found = list(filter(None, reasons))
    kind = Failure if any(isinstance(reason, Failure) for reason in found) else str
    return kind("; ".join(found)) if found else None


def close_observers(observers: Sequence[Observer]) -> None:
    """Close all observers; one that fails is named in one line."""
    for observer in observers:
        try:
            observer.close()
        except Exception as error:
            _warn(f"{type(observer).__name__} did not close: {_one_line(error)}")


def _warn(text: str) -> None:
    with suppress(OSError):  # nobody is there to read it
        print(text, file=sys.stderr)


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
