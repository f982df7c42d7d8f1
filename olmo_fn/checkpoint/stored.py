"""A stored checkpoint opened for reading: its index, and where in its files the bytes of each tensor are."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_fn.checkpoint.index import Box, BrokenCheckpoint, Index
from olmo_fn.checkpoint.tensorfile import DTYPES, key, open_file, read_chunk, unreadable_is_broken


def read_index(path: str | Path) -> Index:
    """The index of the checkpoint at ``path``; raises `BrokenCheckpoint` if there is none that is whole."""
    file = Path(path) / "index.json"
    try:
        with unreadable_is_broken(file):
            return Index.loads(file.read_bytes(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpoint(f"{file}: missing, so {path} is not a whole checkpoint") from None


@dataclass(frozen=True)
class Chunk:
    """Bytes of one box: where they are in a file, where they go in the box, and what they should sum to."""

    where: str
    fd: int
    start: int
    at: int
    size: int
    crc32: str

    def read(self, box: memoryview | None = None) -> str:
        """Read and check the bytes, into their place in ``box`` if given; what is wrong with them, or ""."""
        into = box[self.at : self.at + self.size] if box is not None else None
        wrong = read_chunk(self.fd, self.start, self.size, self.crc32, into)
        return f"{self.where} {wrong}" if wrong else ""


class Files:
    """The files of a checkpoint, opened and checked when first needed, closed by ``stack``."""

    def __init__(self, path: Path, index: Index, stack: ExitStack) -> None:
        self.path, self.index, self.stack = path, index, stack
        self.opened: dict[str, tuple[int, dict[str, Any]]] = {}

    def open(self, name: str) -> tuple[int, dict[str, Any]]:
        """Its descriptor and header; `BrokenCheckpoint` unless length and header are as the index says."""
        if name not in self.opened:
            if name not in self.index.files:
                raise BrokenCheckpoint(f"{self.path / 'index.json'}: says nothing about the file {name}")
            self.opened[name] = self.stack.enter_context(open_file(self.path / name, self.index.files[name]))
        return self.opened[name]

    def chunks(self, name: str, box: Box) -> list[Chunk]:
        """Where the bytes of one box of the tensor ``name`` are."""
        fd, header = self.open(box.file)
        entry = self.index.tensors[name]
        stored_as = key(name, entry.shape, box.offset, box.shape)
        dtype, shape, start, stop = header.get(stored_as, (None, None, 0, 0))
        where = f"{self.path / box.file}: {name}"
        size, step = math.prod(box.shape) * DTYPES[entry.dtype].itemsize, self.index.chunk_bytes
        count = max(1, -(-size // step))
        if (dtype, shape, stop - start, count) != (entry.dtype, box.shape, size, len(box.crc32)):
            raise BrokenCheckpoint(f"{where} is not in this file as the index says")
        return [
            Chunk(where, fd, start + i * step, i * step, min(step, size - i * step), crc) for i, crc in enumerate(box.crc32)
        ]
