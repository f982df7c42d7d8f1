"""Load a checkpoint, or part of it, into fresh tensors; every byte that is used is checked on the way."""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from olmo_fn.checkpoint.index import Box, BrokenCheckpoint, Index
from olmo_fn.checkpoint.leaves import put_together, take_apart
from olmo_fn.checkpoint.tensorfile import (
    DTYPE_NAMES,
    DTYPES,
    default_threads,
    host_bytes,
    in_order,
    key,
    open_file,
    read_chunk,
)
from olmo_fn.tree import Tree, matches

_HUGE_PAGES_FROM = 4 << 20


def read_index(path: str | Path) -> Index:
    """The index of the checkpoint at ``path``; raises `BrokenCheckpoint` if there is none that is whole."""
    file = Path(path) / "index.json"
    try:
        return Index.loads(file.read_bytes(), str(file))
    except (FileNotFoundError, NotADirectoryError):
        raise BrokenCheckpoint(f"{file}: missing, so {path} is not a whole checkpoint") from None


def load(
    path: str | Path,
    like: Mapping[str, Any] | None = None,
    *,
    select: Collection[str] | None = None,
    device: torch.device | str = "cpu",
    threads: int | None = None,
) -> tuple[Tree, dict[str, Any]]:
    """The tree and the ``meta`` of the checkpoint at ``path``, bitwise as they were saved.

    ``like`` is a tree of tensors (on the meta device, perhaps) that says what is expected: names, shapes and
    dtypes must agree, the result has its order, and goes to its devices; ``device`` is for all the others.
    ``select`` are patterns of the paths to load, such as ``["params.*"]``; of ``like``, too, only these
    count.

    Raises `BrokenCheckpoint` (a ValueError) that names file and tensor if a byte is not as it was written,
    and ValueError that says all the differences if the checkpoint is whole but not like ``like``.

    >>> import tempfile
    >>> from olmo_fn.checkpoint import save
    >>> path = save({"params": {"w": torch.ones(2)}, "step": torch.tensor(5)}, tempfile.mkdtemp(), step=5)
    >>> load(path, select=["params.*"])
    ({'params': {'w': tensor([1., 1.])}}, {})
    """
    path = Path(path)
    index = read_index(path)
    wanted = take_apart(like) if like is not None else None
    names = list(index.tensors)
    empty = index.empty if wanted is None else wanted.empty
    if select is not None:
        names, empty = _select(path, names, select), ()
    if wanted is not None:
        expected = {
            name: leaf for name, leaf in wanted.by_path.items() if select is None or matches(name, select)
        }
        _check_like(path, index, names, expected)
        names = list(expected)
    devices = dict.fromkeys(names, device)
    if wanted is not None:
        devices |= {name: wanted.by_path[name].device for name in names if not wanted.by_path[name].is_meta}

    loaded: dict[str, torch.Tensor] = {}

    def finish(name: str, out: torch.Tensor, parts: list[tuple[Box, torch.Tensor]]) -> None:
        for box, part in parts:
            out[tuple(slice(o, o + n) for o, n in zip(box.offset, box.shape, strict=True))] = part
        loaded[name] = out.to(devices[name])

    def jobs(files: _Files) -> Iterator[Callable[[], Callable[[], None] | None]]:
        for name in names:
            entry = index.tensors[name]
            out = _empty(entry.shape, DTYPES[entry.dtype])
            parts = []
            for box in entry.boxes:
                data = out
                if box.shape != entry.shape:
                    data = _empty(box.shape, out.dtype)
                    parts.append((box, data))
                view = host_bytes(data)
                for chunk in files.chunks(name, box):
                    yield partial(_read_into, chunk, view)
            # Results come in order: when this one does, all the tensor's chunks are in place.
            yield partial(partial, finish, name, out, parts)

    with ExitStack() as stack, ThreadPoolExecutor(threads or default_threads()) as pool:
        results = stack.enter_context(closing(in_order(pool, jobs(_Files(path, index, stack)))))
        for done in results:
            if done is not None:
                done()
    return put_together(loaded, empty), index.meta


def verify(path: str | Path, *, deep: bool = True, threads: int | None = None) -> list[str]:
    """What is wrong with the checkpoint at ``path``, a line for each problem; an empty list if it is whole.

    ``deep`` reads every byte; without it only the index, and the files' presence, lengths and headers are
    looked at.

    >>> verify("/nowhere/step5")
    ['/nowhere/step5/index.json: missing, so /nowhere/step5 is not a whole checkpoint']
    """
    path = Path(path)
    try:
        index = read_index(path)
    except BrokenCheckpoint as error:
        return [str(error)]
    problems: dict[str, None] = {}

    def jobs(files: _Files) -> Iterator[Callable[[], str]]:
        for name, entry in index.tensors.items():
            for box in entry.boxes:
                try:
                    chunks = files.chunks(name, box)
                except BrokenCheckpoint as error:
                    problems[str(error)] = None
                    continue
                for chunk in chunks if deep else ():
                    yield partial(_problem, chunk)

    with ExitStack() as stack, ThreadPoolExecutor(threads or default_threads()) as pool:
        files = _Files(path, index, stack)
        for name in index.files:
            try:
                files.open(name)
            except BrokenCheckpoint as error:
                problems[str(error)] = None
        for problem in stack.enter_context(closing(in_order(pool, jobs(files)))):
            if problem:
                problems[problem] = None
    return list(problems)


@dataclass(frozen=True)
class _Chunk:
    """Bytes of one box: where they are in a file, where they go in the box, and what they should sum to."""

    where: str
    fd: int
    start: int
    at: int
    size: int
    crc32: str


class _Files:
    """The files of one checkpoint, opened and checked when first needed, closed by ``stack``."""

    def __init__(self, path: Path, index: Index, stack: ExitStack) -> None:
        self.path, self.index, self.stack = path, index, stack
        self.opened: dict[str, tuple[int, dict[str, Any]]] = {}

    def open(self, name: str) -> tuple[int, dict[str, Any]]:
        if name not in self.opened:
            if name not in self.index.files:
                raise BrokenCheckpoint(f"{self.path / 'index.json'}: says nothing about the file {name}")
            self.opened[name] = self.stack.enter_context(open_file(self.path / name, self.index.files[name]))
        return self.opened[name]

    def chunks(self, name: str, box: Box) -> list[_Chunk]:
        fd, header = self.open(box.file)
        entry = self.index.tensors[name]
        dtype, shape, start, stop = header.get(
            key(name, entry.shape, box.offset, box.shape), (None, None, 0, 0)
        )
        where = f"{self.path / box.file}: {name}"
        size, step = stop - start, self.index.chunk_bytes
        expected = math.prod(box.shape) * DTYPES[entry.dtype].itemsize
        if (dtype, shape, size) != (entry.dtype, box.shape, expected) or len(box.crc32) != max(
            1, -(-size // step)
        ):
            raise BrokenCheckpoint(f"{where} is not in this file as the index says")
        return [
            _Chunk(where, fd, start + i * step, i * step, min(step, size - i * step), crc)
            for i, crc in enumerate(box.crc32)
        ]


def _problem(chunk: _Chunk, into: memoryview | None = None) -> str:
    wrong = read_chunk(chunk.fd, chunk.start, chunk.size, chunk.crc32, into)
    return f"{chunk.where} {wrong}" if wrong else ""


def _read_into(chunk: _Chunk, box: memoryview) -> None:
    if problem := _problem(chunk, box[chunk.at : chunk.at + chunk.size]):
        raise BrokenCheckpoint(problem)


def _empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    # Fresh memory costs more to touch page by page than to fill: huge pages double the rate of loading.
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE_PAGES_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def _select(path: Path, names: list[str], patterns: Collection[str]) -> list[str]:
    for pattern in patterns:
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"{path}: select pattern {pattern!r} matches nothing; there are {_some(names)}")
    return [name for name in names if matches(name, patterns)]


def _check_like(path: Path, index: Index, names: list[str], expected: Mapping[str, Any]) -> None:
    differences = []
    if missing := [name for name in expected if name not in index.tensors]:
        differences.append(f"asked for but not there: {_some(missing)}")
    if extra := [name for name in names if name not in expected]:
        differences.append(f"there but not asked for: {_some(extra)}")
    for name in names:
        if name in expected:
            entry, leaf = index.tensors[name], expected[name]
            there, asked = (entry.dtype, entry.shape), (DTYPE_NAMES[leaf.dtype], tuple(leaf.shape))
            if there != asked:
                differences.append(f"{name} is {_spell(*there)}, asked for {_spell(*asked)}")
    if differences:
        shown = "\n  ".join(
            differences[:8] + ([f"… ({len(differences)} in all)"] if len(differences) > 8 else [])
        )
        raise ValueError(
            f"{path} does not hold the state asked for:\n  {shown}\n"
            'use the config it was saved with, or load a part of it, such as select=["params.*"]'
        )


def _spell(dtype: str, shape: tuple[int, ...]) -> str:
    return f"{dtype} {list(shape)}"


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
