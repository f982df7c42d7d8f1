"""What a checkpoint holds: ``index.json`` as frozen dataclasses, and its bytes with a checksum of their own.

A tensor is stored as one or more *boxes*: the part of its global shape that starts at ``offset`` and has
``shape``. A writer with a whole tensor stores one box; ranks that hold shards store one for each distinct
shard, in files of their own, and their parts of the index are merged into one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from olmo_fn.checkpoint.spans import Span, tiles

try:  # the same numbers five times faster (20 GB/s), where it is installed
    from zlib_ng.zlib_ng import crc32 as running_crc32
except ImportError:
    from zlib import crc32 as running_crc32

FORMAT = 1
# Small, as who needs some bytes of a chunk reads all of it, to check them; its checksum takes 12 bytes of index.
CHUNK_BYTES = 1 << 20
_FIRST_LINE = re.compile(rb'\{"format": "olmo_fn (\d+)", "crc32": "([0-9a-f]{8})",\n')


class BrokenCheckpoint(ValueError):
    """A checkpoint that is not whole; the message names the file, and the tensor where it is known."""


@dataclass(frozen=True)
class Box:
    """One stored part of a tensor: file, place in the global shape, CRC-32 of each chunk of its bytes."""

    file: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    crc32: tuple[str, ...]

    @property
    def span(self) -> Span:
        """Its place in the global shape."""
        return Span(self.offset, self.shape)


@dataclass(frozen=True)
class Entry:
    """One tensor: dtype as safetensors spells it (``F32``, ``BF16``), global shape, boxes that tile it."""

    dtype: str
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]


@dataclass(frozen=True)
class File:
    """One safetensors file: its length, and length and CRC-32 of its header (the length prefix included)."""

    bytes: int
    header_bytes: int
    header_crc32: str


@dataclass(frozen=True)
class Index:
    """All of ``index.json``; ``empty`` lists the tree's branches without leaves, ``meta`` is the caller's.

    >>> index = Index(step=3, tensors={}, files={}, meta={"tokens": 12})
    >>> Index.loads(index.dumps(), "index.json") == index
    True
    """

    step: int
    tensors: dict[str, Entry]
    files: dict[str, File]
    empty: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES

    def dumps(self) -> bytes:
        """The bytes of ``index.json``: plain JSON, a tensor a line, its CRC-32 in the first line."""
        parts = {
            "step": json.dumps(self.step),
            "chunk_bytes": json.dumps(self.chunk_bytes),
            "meta": json.dumps(self.meta, allow_nan=False),
            "empty": json.dumps(self.empty),
            "files": _lines(self.files),
            "tensors": _lines(self.tensors),
        }
        rest = ",\n".join(f'"{key}": {value}' for key, value in parts.items()).encode() + b"\n}\n"
        return _first_line(crc32(_first_line("0" * 8) + rest)) + rest

    @staticmethod
    def loads(data: bytes, where: str) -> Index:
        """The index in ``data``; `BrokenCheckpoint`, beginning with ``where``, if a byte is not as saved."""
        index = Index.loads_part(data, where)
        index.check_tiles(where)
        return index

    @staticmethod
    def loads_part(data: bytes, where: str) -> Index:
        """As `loads`, for one rank's part of an index: its boxes need not make whole tensors."""
        first = _FIRST_LINE.match(data)
        if first is None:
            raise BrokenCheckpoint(f"{where}: damaged, or not the index of an olmo_fn checkpoint")
        start, stop = first.span(2)
        if crc32(data[:start] + b"0" * 8 + data[stop:]) != first[2].decode():
            raise BrokenCheckpoint(f"{where}: does not match its checksum")
        if (version := int(first[1])) != FORMAT:
            raise BrokenCheckpoint(
                f"{where}: written in format {version}, this olmo_fn reads format {FORMAT}; "
                "load it with the olmo_fn that wrote it"
            )
        try:
            return _index(json.loads(data))
        except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
            raise BrokenCheckpoint(f"{where}: not an index of format {FORMAT} ({error!r})") from error

    def check_tiles(self, where: str) -> None:
        """Raise `BrokenCheckpoint` for a tensor whose boxes leave something out, or hold something twice."""
        for name, entry in self.tensors.items():
            if not tiles([box.span for box in entry.boxes], entry.shape):
                raise BrokenCheckpoint(f"{where}: the boxes of {name} do not tile its shape {entry.shape}")


def crc32(data: bytes | memoryview) -> str:
    """CRC-32 of ``data`` as eight hex digits.

    >>> crc32(b"olmo")
    '0e92632e'
    """
    return f"{running_crc32(data):08x}"


def _first_line(checksum: str) -> bytes:
    return f'{{"format": "olmo_fn {FORMAT}", "crc32": "{checksum}",\n'.encode()


def _lines(entries: Mapping[str, Entry | File]) -> str:
    lines = (f"  {json.dumps(name)}: {json.dumps(asdict(entry))}" for name, entry in entries.items())
    return "{\n" + ",\n".join(lines) + "\n}"


def _index(raw: dict[str, Any]) -> Index:
    tensors = {
        name: Entry(
            dtype=entry["dtype"],
            shape=tuple(entry["shape"]),
            boxes=tuple(
                Box(box["file"], tuple(box["offset"]), tuple(box["shape"]), tuple(box["crc32"])) for box in entry["boxes"]
            ),
        )
        for name, entry in raw["tensors"].items()
    }
    return Index(
        step=raw["step"],
        tensors=tensors,
        files={name: File(**file) for name, file in raw["files"].items()},
        empty=tuple(raw["empty"]),
        meta=raw["meta"],
        chunk_bytes=raw["chunk_bytes"],
    )
