"""Documents out of text, jsonl, jsonl.gz and parquet files.

They come in chunks that are the same however many processes work on them.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_fn.data.tokens import matches

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
        if not (found := matches(name)):
            folder = Path(name).expanduser().is_dir()
            what = "the folder has no files" if folder else "no such file, and no file matches it as a pattern"
            raise ValueError(f"input {name!r}: {what}")
        files.update(found)
    return tuple(sorted(files))


def chunks(files: Iterable[str], size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """``files`` in chunks of about ``size`` bytes, in order."""
    texts: list[str] = []
    total = 0
    for path in files:
        if path.endswith(LINES):
            yield from _line_chunks(path, size)
        elif path.endswith(".parquet"):
            groups, bytes_on_disk = _parquet(path).num_row_groups, Path(path).stat().st_size
            for i in range(groups):
                yield Chunk((path,), bytes_on_disk * (i + 1) // groups - bytes_on_disk * i // groups, first=i)
        else:
            texts.append(path)
            total += Path(path).stat().st_size
            if total >= size:
                yield Chunk(tuple(texts), total)
                texts, total = [], 0
    if texts:
        yield Chunk(tuple(texts), total)


def documents(chunk: Chunk, field: str) -> Iterator[str]:
    """The texts of ``chunk``, in jsonl and parquet those in ``field``. ValueError names the file and the line."""
    path = chunk.paths[0]
    if chunk.lines:
        for number, line in enumerate(chunk.lines, chunk.first):
            if not line.isspace():
                yield _parse(line, field, f"{path!r} line {number}")
    elif path.endswith(".parquet"):
        file = _parquet(path)
        if field not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise ValueError(f"{path!r} has no column {field!r}; there is: {columns}; name the column with --text-field")
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
        names = ", ".join(record) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"{where} has no text in {field!r}; there is: {names}; name the field with --text-field")
    # JSON can escape half a surrogate pair, which UTF-8 cannot hold.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        hint = "name only text files, for example 'folder/**/*.txt'"
        raise ValueError(f"{where} is not UTF-8 text (byte {e.start}); {hint}") from None


def _line_chunks(path: str, size: int) -> Iterator[Chunk]:
    with open(path, "rb") as raw:
        file: Any = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        first, position = 1, 0
        try:
            while lines := file.readlines(size):  # whole lines of at least so many bytes
                yield Chunk((path,), raw.tell() - position, tuple(lines), first)
                first, position = first + len(lines), raw.tell()
        except (OSError, EOFError) as e:
            raise ValueError(f"cannot read {path!r} after line {first - 1}: {e}") from None


def _parquet(path: str) -> Any:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise ValueError("reading .parquet needs pyarrow: pip install 'olmo-fn[parquet]'") from None
    try:
        return parquet.ParquetFile(path)
    except ArrowException as e:
        raise ValueError(f"{path!r} is not a parquet file: {e}") from None
