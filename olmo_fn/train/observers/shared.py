"""What the observers share: the switch of their flags, the package that one needs, and what trackers have in common."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from math import isfinite
from pathlib import Path
from types import ModuleType
from typing import Annotated, TypeAlias
from uuid import uuid4

import tyro

from olmo_fn.train.events import Evaluated, Event, Stepped, Stopped

Switch: TypeAlias = Annotated[bool, tyro.conf.arg(name="")]
"""A bool whose flag is that of its group: ``--observe.wandb``, and not ``--observe.wandb.on``."""
Log: TypeAlias = Callable[[dict[str, float], dict[str, list[float]], int], object]
"""Takes numbers by name, vectors by name, and the step."""


class Tracker:
    """Passes each step and evaluation to ``log``; closed, it calls ``finish`` with whether the run came to a regular end."""

    def __init__(self, log: Log, finish: Callable[[bool], object]) -> None:
        self.log, self.finish, self.ended = log, finish, False

    def __call__(self, event: Event) -> None:
        if isinstance(event, (Stepped, Evaluated)):
            self.log(*recorded(event), event.step)
        self.ended = self.ended or isinstance(event, Stopped)

    def close(self) -> None:
        self.finish(self.ended)


def recorded(event: Stepped | Evaluated) -> tuple[dict[str, float], dict[str, list[float]]]:
    """The numbers and the vectors of an event, as trackers name them.

    Vectors keep their finite entries only, because no tracker draws a histogram of others; whatever else there is, is left out.

    >>> recorded(Stepped(7, {"step": 7, "loss": 2.5, "load": [0.25, 0.75]}))
    ({'train/loss': 2.5}, {'train/load': [0.25, 0.75]})
    >>> recorded(Evaluated(7, "heldout", {"loss": 2.0}))
    ({'eval/heldout/loss': 2.0}, {})
    """
    prefix = "train" if isinstance(event, Stepped) else f"eval/{event.name}"
    values = event.metrics if isinstance(event, Stepped) else event.values
    numbers = {f"{prefix}/{name}": x for name, x in values.items() if isinstance(x, (int, float)) and name != "step"}
    vectors = {f"{prefix}/{name}": [*filter(isfinite, x)] for name, x in values.items() if isinstance(x, (list, tuple))}
    return numbers, {name: x for name, x in vectors.items() if x}


def require(package: str, extra: str) -> ModuleType:
    """Import ``package``; ValueError with the command that installs it, the extra ``extra`` of this project."""
    try:
        return import_module(package)
    except ImportError as error:
        raise ValueError(f'--observe.{extra}: {error}; pip install "olmo-fn[{extra}]"') from error


def run_id(path: Path) -> str:
    """The id in the file ``path``, made at the first call, 32 hexadecimal digits; a resumed run goes on by it."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid4().hex + "\n")
    return path.read_text().strip()
