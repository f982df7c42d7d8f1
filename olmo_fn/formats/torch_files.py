"""The tensors in a file of ``torch.save``, read without unpickling: each by itself, into memory that is given.

Such a file is a zip file of records that are stored as they are: ``data.pkl``, which says of each tensor its dtype, shape and
strides, and ``data/0``, ``data/1``, …, the numbers. The pickle is read by `olmo_fn.formats.pickles`, which builds no object and
calls nothing, and the numbers straight from the file, with the checksum that the zip file has of them. ``torch.load`` with
``weights_only`` is as safe, but copies all of a file, or of a shard, before any of it can be used.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
from collections.abc import Iterator
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from zlib_ng.zlib_ng import crc32

from olmo_fn.checkpoint import Deferred
from olmo_fn.checkpoint.format import host_bytes
from olmo_fn.formats.pickles import Called, Global, loads

STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in {
        "Double": torch.float64, "Float": torch.float32, "Half": torch.float16, "BFloat16": torch.bfloat16,
        "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
        "Bool": torch.bool,
    }.items()
}  # fmt: skip
IN_TENSORS = frozenset(
    {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "collections.OrderedDict", *STORAGES}
)
"""What the pickle of a file of tensors may name."""
MOST_BYTES = 64 << 20
"""Of the pickle in such a file."""


class Place(NamedTuple):
    """Where something lies: ``length`` bytes of a file from ``start`` on."""

    file: Path
    start: int
    length: int


class Layout(NamedTuple):
    """A tensor of the pickle: its numbers are entries ``offset + Σ index · strides`` of the record ``data/<key>``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    key: str

    @property
    def is_dense(self) -> bool:
        """Whether the numbers lie in row-major order, and are all of the record."""
        return not self.offset and self.strides == torch.empty(self.shape, device="meta").stride()


class TorchFile:
    """What ``torch.save`` wrote at a place, a whole file or a part of one; ``what`` is how messages call it.

    ValueError, in one line, for what is damaged, compressed, or not such a file. To be used in a ``with``.
    """

    def __init__(self, place: Place, what: str = "") -> None:
        self.where = f"{place.file}: {what}".removesuffix(": ")
        self.window = _Window(place)

    def __enter__(self) -> TorchFile:
        try:
            with zipfile.ZipFile(self.window) as archive:
                self.records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
        except (zipfile.BadZipFile, struct.error, ValueError, NotImplementedError, RuntimeError) as error:
            self.window.close()
            raise ValueError(f"{self.where}: damaged, or not written by torch.save ({error})") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.window.close()

    def pickle(self, known: frozenset[str] = IN_TENSORS) -> Any:
        """The value of its pickle, in which each tensor is a call; ``known`` are the names that may be in it."""
        if (size := self._record("data.pkl").file_size) > MOST_BYTES:
            raise ValueError(f"{self.where}: its pickle has {size:,} bytes, more than {MOST_BYTES:,}; it is not read")
        if "byteorder" in self.records and self._bytes("byteorder") != b"little":
            raise ValueError(f"{self.where}: written on a big-endian machine, which is not read")
        return loads(self._bytes("data.pkl"), known, self.where)

    def layout(self, value: Any) -> Layout:
        """Where the numbers of a tensor of the pickle are; ValueError for what is none, and for one that is not in the file."""
        match value:
            case Called("torch._utils._rebuild_parameter", (inner, *_)):
                return self.layout(inner)
            case Called("torch._utils._rebuild_tensor_v2", (Called("persistent", (stored,)), int(offset), shape, strides, *_)):
                match stored:
                    case ("storage", Global(storage), str(key), str(), int(length)) if storage in STORAGES:
                        found = Layout(STORAGES[storage], shape, strides, offset, key)
                        if _fits(found, length) and self._record(f"data/{key}").file_size == length * found.dtype.itemsize:
                            return found
        raise ValueError(f"{self.where}: damaged, its pickle and its numbers do not fit together")

    def read(self, layout: Layout, out: Tensor) -> Tensor:
        """Fill ``out``, contiguous and of the layout's shape and dtype, from the file; ValueError if a byte is damaged."""
        name = f"data/{layout.key}"
        if layout.is_dense and self._record(name).file_size == out.nbytes:
            self._fill(name, host_bytes(out))
            return out
        record = torch.empty(self._record(name).file_size, dtype=torch.uint8)
        self._fill(name, host_bytes(record))
        return out.copy_(record.view(layout.dtype).as_strided(layout.shape, layout.strides, layout.offset))

    def _record(self, name: str) -> zipfile.ZipInfo:
        found = self.records.get(name)
        if found is None or found.compress_type != zipfile.ZIP_STORED or found.file_size > self.window.length:
            raise ValueError(f"{self.where}: damaged, it has no {name} that is stored as it is")
        return found

    def _bytes(self, name: str) -> bytes:
        data = bytearray(self._record(name).file_size)
        self._fill(name, memoryview(data))
        return bytes(data)

    def _fill(self, name: str, buffer: memoryview) -> None:
        """The bytes of a record, which are as many as the buffer has."""
        info, header = self._record(name), bytearray(30)
        self.window.seek(info.header_offset)
        self._fully(memoryview(header))
        lengths = struct.unpack_from("<HH", header, 26)
        self.window.seek(info.header_offset + 30 + sum(lengths))
        self._fully(buffer)
        if bytes(header[:4]) != b"PK\3\4" or crc32(buffer) != info.CRC:
            raise ValueError(f"{self.where}: {name} does not match its checksum")

    def _fully(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            if not (count := self.window.readinto(buffer[done:])):
                raise ValueError(f"{self.where}: truncated")
            done += count


def read_tensors(path: Path) -> dict[str, Deferred]:
    """The tensors in a file of ``torch.save``, by their keys in its dicts, joined by dots; none of them is read yet."""
    with TorchFile(Place(path, 0, path.stat().st_size)) as file:
        found = dict(_tensors(file.pickle(), ""))
        layouts = {name: file.layout(value) for name, value in found.items()}
    return {name: Deferred(x.shape, x.dtype, partial(_read, path, x)) for name, x in layouts.items()}


def _read(path: Path, layout: Layout) -> Tensor:
    with TorchFile(Place(path, 0, path.stat().st_size)) as file:
        return file.read(layout, torch.empty(layout.shape, dtype=layout.dtype))


def _tensors(value: Any, prefix: str, depth: int = 0) -> Iterator[tuple[str, Called]]:
    """Those in a dict, and in dicts inside it."""
    for key, item in value.items() if type(value) is dict and depth < 4 else ():
        if type(item) is Called and item.name.startswith("torch._utils._rebuild_"):
            yield f"{prefix}{key}", item
        yield from _tensors(item, f"{prefix}{key}.", depth + 1)


class _Window(RawIOBase):
    """A part of a file as a file of its own, which ends where the part ends."""

    def __init__(self, place: Place) -> None:
        super().__init__()
        self.start, self.length, self.at = place.start, place.length, 0
        self.fd = os.open(place.file, os.O_RDONLY | os.O_CLOEXEC)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.length}[whence] + offset
        if self.at < 0:
            raise ValueError("a place before the beginning")
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(0, self.length - self.at)]
        count = os.preadv(self.fd, [view], self.start + self.at) if len(view) else 0
        self.at += count
        return count

    def close(self) -> None:
        if not self.closed:
            os.close(self.fd)
        super().close()


def _fits(layout: Layout, length: int) -> bool:
    """Whether all entries are among ``length`` of a record."""
    numbers = (
        (*layout.shape, *layout.strides, layout.offset) if type(layout.shape) is type(layout.strides) is tuple else (None,)
    )
    if any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers) or len(layout.shape) != len(layout.strides):
        return False
    last = sum((n - 1) * step for n, step in zip(layout.shape, layout.strides, strict=True))
    entries = math.prod(layout.shape)
    return entries <= length and (not entries or layout.offset + last < length)
