"""What the JSON of a checkpoint may hold: types and ranges, checked once when it is read: no other code meets anything else."""

from __future__ import annotations

import json
import re
from typing import Any

JSON_BYTES = 1 << 30  # what is larger was not written by this package, and is not read

COUNT = range(1 << 63)
FILE = re.compile(r"\w[\w.-]{0,254}", re.ASCII)  # beside the index: no folder, not hidden
_KEY = r"[^.\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]+"  # a message that names it is one line
PATH = re.compile(rf"(?=.{{1,1000}}\Z){_KEY}(\.{_KEY}){{0,99}}")
CRC = re.compile(r"[0-9a-f]{8}")
TEXT = re.compile(r".*", re.DOTALL)

# A list has items of one kind; the keys of an object are these names, or any that match a pattern; None is anything.
BOX = {"file": FILE, "offset": [COUNT], "shape": [COUNT], "crc32": [CRC]}
INDEX = {
    "format": TEXT,
    "crc32": CRC,
    "step": COUNT,
    "chunk_bytes": range(1, 1 << 63),
    "meta": {TEXT: None},
    "empty": [PATH],
    "files": {FILE: {"bytes": COUNT, "header_bytes": range(8, JSON_BYTES), "header_crc32": CRC}},
    "tensors": {PATH: {"dtype": TEXT, "shape": [COUNT], "boxes": [BOX]}},
}
HEADER = {"__metadata__": None, TEXT: {"dtype": TEXT, "shape": [COUNT], "data_offsets": [COUNT]}}


class BrokenCheckpoint(ValueError):
    """A checkpoint is damaged, incomplete or unreadable; the message names the file, and the tensor where it is known."""


def parse(data: bytes, schema: Any, where: str) -> Any:
    """The value of the JSON ``data``; `BrokenCheckpoint`, beginning with ``where``, if it is not as ``schema`` says.

    >>> parse(b'{"step": 3}', {"step": COUNT}, "file")
    {'step': 3}
    >>> parse(b'{"step": -3}', {"step": COUNT}, "file")
    Traceback (most recent call last):
    olmo_fn.checkpoint.schema.BrokenCheckpoint: file: damaged, it holds the wrong kind of value at 'step'
    """
    try:
        value = json.loads(data, parse_constant=_refuse)
        _check(value, schema, "")
    except _Misfit as error:
        raise BrokenCheckpoint(f"{where}: damaged, it holds the wrong kind of value at {str(error)[:80]!r}") from None
    except (ValueError, RecursionError):
        raise BrokenCheckpoint(f"{where}: damaged, it is not the JSON of a checkpoint") from None
    return value


class _Misfit(Exception):
    """The place of a value that a schema does not allow."""


def _check(value: Any, schema: Any, place: str) -> None:
    match schema:
        case list() if type(value) is list:
            for item in value:
                _check(item, schema[0], place)
        case dict() if type(value) is dict:
            names = [key for key in schema if isinstance(key, str)]
            for name in dict.fromkeys([*names, *value]):
                key = name if name in names else next((key for key in schema if key not in names and key.fullmatch(name)), None)
                _check(value.get(name), schema.get(key, ()), f"{place}.{name}" if place else name)
        case range() if type(value) is int and value in schema:
            pass
        case re.Pattern() if type(value) is str and schema.fullmatch(value):
            pass
        case None:
            pass
        case _:
            raise _Misfit(place)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
