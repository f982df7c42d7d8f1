"""One safetensors file, written straight from the tensors' memory, read back by chunks, with checksums."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmo_fn.checkpoint.index import CHUNK_BYTES, BrokenCheckpoint, File, crc32, running_crc32

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# Steps that stay in the processor's cache make the second pass over the bytes, the checksum, cheap.
_STEP_BYTES = 1 << 20
# What one call of a thread reads: many chunks, as a call costs 50 µs.
JOB_BYTES = 16 << 20
# The disk begins while later chunks are still being copied, not only at the end.
_SYNC_BYTES = 128 << 20


@dataclass(frozen=True)
class Piece:
    """A box to be written: the tensor's name, the box's data, and where it lies in the global shape."""

    name: str
    data: torch.Tensor
    shape: tuple[int, ...]
    offset: tuple[int, ...]


def key(name: str, shape: tuple[int, ...], offset: tuple[int, ...], box: tuple[int, ...]) -> str:
    """A box's name inside its file: the tensor's own when it is all of it, else with the slices.

    >>> key("w", (4, 6), (0, 0), (4, 6)), key("w", (4, 6), (2, 0), (2, 6))
    ('w', 'w[2:4,0:6]')
    """
    if box == shape:
        return name
    return name + "[" + ",".join(f"{start}:{start + n}" for start, n in zip(offset, box, strict=True)) + "]"


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order: a view of its memory if contiguous on the CPU, else a copy."""
    dense = tensor.detach().resolve_neg().cpu().contiguous()
    # With less than two elements any stride counts as contiguous, but only stride 1 has a view as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def write_file(path: Path, pieces: Sequence[Piece], look: Callable[[], None]) -> tuple[File, list[tuple[str, ...]]]:
    """Write ``pieces`` as a new file and fsync it; the file's record and each piece's chunk checksums.

    ``look`` is called before each chunk; what it raises ends the writing.
    """
    header, starts, size = _header(pieces)
    checksums: list[tuple[str, ...]] = []
    unsynced = 0
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        _write(fd, memoryview(header), 0)
        for piece, start in zip(pieces, starts, strict=True):
            data, sums = host_bytes(piece.data), []
            for at in range(0, max(len(data), 1), CHUNK_BYTES):
                look()
                chunk = data[at : at + CHUNK_BYTES]
                sums.append(crc32(chunk))
                _write(fd, chunk, start + at)
                unsynced += len(chunk)
                if unsynced >= _SYNC_BYTES:
                    getattr(os, "fdatasync", os.fsync)(fd)
                    unsynced = 0
            checksums.append(tuple(sums))
        os.fsync(fd)
    finally:
        os.close(fd)
    return File(size, len(header), crc32(header)), checksums


@contextmanager
def unreadable_is_broken(path: Path) -> Iterator[None]:
    """Turn the disk's input/output error, and no other (it might be passing), into `BrokenCheckpoint`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise BrokenCheckpoint(f"{path}: cannot be read from the disk (input/output error)") from error


@contextmanager
def open_file(path: Path, file: File) -> Iterator[tuple[int, dict[str, Any]]]:
    """Descriptor and ``{key: (dtype, shape, start, stop)}`` of a file with the length and header of ``file``.

    Raises `BrokenCheckpoint` if it has not; ``start`` and ``stop`` count from the beginning of the file.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        raise BrokenCheckpoint(f"{path}: missing") from None
    try:
        with unreadable_is_broken(path):
            header = os.pread(fd, file.header_bytes, 0)
        if (size := os.fstat(fd).st_size) != file.bytes:
            found = "truncated" if size < file.bytes else "too long"
            lost = _lost(header, size) if crc32(header) == file.header_crc32 else ""
            raise BrokenCheckpoint(f"{path}: {found}, {size:,} bytes of {file.bytes:,}{lost}")
        if crc32(header) != file.header_crc32:
            raise BrokenCheckpoint(f"{path}: the header does not match its checksum")
        yield fd, _parse(header)
    finally:
        os.close(fd)


def read_chunk(fd: int, start: int, size: int, checksum: str, into: memoryview | None = None) -> str:
    """Read ``size`` bytes from ``start`` on, into ``into`` if given; what is wrong with them, else ""."""
    scratch = memoryview(bytearray(min(size, _STEP_BYTES))) if into is None else into
    at, crc = 0, 0
    while at < size:
        step = scratch[: size - at] if into is None else into[at : at + _STEP_BYTES]
        try:
            n = os.preadv(fd, [step], start + at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return "cannot be read from the disk (input/output error)"
        if n == 0:
            return "is cut off"
        crc = running_crc32(step[:n], crc)
        at += n
    return "" if f"{crc:08x}" == checksum else "does not match its checksum"


def _header(pieces: Sequence[Piece]) -> tuple[bytes, list[int], int]:
    """The header's bytes, where each piece starts in the file, and the file's length."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    spans, at = [], 0
    for piece in pieces:
        box = tuple(piece.data.shape)
        spans.append((at, at + piece.data.nbytes))
        entries[key(piece.name, piece.shape, piece.offset, box)] = {
            "dtype": DTYPE_NAMES[piece.data.dtype],
            "shape": box,
            "data_offsets": spans[-1],
        }
        at += piece.data.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start, _ in spans], len(header) + at


def _parse(header: bytes) -> dict[str, Any]:
    base = len(header)
    return {
        name: (entry["dtype"], tuple(entry["shape"]), *(base + offset for offset in entry["data_offsets"]))
        for name, entry in json.loads(header[8:]).items()
        if name != "__metadata__"
    }


def _lost(header: bytes, size: int) -> str:
    names = [name for name, (*_, stop) in _parse(header).items() if stop > size]
    more = f", … ({len(names)} tensors in all)" if len(names) > 3 else ""
    return f"; lost: {', '.join(names[:3])}{more}" if names else ""


def _write(fd: int, data: memoryview, start: int) -> None:
    at = 0
    while at < len(data):
        at += os.pwrite(fd, data[at:], start + at)
