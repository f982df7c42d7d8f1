"""The names under which the loop knows `olmo_fn.train.observers.console`, until it yields events."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import rich.console

from olmo_fn.train.events import Said, Started, Stepped
from olmo_fn.train.observers.console import Console


class Progress(Console):
    """A `Console` as a context manager."""

    def __init__(self, steps: int, first: int, every: int, quiet: bool = False) -> None:
        super().__init__(every, rich.console.Console(quiet=True) if quiet else None)
        self.started = Started(first, steps)

    def __enter__(self) -> Progress:
        self(self.started)
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Print a line above the live one."""
        self(Said(text))

    def show(self, line: Mapping[str, Any]) -> None:
        """Show the metrics of one step."""
        self(Stepped(line["step"], line))
