"""The safetensors files of a directory, read and written a few rows at a time, so that memory does not depend on their size."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from olmo_fn.checkpoint.format import DTYPE_NAMES, DTYPES, dump_header, host_bytes, parse_header
from olmo_fn.checkpoint.schema import HEADER, BrokenCheckpoint, parse

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
READ_BYTES = 32 << 20
"""Bytes that are read, turned or written at once."""
LARGEST_HEADER = 100 << 20
"""Bytes; the safetensors library takes no larger one."""
FILE = re.compile(r"[\w-][\w.-]{0,254}", re.ASCII)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class StoredTensor(NamedTuple):
    """A tensor in a safetensors file: where, its dtype, its shape, and its bytes' place in the file."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """``(number of the first of them, rows (n, …))`` of `READ_BYTES` at a time: all, or ``count`` rows from ``first`` on.

        A scalar has one row. ValueError for a file that has become shorter.
        """
        height, *row = self.shape or (1,)
        last = height if count is None else first + count
        size = self.dtype.itemsize * math.prod(row)
        step = max(1, READ_BYTES // max(1, size))
        with self.file.open("rb", buffering=0) as file:
            for at in range(first, last, step):
                n = min(step, last - at)
                out = torch.empty((n, *row), dtype=self.dtype)
                _read_into(file, host_bytes(out), self.start + at * size, self.file)
                yield at, out


class Joined(NamedTuple):
    """Rows of several tensors behind each other, as if they were one: ``pieces`` are a tensor, its first row, and how many."""

    pieces: tuple[tuple[StoredTensor, int, int], ...]

    @property
    def file(self) -> Path:
        """The file of the first piece."""
        return self.pieces[0][0].file

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first piece."""
        return self.pieces[0][0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all together."""
        return (sum(count for _, _, count in self.pieces), *self.pieces[0][0].shape[1:])

    def rows(self, first: int = 0, count: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """As `StoredTensor.rows`."""
        last, start = self.shape[0] if count is None else first + count, 0
        for tensor, top, height in self.pieces:
            low, high = max(first, start), min(last, start + height)
            if low < high:
                for at, part in tensor.rows(top + low - start, high - low):
                    yield at - top + start, part
            start += height


def divided(tensors: Sequence[StoredTensor], heights: Sequence[int]) -> list[Joined]:
    """Tensors, which are behind each other, divided at other rows: into parts of these heights, which are as many in all."""
    left, found = [(tensor, 0, tensor.shape[0]) for tensor in tensors], []
    for height in heights:
        pieces: list[tuple[StoredTensor, int, int]] = []
        while height:
            tensor, top, rest = left.pop(0)
            n = min(height, rest)
            pieces.append((tensor, top, n))
            if n < rest:
                left.insert(0, (tensor, top + n, rest - n))
            height -= n
        found.append(Joined(tuple(pieces)))
    return found


def open_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors of ``folder``'s safetensors files by their names: of ``model.safetensors``, or of those that its index names.

    Only headers are read. ValueError, one line with the file, for a directory without such files, with pickles instead, for a
    file that is cut off or damaged, for an index that does not fit the files, or that names one elsewhere.
    """
    if (folder / SINGLE).exists():
        return read_header(folder / SINGLE)
    if not (folder / INDEX).exists():
        raise ValueError(_no_weights(folder))
    files, found = _files_of_index(folder / INDEX), dict[str, StoredTensor]()
    for name in sorted(set(files.values())):
        here = read_header(folder / name)
        if twice := sorted(found.keys() & here.keys()):
            raise ValueError(f"{folder / name}: {twice[0]} is in {found[twice[0]].file.name} as well; keep one of them")
        found |= here
    for tensor, name in files.items():
        if tensor not in found or found[tensor].file.name != name:
            raise ValueError(f"{folder / name} lacks {tensor}, which {INDEX} says is there; copy the directory again")
    return found


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file; ValueError, one line with its path, if it is cut off, damaged, or none."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            text = file.read(min(length, LARGEST_HEADER))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    if len(prefix) < 8 or (len(text) < length and text[:1] in (b"", b"{")):
        raise ValueError(f"{path}: cut off, it has {size:,} bytes and its header alone {8 + length:,}; copy it again")
    if length > LARGEST_HEADER or text[:1] != b"{":
        raise ValueError(f"{path}: it is no safetensors file; a file of Git LFS that was not fetched is a text of three lines")
    entries = parse(text, HEADER, str(path))
    entries.pop("__metadata__", None)
    ends = {name: 8 + length + max(entry["data_offsets"], default=0) for name, entry in entries.items()}
    if lost := [name for name, end in ends.items() if end > size]:
        raise ValueError(f"{path}: cut off, {size:,} bytes of {max(ends.values()):,}, so {lost[0]} is not whole; copy it again")
    found = {}
    for name, (dtype, shape, start, stop) in parse_header(prefix + text, size, str(path)).items():
        if dtype not in DTYPES:
            raise ValueError(f"{path}: {name} is of dtype {dtype[:20]!r}, which is not known; there are {', '.join(DTYPES)}")
        if stop - start != DTYPES[dtype].itemsize * math.prod(shape):
            raise BrokenCheckpoint(f"{path}: damaged, {name} of {dtype} {list(shape)} has {stop - start:,} bytes")
        found[name] = StoredTensor(path, DTYPES[dtype], shape, start, stop)
    return found


class Target(NamedTuple):
    """A tensor to be written: its name, its dtype and its shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(
    folder: Path,
    targets: Iterable[Target],
    tensors: Iterable[Tensor],
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], Any] = lambda entries: None,
) -> None:
    """Write ``tensors``, those of ``targets`` in their order, into new safetensors files in ``folder``, as transformers does.

    One file, or several of at most ``shard_bytes`` with an index beside them; a larger tensor has a file for itself. A tensor
    is taken when the one before is written, and cast a few rows at a time. ValueError, with its name, where a number is too
    large for its dtype. ``advance`` gets the entries of each that is done.
    """
    shards = list(_shards(targets, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))] if len(shards) > 1 else [SINGLE]
    left = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        header, _, _ = dump_header((t.name, DTYPE_NAMES[t.dtype], t.shape, t.nbytes) for t in shard)
        with (folder / name).open("xb") as file:
            file.write(header)
            for target in shard:
                _write_tensor(file, target, next(left))
                advance(math.prod(target.shape))
            file.flush()
            os.fsync(file.fileno())
    if len(shards) > 1:
        where = {target.name: name for name, shard in zip(names, shards, strict=True) for target in shard}
        total = sum(target.nbytes for shard in shards for target in shard)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2)
        (folder / INDEX).write_text(text + "\n", encoding="utf-8")


def _write_tensor(file: BinaryIO, target: Target, tensor: Tensor) -> None:
    assert tuple(tensor.shape) == target.shape, (target, tensor.shape)
    rows = tensor if tensor.ndim else tensor[None]
    step = max(1, READ_BYTES // max(1, tensor.element_size() * math.prod(rows.shape[1:])))
    for part in rows.split(step):
        cast = part.to(target.dtype)
        if target.dtype == torch.float16 and not torch.equal(cast.isfinite(), part.isfinite()):
            largest = f"{float(part.abs().max()):.3g}"
            raise ValueError(f"{target.name} holds {largest}, and float16 ends at 65,504; take --dtype bfloat16 or float32")
        file.write(host_bytes(cast))


def _shards(targets: Iterable[Target], limit: int) -> Iterator[list[Target]]:
    shard: list[Target] = []
    for target in targets:
        if shard and sum(t.nbytes for t in shard) + target.nbytes > limit:
            yield shard
            shard = []
        shard.append(target)
    yield shard


def _files_of_index(path: Path) -> Mapping[str, str]:
    """The file of each tensor."""
    try:
        files = json.loads(path.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: it is no index of safetensors files ({type(error).__name__}); copy it again") from None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise ValueError(f"{path}: its weight_map is no table of tensors and files; copy it again")
    for tensor, name in files.items():
        if not FILE.fullmatch(name) or not name.endswith(".safetensors"):
            raise ValueError(f"{path}: {tensor} is said to be in {name!r}; only safetensors files beside the index are read")
    return files


def _no_weights(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such directory; give one with config.json and model.safetensors"
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} has its weights in {pickles[0]}, a pickle: reading one may run any program, so it is not read. Where "
            "you trust it, transformers makes safetensors of it: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    more = f"; {others[0]} is there, name it so" if others else ""
    return f"{folder} has neither {SINGLE} nor {INDEX}{more}"


def _read_into(file: Any, out: memoryview, start: int, path: Path) -> None:
    done = 0
    while done < len(out):
        n = os.preadv(file.fileno(), [out[done:]], start + done)
        if n == 0:
            raise ValueError(f"{path}: cut off while it is read; copy it again")
        done += n
