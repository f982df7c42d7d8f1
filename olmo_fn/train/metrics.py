"""``metrics.jsonl``: a line a step, and nothing twice when a run goes on from a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class MetricsFile:
    """Appends one JSON object a line. Opened at ``step``, it first drops the lines of later steps.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "metrics.jsonl")
    >>> with MetricsFile(path, step=0) as file:
    ...     file.write({"step": 1, "loss": 2.5})
    >>> read_metrics(path)
    [{'step': 1, 'loss': 2.5}]
    """

    def __init__(self, path: Path, step: int) -> None:
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        beside = path.with_name(path.name + ".new")
        beside.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(beside, path)
        self._file = path.open("a")

    def write(self, values: Mapping[str, Any]) -> None:
        """Append one line. It reaches the file system at once."""
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line that a kill cut off is left out. Empty without a file."""
    lines: list[dict[str, Any]] = []
    if path.exists():
        for text in path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:
                break
    return lines
