"""``metrics.jsonl``: a line a step and a line an evaluation, and nothing twice when a run goes on from a checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from math import isfinite, nan
from pathlib import Path
from typing import Any

from olmo_fn.files import write_whole
from olmo_fn.train.events import Evaluated, Event, Failure, Observer, Saved, Started, Stepped

log = logging.getLogger(__name__)

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
        self.path, self.unwritten = path, b""
        self.file: FileIO | None = None

    def __call__(self, event: Event) -> Failure | None:
        match event:
            case Started(step):
                try:
                    drop_later(self.path, step)
                    self.file = self.path.open("ab+", buffering=0)
                except OSError as error:
                    log.warning(
                        "cannot go on in %s (%s): the run goes on, and its metrics are not kept", self.path, error.strerror
                    )
            case Stepped(step, metrics):
                return self._write({"step": step, **metrics})
            case Evaluated(step, name, values):
                return self._write({"step": step, "eval": name, **values})
            case Saved() if self.file and not os.fstat(self.file.fileno()).st_nlink and self.path.parent.is_dir():
                # It was deleted with the run's folder, which is there again.
                write_whole(self.path, os.pread(self.file.fileno(), os.fstat(self.file.fileno()).st_size, 0))
                self.file = self.path.open("ab+", buffering=0)
        return None

    def close(self) -> None:
        if self.file:
            if self.unwritten:  # there may be room by now
                self._append()
            self.file.close()

    def _write(self, line: Mapping[str, Any]) -> Failure | None:
        if self.file is None:
            return None
        self.unwritten += to_json(line).encode()
        try:
            self._append()
            return None
        except OSError as error:
            return Failure(f"cannot write {self.path}: {error.strerror}")

    def _append(self) -> None:
        """Write what is not yet written, all of it or nothing: a line that is cut off would spoil the next."""
        assert self.file
        end = os.fstat(self.file.fileno()).st_size
        try:
            if self.file.write(self.unwritten) != len(self.unwritten):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            with suppress(OSError):
                self.file.truncate(end)
            raise
        self.unwritten = b""


def drop_later(path: Path, step: int) -> None:
    """Rewrite ``path`` without what is after ``step``, and without a last line that is cut off; of all else no byte is lost.

    A kill at any time leaves the old file or the new one.
    """
    if not path.exists():
        return
    lines = ((line, text) for _, line, text in _lines(path))
    kept = b"".join(
        to_json(line).encode() if line else text + b"\n" for line, text in lines if not line or line["step"] <= step
    )
    if kept != path.read_bytes():
        write_whole(path, kept)


def read_metrics(path: Path, *needed: str) -> list[dict[str, Any]]:
    """The lines of the steps of a ``metrics.jsonl`` that have the ``needed`` numbers. Empty without a file.

    A last line that a kill has cut off is left out; any other that is no such line is left out and named in a warning.
    """
    return [line for line in _read(path, needed) if "eval" not in line]


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
    return json.dumps({name: _plain(value) for name, value in line.items()}, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, (list, tuple)):
        return [_plain(x) for x in value]
    return json.dumps(value) if isinstance(value, float) and not isfinite(value) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(x) for x in value]
    return nan if value is None else float(value) if isinstance(value, str) and value in NOT_FINITE else value


def _read(path: Path, needed: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    try:
        for number, line, text in _lines(path):
            if line is None or ("eval" not in line and any(not isinstance(line.get(name), (int, float)) for name in needed)):
                log.warning(
                    "%s line %d is left out, it is none of a step: %.60r", path, number, text.decode("ascii", "replace")
                )
            else:
                yield line
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("cannot read %s: %s", path, error.strerror)


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None, bytes]]:
    """Number, value and bytes of each line but a last one that is cut off; the value is None if it is none of a step."""
    *whole, last = path.read_bytes().split(b"\n")
    for number, text in enumerate((*whole, last), 1):
        if (line := _parsed(text)) or number <= len(whole):
            yield number, line, text


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or not isinstance(line.get("eval", ""), str):
        return None
    return {name: _numbers(value) for name, value in line.items()}
