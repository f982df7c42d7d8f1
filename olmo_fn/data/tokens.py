"""Token files: headerless little-endian unsigned integers, memory-mapped, as OLMo-core reads them.

A `TokenFile` is a value (path, type, size, time of change); `view` maps it. Only the most recently used maps stay open, so
that a mix of 50,000 files does not run out of file descriptors.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

Dtype: TypeAlias = Literal["auto", "uint8", "uint16", "uint32", "uint64"]

SIZES = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}
SCAN_BYTES = 2 << 30  # what `check_vocab` reads at most: a second or two
CHUNK = 1 << 22


@dataclass(frozen=True)
class TokenFile:
    """A checked file of ``num_tokens`` integers of ``dtype`` (``bool`` for a label mask)."""

    path: str
    dtype: str
    num_tokens: int
    mtime_ns: int


def smallest_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id below ``vocab_size``, OLMo-core's choice.

    >>> smallest_dtype(256), smallest_dtype(257), smallest_dtype(100_278)
    ('uint8', 'uint16', 'uint32')
    """
    return next(name for name, size in SIZES.items() if vocab_size <= 256**size)


def matches(pattern: str) -> list[str]:
    """The files that ``pattern`` names, sorted: a file, a glob, or a folder with everything in it that is not hidden."""
    path = Path(pattern).expanduser()
    if path.is_dir():
        inside = (p for p in path.rglob("*") if not any(part.startswith(".") for part in p.relative_to(path).parts))
        return sorted(str(p) for p in inside if p.is_file())
    return [str(path)] if path.is_file() else sorted(f for f in glob.glob(str(path), recursive=True) if Path(f).is_file())


def expand(patterns: Iterable[str]) -> tuple[str, ...]:
    """Paths of token files of ``patterns``, in order, the matches of each sorted. ValueError for a pattern without a file.

    >>> expand(["/no/such/*.npy"])
    Traceback (most recent call last):
    ValueError: no token file matches '/no/such/*.npy'
    """
    paths: list[str] = []
    for pattern in patterns:
        full = Path(pattern).expanduser()
        if full.is_dir():
            raise ValueError(f"{pattern!r} is a folder; name the token files in it: '{full}/*.npy'")
        if not (found := matches(pattern)):
            here = "" if full.is_absolute() else f" (from {Path.cwd()})"
            raise ValueError(f"no token file matches {pattern!r}{here}")
        paths += found
    return tuple(paths)


def open_tokens(path: str, dtype: str) -> TokenFile:
    """The token file at ``path``, of ``dtype`` (uint8, ... or bool).

    ValueError when it is missing or empty, has a size that is not of ``dtype``, or a NumPy header.
    """
    size = 1 if dtype == "bool" else SIZES[dtype]
    try:
        stat = Path(path).stat()
        with open(path, "rb") as file:
            head = file.read(6)
    except OSError as e:
        raise ValueError(f"cannot read the token file {path!r}: {e.strerror}") from None
    if not head:
        raise ValueError(f"the token file {path!r} is empty; write one with olmo-fn tokenize")
    if head == b"\x93NUMPY":
        raise ValueError(f"{path!r} has a NumPy header, token files have none; rewrite it: np.load({path!r}).tofile(...)")
    if stat.st_size % size:
        fits = [name for name, s in SIZES.items() if stat.st_size % s == 0]
        raise ValueError(
            f"{path!r} has {stat.st_size:,} bytes, not a multiple of the {size} bytes of {dtype}; "
            f"it may be cut short or of another type (--data.dtype {' or '.join(fits)} would fit)"
        )
    return TokenFile(path, dtype, stat.st_size // size, stat.st_mtime_ns)


def open_masks(paths: Sequence[str], files: Sequence[TokenFile]) -> tuple[TokenFile, ...]:
    """The label masks ``paths`` of ``files``. ValueError when they do not go together."""
    if paths and len(paths) != len(files):
        raise ValueError(f"{len(paths)} label mask files for {len(files)} token files; give one for each, in their order")
    masks = tuple(open_tokens(path, "bool") for path in paths)
    for mask, file in zip(masks, files, strict=False):
        if mask.num_tokens != file.num_tokens:
            raise ValueError(
                f"the label mask {mask.path!r} has {mask.num_tokens:,} entries, {file.path!r} has {file.num_tokens:,} tokens"
            )
    return masks


@lru_cache(maxsize=256)
def view(file: TokenFile) -> np.ndarray:
    """The file's tokens, read-only and not in memory: (num_tokens,) of its dtype."""
    dtype = np.dtype(file.dtype).newbyteorder("<")
    return np.memmap(file.path, dtype=dtype, mode="r", shape=(file.num_tokens,))


def check_vocab(files: Iterable[TokenFile], vocab_size: int, scan_bytes: int = SCAN_BYTES) -> None:
    """ValueError naming file, offset and value of the first token that is not below ``vocab_size``.

    Reads about ``scan_bytes`` at most, the first part of every file; `Instances.read` checks the rest when it is used.
    """
    files = [f for f in files if vocab_size < 256 ** SIZES[f.dtype]]
    total = sum(f.num_tokens * SIZES[f.dtype] for f in files)
    for file in files:
        tokens = view(file)
        stop = file.num_tokens if total <= scan_bytes else -(-file.num_tokens * scan_bytes // total)
        for start in range(0, stop, CHUNK):
            chunk = tokens[start : min(start + CHUNK, stop)]
            if chunk.max() >= vocab_size:
                offset = start + int(np.argmax(chunk >= vocab_size))
                raise vocab_error(file, offset, vocab_size)


def vocab_error(file: TokenFile, offset: int, vocab_size: int) -> ValueError:
    """The error for the token at ``offset`` of ``file``."""
    return ValueError(
        f"token {int(view(file)[offset])} at offset {offset:,} of {file.path!r} (read as {file.dtype}) is "
        f"not below {vocab_size:,}, the vocabulary of the model or the tokenizer; use a larger vocab_size, "
        f"the tokenizer of the data, or --data.dtype if the file is of another type"
    )
