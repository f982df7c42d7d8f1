"""Documents out of text, jsonl, jsonl.gz and parquet files.

They come in chunks that are the same however many processes work on them.
"""

from __future__ import annotations

import glob
import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHUNK_BYTES = 1 << 20
LINES = (".jsonl", ".jsonl.gz", ".json.gz")


@dataclass(frozen=True)
class Chunk:
    """Some documents: text files, lines of one jsonl file, or a row group of one parquet file."""

    paths: tuple[str, ...]
    size: int
    """Its part of the input files' bytes on disk, for progress."""
    lines: tuple[bytes, ...] = ()
    first: int = 0
    """Number of the first line (from 1), or of the row group."""


def expand(inputs: Iterable[str]) -> tuple[str, ...]:
    """The files that ``inputs`` name, sorted, each once: files, globs, and folders with everything in them.

    Hidden files are left out of folders. ValueError when an input matches no file.
    """
    files: set[str] = set()
    for name in inputs:
        path = Path(name).expanduser()
        if path.is_dir():
            found = [
                str(p)
                for p in path.rglob("*")
                if p.is_file() and not any(part.startswith(".") for part in p.relative_to(path).parts)
            ]
        else:
            found = [str(path)] if path.is_file() else [f for f in glob.glob(str(path), recursive=True) if Path(f).is_file()]
        if not found:
            what = "the folder has no files" if path.is_dir() else "no such file, and no file matches it as a pattern"
            raise ValueError(f"input {name!r}: {what}")
        files.update(found)
    if not files:
        raise ValueError("no input; name the files, globs or folders to tokenize")
    return tuple(sorted(files))


def chunks(files: Iterable[str], size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """``files`` in chunks of about ``size`` bytes, in order."""
    texts: list[str] = []
    total = 0
    for path in files:
        if path.endswith(LINES):
            yield from _line_chunks(path, size)
        elif path.endswith(".parquet"):
            yield from _row_groups(path)
        else:
            texts.append(path)
            total += Path(path).stat().st_size
            if total >= size:
                yield Chunk(tuple(texts), total)
                texts, total = [], 0
    if texts:
        yield Chunk(tuple(texts), total)


def documents(chunk: Chunk, field: str) -> Iterator[str]:
    """The texts of ``chunk``, in jsonl and parquet those in ``field``. ValueError names the file and the
    line."""
    path = chunk.paths[0]
    if chunk.lines:
        for number, line in enumerate(chunk.lines, chunk.first):
            if not line.isspace():
                yield _parse(line, field, f"{path!r} line {number}")
    elif path.endswith(".parquet"):
        file = _parquet(path)
        if field not in file.schema_arrow.names:
            there = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path!r} has no column {field!r}; there is: {there}; name the column with --text-field")
        column = file.read_row_group(chunk.first, columns=[field]).column(field)
        for number, text in enumerate(column.to_pylist()):
            if not isinstance(text, str):
                raise ValueError(f"{path!r} row group {chunk.first} row {number}: {field!r} is not text but {text!r:.40}")
            yield text
    else:
        for name in chunk.paths:
            yield _decode(Path(name).read_bytes(), repr(name))


def _parse(line: bytes, field: str, where: str) -> str:
    try:
        record = json.loads(_decode(line, where))
    except json.JSONDecodeError as e:
        raise ValueError(f"{where} is not JSON: {e}") from None
    text = record.get(field) if isinstance(record, dict) else None
    if not isinstance(text, str):
        there = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text in {field!r}; there is: {there}; name the field with --text-field")
    # JSON can escape half a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(
            f"{where} is not UTF-8 text (byte {e.start}); name only text files, for example 'folder/**/*.txt'"
        ) from None


def _line_chunks(path: str, size: int) -> Iterator[Chunk]:
    with open(path, "rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        lines: list[bytes] = []
        total = read = 0
        first = 1
        try:
            for number, line in enumerate(file, 1):
                lines.append(line)
                total += len(line)
                if total >= size:
                    yield Chunk((path,), raw.tell() - read, tuple(lines), first)
                    lines, total, read, first = [], 0, raw.tell(), number + 1
        except (OSError, EOFError) as e:
            raise ValueError(f"cannot read {path!r} after line {first + len(lines) - 1}: {e}") from None
        if lines:
            yield Chunk((path,), raw.tell() - read, tuple(lines), first)


def _row_groups(path: str) -> Iterator[Chunk]:
    groups, size = _parquet(path).num_row_groups, Path(path).stat().st_size
    for group in range(groups):
        yield Chunk((path,), size * (group + 1) // groups - size * group // groups, first=group)


def _parquet(path: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install 'olmo-fn[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as e:
        raise ValueError(f"{path!r} is not a parquet file: {e}") from None
