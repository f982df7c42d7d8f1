"""A stored checkpoint opened for reading: its index, the checked bytes of its parts, and what is wrong with them."""

from __future__ import annotations

import errno
import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from olmo_fn.checkpoint.format import DTYPES, Header, Index, StoredPart, crc32, parse_header, part_key
from olmo_fn.checkpoint.schema import JSON_BYTES, BrokenCheckpoint

# What one call of a thread reads: many chunks, as a call costs 50 µs.
JOB_BYTES = 16 << 20
_REASONS = {
    errno.EIO: "cannot be read from the disk (input/output error)",
    errno.EACCES: "may not be read by you (permission denied); its owner can let you, with chmod -R a+rX",
}
T = TypeVar("T")


def read_index(path: str | Path) -> Index:
    """The index of the checkpoint at ``path``; `BrokenCheckpoint` if there is none that is intact."""
    file = Path(path) / "index.json"
    with ExitStack() as stack, _unreadable_is_broken(f"{file}:", f"missing, so {path} is not a whole checkpoint"):
        opened, size = _open(file, stack)
        if size > JSON_BYTES:
            raise BrokenCheckpoint(f"{file}: damaged, no index is {size:,} bytes long")
        return Index.loads(opened.read(size + 1), str(file))


def verify(path: str | Path, *, deep: bool = True) -> list[str]:
    """What is wrong with the checkpoint at ``path``, a line for each problem; an empty list if it is intact.

    ``deep`` reads every byte; without it only the index, and the files' presence, lengths and headers are looked at.

    >>> verify("/nowhere/step5")
    ['/nowhere/step5/index.json: missing, so /nowhere/step5 is not a whole checkpoint']
    """
    problems: set[str] = set()

    def attempt(call: Callable[..., T], *args: Any) -> T | None:
        try:
            return call(*args)
        except BrokenCheckpoint as error:
            problems.add(str(error))
            return None

    if index := attempt(read_index, path):
        with ExitStack() as stack, ThreadPoolExecutor(default_threads()) as pool:
            files = OpenFiles(Path(path), index, stack)
            for name in index.files:
                attempt(files.open, name)
            parts = [attempt(files.part, name, part) for name, tensor in index.tensors.items() for part in tensor.parts]
            reads = [partial(part.read, *span) for part in parts if part and deep for span in part.spans(0, part.size)]
            list(pool.map(attempt, reads))
    return sorted(problems)


class OpenFiles:
    """The files of a checkpoint, opened and checked when first needed, closed by ``stack``."""

    def __init__(self, path: Path, index: Index, stack: ExitStack) -> None:
        self.path, self.index, self.stack = path, index, stack
        self._opened: dict[str, tuple[int, Header]] = {}

    def open(self, name: str) -> tuple[int, Header]:
        """Descriptor and header of a file; `BrokenCheckpoint` unless length and header are as the index says."""
        if name not in self._opened:
            path, file = self.path / name, self.index.files[name]
            with _unreadable_is_broken(f"{path}:"):
                opened, size = _open(path, self.stack)
                header = opened.read(file.header_bytes)
            intact = crc32(header) == file.header_crc32
            parts = parse_header(header, file.bytes, str(path)) if intact else {}
            if size != file.bytes:
                lost = [key for key, (*_, stop) in parts.items() if stop > size]
                what = "truncated" if size < file.bytes else "too long"
                more = f"; lost: {some(lost, 3)}" if lost else ""
                raise BrokenCheckpoint(f"{path}: {what}, {size:,} bytes of {file.bytes:,}{more}")
            if not intact:
                raise BrokenCheckpoint(f"{path}: the header does not match its checksum")
            self._opened[name] = opened.fileno(), parts
        return self._opened[name]

    def part(self, name: str, part: StoredPart) -> PartBytes:
        """The bytes of a part of the tensor ``name``."""
        fd, header = self.open(part.file)
        tensor, where = self.index.tensors[name], f"{self.path / part.file}: {name}"
        dtype, shape, start, stop = header.get(part_key(name, tensor.shape, part.box), ("", (), 0, 0))
        size = DTYPES[tensor.dtype].itemsize * math.prod(shape)
        if (dtype, shape, stop - start) != (tensor.dtype, part.box.shape, size):
            raise BrokenCheckpoint(f"{where} is not what the index says")
        return PartBytes(where, fd, start, size, self.index.chunk_bytes, part.crc32)


@dataclass(frozen=True)
class PartBytes:
    """The bytes of one stored part: where they are in an open file, and the CRC-32 of each chunk of them."""

    where: str
    fd: int
    start: int
    size: int
    chunk: int
    crc32: tuple[str, ...]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """``start`` to ``stop`` in spans for one call of `read` each, cut between chunks; one span if empty."""
        step = max(1, JOB_BYTES // self.chunk) * self.chunk
        return pairwise([start, *range((start // step + 1) * step, stop, step), stop])

    def read(self, start: int, stop: int, out: memoryview | None = None) -> None:
        """Read and check the chunks that ``start`` to ``stop`` lie in; `BrokenCheckpoint` if they are not as written.

        ``out`` gets the bytes asked for: of a chunk that is needed in part the rest is read to check it, and dropped.
        """
        for i in range(start // self.chunk, max(-(-stop // self.chunk), start // self.chunk + 1)):
            first, last = i * self.chunk, min((i + 1) * self.chunk, self.size)
            lo, hi = max(first, start), min(last, stop)
            if out is not None and (lo, hi) == (first, last):
                self._read_chunk(i, out[lo - start : hi - start])
                continue
            chunk = memoryview(bytearray(last - first))
            self._read_chunk(i, chunk)
            if out is not None:
                out[lo - start : hi - start] = chunk[lo - first : hi - first]

    def _read_chunk(self, i: int, out: memoryview) -> None:
        done = 0
        while done < len(out):
            with _unreadable_is_broken(self.where):
                n = os.preadv(self.fd, [out[done:]], self.start + i * self.chunk + done)
            if n == 0:
                raise BrokenCheckpoint(f"{self.where} is cut off")
            done += n
        if crc32(out) != self.crc32[i]:
            raise BrokenCheckpoint(f"{self.where} does not match its checksum")


def default_threads() -> int:
    """Threads that read or write: as many as this process may use cores, at most 8."""
    return min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def some(names: Iterable[str], limit: int = 6) -> str:
    """The first of the names, and how many there are if that is not all."""
    names = list(names)
    return ", ".join(names[:limit]) + (f", … ({len(names)} in all)" if len(names) > limit else "")


def _open(path: Path, stack: ExitStack) -> tuple[BinaryIO, int]:
    """A file, which ``stack`` closes, and its length; `BrokenCheckpoint` if it is a folder, a device or a pipe."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would wait for its writer
    stack.callback(os.close, fd)
    if not stat.S_ISREG((status := os.fstat(fd)).st_mode):
        raise BrokenCheckpoint(f"{path}: not a regular file")
    return stack.enter_context(open(fd, "rb", closefd=False)), status.st_size


@contextmanager
def _unreadable_is_broken(where: str, missing: str = "missing") -> Iterator[None]:
    """Turn an error of the system into `BrokenCheckpoint`, but for one that this process has with any file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, None):
            raise
        reasons = {**_REASONS, errno.ENOENT: missing, errno.ENOTDIR: missing}
        reason = reasons.get(error.errno, f"cannot be read ({error.strerror})")
        raise BrokenCheckpoint(f"{where} {reason}") from error
