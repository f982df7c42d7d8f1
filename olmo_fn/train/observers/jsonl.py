"""``metrics.jsonl``: a line a step and a line an evaluation, and nothing twice when a run goes on from a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from olmo_fn.train.events import Evaluated, Event, Observer, Started, Stepped

NOT_FINITE = ("NaN", "Infinity", "-Infinity")
"""Numbers that JSON does not have: they are written as these texts, and read as numbers again."""


class Jsonl(Observer):
    """Appends one JSON object a line. When the run starts, lines of later steps are dropped.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> file = Jsonl(path)
    >>> for event in (Started(0, 2), Stepped(1, {"loss": float("nan")}), Evaluated(1, "heldout", {"loss": 2.5})):
    ...     file(event)
    >>> print(path.read_text(), end="")
    {"step": 1, "loss": "NaN"}
    {"step": 1, "eval": "heldout", "loss": 2.5}
    >>> read_metrics(path), read_evaluations(path)
    ([{'step': 1, 'loss': nan}], [{'step': 1, 'eval': 'heldout', 'loss': 2.5}])
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file: TextIO | None = None

    def __call__(self, event: Event) -> None:
        match event:
            case Started(step):
                drop_later(self.path, step)
                self.file = self.path.open("a", encoding="ascii")
            case Stepped(step, metrics):
                self._write({"step": step, **metrics})
            case Evaluated(step, name, values):
                self._write({"step": step, "eval": name, **values})

    def close(self) -> None:
        if self.file:
            self.file.close()

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.file, "Started comes first"
        self.file.write(to_json(line))
        self.file.flush()


def drop_later(path: Path, step: int) -> None:
    """Rewrite ``path`` without what is after ``step``, or torn. A kill at any time leaves the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    with beside.open("w", encoding="ascii") as file:
        file.writelines(to_json(line) for line in _read(path) if line["step"] <= step)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of the steps of a ``metrics.jsonl``, without one that a kill has torn. Empty without a file."""
    return [line for line in _read(path) if "eval" not in line]


def read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The lines of the evaluations of a ``metrics.jsonl``: ``step``, ``eval`` (what was evaluated), and its values.

    A run that has ended and is started again evaluates its last step once more: the newer line is taken.
    """
    return list({(line["step"], line["eval"]): line for line in _read(path) if "eval" in line}.values())


def to_json(line: Mapping[str, Any]) -> str:
    """A line that every reader of JSON accepts; tensors and arrays in it become lists.

    >>> to_json({"step": 1, "load": [0.5, float("-inf")]})
    '{"step": 1, "load": [0.5, "-Infinity"]}\\n'
    """
    return json.dumps({name: _plain(value) for name, value in line.items()}) + "\n"


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return json.dumps(value) if isinstance(value, float) and not isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(x) for x in value]
    return float(value) if isinstance(value, str) and value in NOT_FINITE else value


def _read(path: Path) -> Iterator[dict[str, Any]]:
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:  # empty, or torn by a kill
            continue
        if isinstance(line, dict) and "step" in line:
            yield {name: _numbers(value) for name, value in line.items()}
