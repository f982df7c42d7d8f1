"""The names under which the loop knows `olmo_fn.train.observers.jsonl`, until it yields events."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmo_fn.train.events import Started, Stepped
from olmo_fn.train.observers.jsonl import Jsonl, read_metrics

__all__ = ["MetricsFile", "read_metrics"]


class MetricsFile(Jsonl):
    """A `Jsonl` as a context manager, started at ``step``."""

    def __init__(self, path: Path, step: int) -> None:
        super().__init__(path)
        self(Started(step, 0))

    def write(self, values: Mapping[str, Any]) -> None:
        """Append the line of one step."""
        self(Stepped(values["step"], values))

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
