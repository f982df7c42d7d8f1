"""Token files: headerless little-endian unsigned integers, as OLMo-core reads them.

A `TokenFile` is a value (path, type, size, time of change); `read_tokens` reads a part of it. Only the most recently used
files stay open, so that a mix of 50,000 files does not run out of file descriptors.
"""

from __future__ import annotations

import codecs
import glob
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from olmo_fn.data.stores import PAGE, Remote, head, is_remote, listed

Dtype: TypeAlias = Literal["auto", "uint8", "uint16", "uint32", "uint64"]

SIZES = {"uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8}
SCAN_BYTES = 2 << 30  # what `check_vocab` reads at most: a second or two
CHUNK = 1 << 22
CHECKED = 1 << 12
HELDOUT_FILE = "heldout.npy"
CONTROL = bytes({*range(32)} - {*b"\t\n\r\f"})
TEXT = (".txt", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".html", ".xml", ".parquet", ".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class TokenFile:
    """A checked file of ``num_tokens`` integers of ``dtype`` (``bool`` for a label mask)."""

    path: str
    dtype: str
    num_tokens: int
    mtime_ns: int
    remote: Remote | None = None
    """Where it is, if it is on no disk of this machine."""
    header: int = 0
    """Bytes before the first token."""


def smallest_dtype(vocab_size: int) -> str:
    """The smallest unsigned type that holds every id below ``vocab_size``, OLMo-core's choice.

    >>> smallest_dtype(256), smallest_dtype(257), smallest_dtype(100_278)
    ('uint8', 'uint16', 'uint32')
    """
    return next(name for name, size in SIZES.items() if vocab_size <= 256**size)


def matches(pattern: str) -> list[str]:
    """The files that ``pattern`` names, sorted: a file or a glob, whose folder is taken literally as far as it is there."""
    path = Path(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [str(path)]
    folder = next((parent for parent in path.parents if os.path.isdir(parent)), Path())
    found = (str(folder / name) for name in glob.glob(str(path.relative_to(folder)), root_dir=folder, recursive=True))
    return sorted(name for name in found if os.path.isfile(name))


def expand(patterns: Iterable[str], usual: str = "part-*.npy") -> tuple[str, ...]:
    """Paths of token files of ``patterns``, in order, the matches of each sorted. ValueError for a pattern without a file.

    ``usual``: what the files are called in a folder of the tokenizing command.

    >>> expand(["/no/such/*.npy"])
    Traceback (most recent call last):
    ValueError: no token file matches '/no/such/*.npy'
    """
    paths: list[str] = []
    for pattern in patterns:
        if is_remote(pattern):
            if not (found := listed(pattern)):
                raise ValueError(f"no token file matches {pattern!r}")
            paths += found
            continue
        full = Path(os.path.expanduser(pattern))
        if os.path.isdir(full):
            raise ValueError(f"{pattern!r} is a folder; {_inside(full, usual)}")
        if not (found := matches(pattern)):
            here = "" if full.is_absolute() else f" (from {Path.cwd()})"
            what = f"{pattern!r} is not a regular file" if os.path.exists(full) else f"no token file matches {pattern!r}{here}"
            raise ValueError(what)
        paths += found
    return tuple(paths)


def _inside(folder: Path, usual: str) -> str:
    """What to type for the token files in a folder."""
    inside = Path(glob.escape(str(folder)))
    if matches(str(inside / usual)):
        return f"name the token files in it: {shlex.quote(str(inside / usual))}"
    names = [shlex.quote(path) for path in matches(str(inside / "*.npy")) if Path(path).name != HELDOUT_FILE]
    if not names:
        return f"no .npy file to train on is in it; text is tokenized first: {tokenize_command(folder)}"
    return f"name the token files in it: {' '.join(names[:3])}{' …' * (len(names) > 3)}"


def tokenize_command(path: str | Path) -> str:
    """What to type for text that is given in the place of token files."""
    return f"olmo-fn tokenize {shlex.quote(str(path))} --output tokens"


def open_tokens(path: str, dtype: str, cache: Path | None = None, limit: int = 0) -> TokenFile:
    """The token file at ``path``, of ``dtype`` (uint8, ... or bool); pages of one elsewhere are kept in the folder ``cache``.

    A NumPy header, of one row of such a type, is passed over. ValueError when the file is missing or empty, or has a size that
    is not of ``dtype``.
    """
    size, remote, mtime = 1 if dtype == "bool" else SIZES[dtype], None, 0
    try:
        if is_remote(path):
            remote = head(path, cache, limit)
            length, beginning = remote.size, remote.read(0, 1024)
        else:
            stat = Path(path).stat()
            length, mtime = stat.st_size, stat.st_mtime_ns
            with open(path, "rb") as file:
                beginning = file.read(1024)
    except OSError as e:
        raise ValueError(f"cannot read the token file {path!r}: {e.strerror}") from None
    if not beginning:
        raise ValueError(f"the token file {path!r} is empty; write one with olmo-fn tokenize")
    if _is_text(path, beginning, size):
        raise ValueError(f"{path!r} is text, and no file of tokens; tokenize it first: {tokenize_command(path)}")
    header = _header(path, beginning, dtype) if beginning.startswith(b"\x93NUMPY") else 0
    length -= header
    if length % size:
        fits = [name for name, s in SIZES.items() if length % s == 0]
        raise ValueError(
            f"{path!r} has {length:,} bytes, not a multiple of the {size} bytes of {dtype}; "
            f"it may be cut short or of another type (--data.dtype {' or '.join(fits)} would fit)"
        )
    return TokenFile(path, dtype, length // size, mtime, remote, header)


def _header(path: str, beginning: bytes, dtype: str) -> int:
    """The bytes of a NumPy header; ValueError if the array is no row of ``dtype``."""
    file = BytesIO(beginning)
    try:
        version = np.lib.format.read_magic(file)
        shape, _, found = (np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0)(
            file
        )
    except ValueError as error:
        raise ValueError(f"{path!r} has a NumPy header that cannot be read: {error}") from None
    if len(shape) != 1 or found.newbyteorder("<") != np.dtype(dtype).newbyteorder("<") or found.byteorder == ">":
        raise ValueError(
            f"{path!r} has a NumPy header, of an array {shape} of {found}, and not of a row of {dtype}; give --data.dtype, or "
            f"rewrite it: np.load({path!r}).astype({dtype!r}).tofile(...)"
        )
    return file.tell()


def looks_like_text(head: bytes) -> bool:
    """Whether a file that begins so is UTF-8 text.

    >>> looks_like_text("é".encode()[:1]), looks_like_text(b"\\x89PNG"), looks_like_text("a".encode("utf-16"))
    (True, False, False)
    """
    try:
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False


def _is_text(path: str, head: bytes, size: int) -> bool:
    """By its ending; or by its beginning, unless tokens are single bytes: those may be letters."""
    printable = len(head) >= 64 and head.translate(None, CONTROL) == head and looks_like_text(head)
    return path.lower().endswith(TEXT) or (size > 1 and printable)


def check_type(file: TokenFile) -> None:
    """ValueError if the beginning of the file looks as a file of another type would, read as this one's."""
    tokens = read_tokens(file, 0, CHECKED)
    for name, size in reversed(SIZES.items()):
        width = size // tokens.itemsize
        if width < 2 or len(tokens) < 64 * width or file.num_tokens % width:
            continue
        columns = tokens[: len(tokens) // width * width].reshape(-1, width)
        if columns[:, 0].any() and not columns[:, 1:].any():
            raise ValueError(
                f"{file.path!r}, read as {file.dtype}, is 0 in {width - 1} of every {width} tokens, as {name} would be; "
                f"say which it is: --data.dtype {name}, or --data.dtype {file.dtype}"
            )


def open_masks(
    paths: Sequence[str], files: Sequence[TokenFile], cache: Path | None = None, limit: int = 0
) -> tuple[TokenFile, ...]:
    """The label masks ``paths`` of ``files``; ``cache`` as `open_tokens` has it. ValueError when they do not go together."""
    if paths and len(paths) != len(files):
        raise ValueError(f"{len(paths)} label mask files for {len(files)} token files; give one for each, in their order")
    masks = tuple(open_tokens(path, "bool", cache, limit) for path in paths)
    for mask, file in zip(masks, files, strict=False):
        if mask.num_tokens != file.num_tokens:
            raise ValueError(
                f"the label mask {mask.path!r} has {mask.num_tokens:,} entries, {file.path!r} has {file.num_tokens:,} tokens"
            )
        _check_mask(mask)
    return masks


def _check_mask(mask: TokenFile) -> None:
    """ValueError for what is no mask of labels, or masks all of them."""
    for start in range(0, mask.num_tokens, CHUNK):
        part = read_tokens(mask, start, start + CHUNK).view(np.uint8)
        if part.max() > 1:
            offset = start + int(np.argmax(part > 1))
            raise ValueError(f"the label mask {mask.path!r} has {part.max()} at offset {offset:,}; it must hold bytes 0 and 1")
        if part.any():
            return
    raise ValueError(f"the label mask {mask.path!r} is false throughout: nothing of it is in the loss; leave both files out")


class _Open(FileIO):
    """A file that is closed when nobody reads it any more."""

    def __del__(self) -> None:
        self.close()


@lru_cache(maxsize=256)
def _opened(file: TokenFile) -> FileIO:
    return _Open(file.path)


def read_tokens(file: TokenFile, start: int = 0, stop: int | None = None) -> np.ndarray:
    """The tokens from ``start`` to before ``stop``: (stop - start,) of the file's dtype.

    ValueError if the file has become shorter since it was opened. A memory map of it would end the process without a word.
    """
    tokens = np.empty((file.num_tokens if stop is None else min(stop, file.num_tokens)) - start, file.dtype)
    data, offset, done = tokens.view(np.uint8).data, file.header + start * tokens.itemsize, 0
    if file.remote:
        data[:] = file.remote.read(offset, offset + len(data))
        return tokens if sys.byteorder == "little" else tokens.byteswap()
    try:
        opened = _opened(file)
        while done < len(data) and (count := os.preadv(opened.fileno(), [data[done:]], offset + done)):
            done += count
    except OSError as e:
        raise ValueError(f"cannot read the token file {file.path!r}: {e.strerror}") from None
    if done < len(data):
        raise ValueError(
            f"the token file {file.path!r} has become shorter: it had {file.num_tokens:,} tokens when it was opened, and now "
            f"ends before token {start + -(-done // tokens.itemsize):,}; put it back"
        )
    return tokens if sys.byteorder == "little" else tokens.byteswap()


def read_rows(file: TokenFile, starts: Sequence[int], rows: np.ndarray, at: Sequence[int]) -> None:
    """Read T tokens from each of ``starts`` on, the i-th into the row ``at[i]`` of the array ``rows`` (B, T).

    ``rows`` are of the file's dtype or a wider one. ValueError as `read_tokens` has.
    """
    length, width = rows.shape[1], np.dtype(file.dtype).itemsize
    if file.remote:
        places = [(file.header + start * width, file.header + (start + length) * width) for start in starts]
        for i, found in zip(at, file.remote.read_all(places), strict=True):
            rows[i] = np.frombuffer(found, np.dtype(file.dtype).newbyteorder("<"))
        return
    if rows.dtype != file.dtype or sys.byteorder == "big":
        for i, start in zip(at, starts, strict=True):
            rows[i] = read_tokens(file, start, start + length)
        return
    try:
        opened, data, size = _opened(file).fileno(), rows.reshape(-1).view(np.uint8).data, length * width
        for i, start in zip(at, starts, strict=True):
            if os.preadv(opened, [data[i * size : (i + 1) * size]], file.header + start * width) != size:
                rows[i] = read_tokens(file, start, start + length)  # or says what is wrong
    except OSError as e:
        raise ValueError(f"cannot read the token file {file.path!r}: {e.strerror}") from None


def check_vocab(files: Iterable[TokenFile], vocab_size: int, scan_bytes: int = SCAN_BYTES) -> None:
    """ValueError naming file, offset and value of the first token that is not below ``vocab_size``.

    Reads about ``scan_bytes`` at most, the first part of every file, and of a file elsewhere what came with its beginning;
    `Instances.read` checks the rest when it is used.
    """
    files = [f for f in files if vocab_size < 256 ** SIZES[f.dtype]]
    total = sum(f.num_tokens * SIZES[f.dtype] for f in files if not f.remote)
    for file in files:
        stop = file.num_tokens if total <= scan_bytes else -(-file.num_tokens * scan_bytes // total)
        if file.remote:
            stop = min(file.num_tokens, (PAGE - file.header) // SIZES[file.dtype])
        for start in range(0, stop, CHUNK):
            chunk = read_tokens(file, start, min(start + CHUNK, stop))
            if chunk.max() >= vocab_size:
                offset = start + int(np.argmax(chunk >= vocab_size))
                raise vocab_error(file, offset, vocab_size)


def vocab_error(file: TokenFile, offset: int, vocab_size: int) -> ValueError:
    """The error for the token at ``offset`` of ``file``."""
    token = int(read_tokens(file, offset, offset + 1)[0])
    return ValueError(
        f"token {token} at offset {offset:,} of {file.path!r} (read as {file.dtype}) is "
        f"not below {vocab_size:,}, the vocabulary of the model or the tokenizer; use a larger "
        f"--model.vocab-size, the tokenizer of the data (--data.tokenizer), or --data.dtype if the file is of another type"
    )
