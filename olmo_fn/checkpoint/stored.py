"""A stored checkpoint opened for reading: its index, and where in its files the bytes of each tensor are."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from olmo_fn.checkpoint.index import Box, BrokenCheckpoint, Index
from olmo_fn.checkpoint.spans import Span, bands, contiguous, covering, strides
from olmo_fn.checkpoint.tensorfile import DTYPES, JOB_BYTES, host_bytes, key, open_file, read_chunk, unreadable_is_broken


def read_index(path: str | Path) -> Index:
    """The index of the checkpoint at ``path``; raises `BrokenCheckpoint` if there is none that is whole."""
    file = Path(path) / "index.json"
    try:
        with unreadable_is_broken(file):
            return Index.loads(file.read_bytes(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpoint(f"{file}: missing, so {path} is not a whole checkpoint") from None


@dataclass(frozen=True)
class Bytes:
    """The bytes of one box: where they are in a file, and what each chunk of them should sum to."""

    where: str
    fd: int
    at: int
    size: int
    chunk: int
    crc32: tuple[str, ...]

    def jobs(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """``start`` to ``stop`` in parts for one call of `read` each, cut between chunks; one part if empty."""
        step = max(1, JOB_BYTES // self.chunk) * self.chunk
        cuts = [start, *range((start // step + 1) * step, stop, step), stop]
        return pairwise(cuts)

    def read(self, start: int, stop: int, into: memoryview | None = None) -> str:
        """Read and check the chunks that ``start`` to ``stop`` lie in; what is wrong with them, or "".

        ``into`` gets the bytes asked for and no others: of a chunk that is needed in part the rest is read to
        check it, and dropped.
        """
        for i in range(start // self.chunk, max(-(-stop // self.chunk), start // self.chunk + 1)):
            first, last = i * self.chunk, min((i + 1) * self.chunk, self.size)
            lo, hi = max(first, start), min(last, stop)
            whole = into is not None and (lo, hi) == (first, last)
            data = into[lo - start : hi - start] if into is not None and whole else None
            if data is None and into is not None:
                data = memoryview(bytearray(last - first))
            if wrong := read_chunk(self.fd, self.at + first, last - first, self.crc32[i], data):
                return f"{self.where} {wrong}"
            if into is not None and data is not None and not whole:
                into[lo - start : hi - start] = data[lo - first : hi - first]
        return ""


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

    def bytes(self, name: str, box: Box) -> Bytes:
        """Where the bytes of one box of the tensor ``name`` are."""
        fd, header = self.open(box.file)
        entry = self.index.tensors[name]
        stored_as = key(name, entry.shape, box.offset, box.shape)
        dtype, shape, start, stop = header.get(stored_as, (None, None, 0, 0))
        where = f"{self.path / box.file}: {name}"
        size, chunk = math.prod(box.shape) * DTYPES[entry.dtype].itemsize, self.index.chunk_bytes
        count = max(1, -(-size // chunk))
        if (dtype, shape, stop - start, count) != (entry.dtype, box.shape, size, len(box.crc32)):
            raise BrokenCheckpoint(f"{where} is not in this file as the index says")
        return Bytes(where, fd, start, size, chunk, box.crc32)


def read_part(stored: Bytes, box: Span, part: Span, out: torch.Tensor, want: Span) -> Iterator[Callable[[], None]]:
    """Jobs that read ``part`` of the stored ``box`` to its place in ``out``, which holds the box ``want``.

    They raise `BrokenCheckpoint` if a chunk is not as it was written.
    """
    item = out.element_size()
    for band in bands(part, box, JOB_BYTES // item, max(1, 2 * stored.chunk // item)):
        start, stop = (item * at for at in covering(band, box))
        if contiguous(band, box) and contiguous(band, want):
            into = host_bytes(out)[item * covering(band, want)[0] :]
            for a, b in stored.jobs(start, stop):
                yield partial(_read, stored, a, b, into[a - start : b - start])
        else:
            yield partial(_read_strided, stored, start, stop, box, band, out, want)


def _read(stored: Bytes, start: int, stop: int, into: memoryview) -> None:
    if problem := stored.read(start, stop, into):
        raise BrokenCheckpoint(problem)


def _read_strided(stored: Bytes, start: int, stop: int, box: Span, band: Span, out: torch.Tensor, want: Span) -> None:
    rows = torch.empty((stop - start) // out.element_size(), dtype=out.dtype)
    _read(stored, start, stop, host_bytes(rows))
    place = tuple(slice(i - j, i - j + n) for i, j, n in zip(band.offset, want.offset, band.shape, strict=True))
    out[place] = rows.as_strided(band.shape, strides(box.shape))
