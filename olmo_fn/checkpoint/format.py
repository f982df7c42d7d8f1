"""What a checkpoint is on the disk: ``index.json`` as frozen dataclasses, and the headers of its safetensors files.

A tensor is stored as one or more parts, each a box of it in one of the files. A writer of whole tensors stores one part
for each; ranks that hold shards store one for each distinct shard, in files of their own.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from zlib_ng.zlib_ng import crc32 as _crc32  # zlib's numbers five times faster, 20 GB/s

from olmo_fn import __version__
from olmo_fn.checkpoint.boxes import tiles
from olmo_fn.checkpoint.schema import HEADER, INDEX, BrokenCheckpoint, parse
from olmo_fn.spec import Box

FORMAT = 1
# Small, as who needs some bytes of a chunk reads all of it, to check them; its checksum takes 12 bytes of index.
CHUNK_BYTES = 1 << 20
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "BOOL": torch.bool,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
Header: TypeAlias = dict[str, tuple[str, tuple[int, ...], int, int]]
"""``{key: (dtype, shape, start, stop)}`` of a safetensors file; the bytes count from the beginning of the file."""
_FIRST_LINE = re.compile(rb'\{"format": "olmo_fn (\d{1,9})", "crc32": "([0-9a-f]{8})",\n')


class StoredPart(NamedTuple):
    """One box of a tensor in one file, and the CRC-32 of each chunk of its bytes."""

    file: str
    box: Box
    crc32: tuple[str, ...]


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: its dtype as safetensors spells it (``F32``, ``BF16``), its shape, and the parts that make it up."""

    dtype: str
    shape: tuple[int, ...]
    parts: tuple[StoredPart, ...]


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its length, and length and CRC-32 of its header (the length prefix included)."""

    bytes: int
    header_bytes: int
    header_crc32: str


@dataclass(frozen=True)
class Index:
    """The contents of ``index.json``. ``empty`` lists the tree's branches without leaves, ``meta`` is the caller's.

    >>> index = Index(step=3, tensors={}, files={}, meta={"tokens": 12})
    >>> Index.loads(index.dumps(), "index.json") == index
    True
    """

    step: int
    tensors: dict[str, StoredTensor]
    files: dict[str, StoredFile]
    empty: tuple[str, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)
    chunk_bytes: int = CHUNK_BYTES

    def dumps(self) -> bytes:
        """The bytes of ``index.json``: plain JSON, a tensor a line, its CRC-32 in the first line."""
        entries = {name: json.dumps(getattr(self, name), allow_nan=False) for name in ("step", "chunk_bytes", "meta", "empty")}
        entries["files"] = _lines({name: asdict(file) for name, file in self.files.items()})
        entries["tensors"] = _lines({name: _tensor_json(tensor) for name, tensor in self.tensors.items()})
        rest = ",\n".join(f'"{key}": {value}' for key, value in entries.items()).encode() + b"\n}\n"
        return _first_line(crc32(_first_line("0" * 8) + rest)) + rest

    @staticmethod
    def loads(data: bytes, where: str) -> Index:
        """The index in ``data``; `BrokenCheckpoint`, beginning with ``where``, if a byte is not as it was written."""
        first = _FIRST_LINE.match(data)
        if first is None:
            raise BrokenCheckpoint(f"{where}: damaged, or not the index of an olmo_fn checkpoint")
        start, stop = first.span(2)
        if crc32(data[:start] + b"0" * 8 + data[stop:]) != first[2].decode():
            raise BrokenCheckpoint(f"{where}: does not match its checksum")
        if (version := int(first[1])) != FORMAT:
            raise BrokenCheckpoint(
                f"{where}: written in format {version}, this olmo_fn reads format {FORMAT} (it is version {__version__}); "
                f"load it with {'a newer' if version > FORMAT else 'an older'} olmo_fn"
            )
        index = _index(parse(data, INDEX, where))
        index.check(where)
        return index

    def check(self, where: str) -> None:
        """`BrokenCheckpoint` for what cannot be, such as a tensor whose boxes leave something out or hold something twice."""
        if wrong := self._contradiction():
            raise BrokenCheckpoint(f"{where}: {wrong[:400]}")

    def _contradiction(self) -> str:
        lengths = {name: file.header_bytes for name, file in self.files.items()}
        paths = [*self.tensors, *self.empty]
        branches = {path[:i] for path in paths for i, letter in enumerate(path) if letter == "."}
        if twice := branches.intersection(paths) | self.tensors.keys() & set(self.empty):
            return f"{min(twice)} is a tensor, or an empty branch, and a branch with tensors"
        for name, tensor in self.tensors.items():
            if tensor.dtype not in DTYPES:
                return f"{name} has the dtype {tensor.dtype[:20]!r}, unknown to olmo_fn {__version__}; a newer one may know it"
            item = DTYPES[tensor.dtype].itemsize
            if item * math.prod(n or 1 for n in tensor.shape) >= 1 << 63:
                return f"{name} is larger than any memory, {tensor.shape}"
            if not tiles([part.box for part in tensor.parts], tensor.shape):
                return f"the boxes of {name} do not tile its shape {tensor.shape}"
            for part in tensor.parts:
                nbytes = item * math.prod(part.box.shape)
                if part.file not in lengths or len(part.crc32) != max(1, -(-nbytes // self.chunk_bytes)):
                    return f"the bytes of {name} are not all in its files, or not all checksummed"
                lengths[part.file] += nbytes
        wrong = (name for name, file in self.files.items() if file.bytes != lengths[name])
        return next((f"the tensors of {name} are not as long as the file" for name in wrong), "")


def crc32(data: bytes | memoryview) -> str:
    """CRC-32 of ``data`` as eight hex digits."""
    return f"{_crc32(data):08x}"


def host_bytes(tensor: torch.Tensor) -> memoryview:
    """The tensor's bytes in row-major order: a view of its memory if contiguous on the CPU, else a copy."""
    dense = tensor.detach().resolve_neg().cpu().contiguous()
    # With less than two elements any stride counts as contiguous, but only stride 1 has a view as bytes.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8).numpy().data


def part_key(name: str, shape: tuple[int, ...], box: Box) -> str:
    """The name of a part inside its file: the tensor's own if it is all of the tensor, else with the slices.

    >>> part_key("w", (4, 6), Box((0, 0), (4, 6))), part_key("w", (4, 6), Box((2, 0), (2, 6)))
    ('w', 'w[2:4,0:6]')
    """
    if box.shape == shape:
        return name
    return f"{name}[{','.join(f'{s.start}:{s.stop}' for s in box.slices)}]"


def dump_header(parts: Iterable[tuple[str, str, tuple[int, ...], int]]) -> tuple[bytes, list[int], int]:
    """The header of a safetensors file with parts ``(key, dtype, shape, nbytes)``; where each begins; the file's length."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts, end = [], 0
    for key, dtype, shape, nbytes in parts:
        starts.append(end)
        end += nbytes
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": (end - nbytes, end)}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    return header, [len(header) + start for start in starts], len(header) + end


def parse_header(header: bytes, size: int, where: str) -> Header:
    """The parts of a safetensors file of ``size`` bytes, from its header with the length prefix.

    `BrokenCheckpoint`, beginning with ``where``, unless they fill the file one after another.
    """
    entries = parse(header[8:], HEADER, where)
    entries.pop("__metadata__", None)
    spans = sorted(entry["data_offsets"] for entry in entries.values())
    ends = [[int.from_bytes(header[:8], "little") + 8 - len(header)], *spans, [size - len(header)]]
    ordered = all(len(span) == 2 and span[0] <= span[1] for span in spans)
    if not ordered or ends[0] != [0] or any(a[-1] != b[0] for a, b in pairwise(ends)):
        raise BrokenCheckpoint(f"{where}: damaged, its tensors do not lie one after another")
    return {
        key: (entry["dtype"], tuple(entry["shape"]), *(len(header) + offset for offset in entry["data_offsets"]))
        for key, entry in entries.items()
    }


def _first_line(checksum: str) -> bytes:
    return f'{{"format": "olmo_fn {FORMAT}", "crc32": "{checksum}",\n'.encode()


def _lines(entries: Mapping[str, Any]) -> str:
    return "{\n" + ",\n".join(f"  {json.dumps(name)}: {json.dumps(entry)}" for name, entry in entries.items()) + "\n}"


def _tensor_json(tensor: StoredTensor) -> dict[str, Any]:
    boxes = [{"file": part.file, **part.box._asdict(), "crc32": part.crc32} for part in tensor.parts]
    return {"dtype": tensor.dtype, "shape": tensor.shape, "boxes": boxes}


def _index(raw: dict[str, Any]) -> Index:
    def part(raw: dict[str, Any]) -> StoredPart:
        return StoredPart(raw["file"], Box(tuple(raw["offset"]), tuple(raw["shape"])), tuple(raw["crc32"]))

    tensors = {
        name: StoredTensor(tensor["dtype"], tuple(tensor["shape"]), tuple(map(part, tensor["boxes"])))
        for name, tensor in raw["tensors"].items()
    }
    files = {name: StoredFile(**file) for name, file in raw["files"].items()}
    return Index(raw["step"], tensors, files, tuple(raw["empty"]), raw["meta"], raw["chunk_bytes"])
