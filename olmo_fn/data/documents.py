"""Documents out of text, JSON lines and tables.

They come in chunks that are the same however many processes work on them.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from olmo_fn.data.inputs import HEAD, kind, opened
from olmo_fn.data.tables import csv_rows, table

CHUNK_BYTES = 1 << 20
LINE_BYTES = 1 << 26  # tokenizing needs several times as much memory
FILE_BYTES = 1 << 28


@dataclass(frozen=True)
class Chunk:
    """Some documents: text files, lines or rows of one file, or a group of rows of one table."""

    paths: tuple[str, ...]
    size: int
    """Its part of the input files' bytes on disk, for progress."""
    lines: tuple[bytes, ...] = ()
    first: int = 0
    """Number of the first line (from 1), or of the group of rows."""
    rows: tuple[tuple[int, dict[str, str]], ...] = ()
    """Rows of a csv, each with its first line."""

    @property
    def whole(self) -> bool:
        """Whether its documents are text files."""
        return not self.lines and not self.rows and kind(self.paths[0]) == "text"


def chunks(files: Iterable[str], size: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """``files`` in chunks of about ``size`` bytes, in order."""
    texts: list[str] = []
    total = 0
    for path in files:
        if kind(path) == "lines":
            yield from _line_chunks(path, size)
        elif kind(path) == "rows":
            with table(path) as found:
                groups, bytes_on_disk = found.groups, Path(path).stat().st_size
            for i in range(groups):
                yield Chunk((path,), bytes_on_disk * (i + 1) // groups - bytes_on_disk * i // groups, first=i)
        elif kind(path) == "csv":
            yield from _csv_chunks(path, size)
        else:
            texts.append(path)
            total += Path(path).stat().st_size
            if total >= size:
                yield Chunk(tuple(texts), total)
                texts, total = [], 0
    if texts:
        yield Chunk(tuple(texts), total)


def documents(chunk: Chunk, field: str, skip_missing: bool = False) -> Iterator[str | None]:
    """The texts of ``chunk``, in lines and rows those in ``field``, such as ``text`` or ``data.text``.

    One without a text there is None with ``skip_missing``, and else a ValueError that names the file and the line.
    """
    for where, record in records(chunk, field):
        yield record if chunk.whole else text_of(record, field, where, skip_missing)


def records(chunk: Chunk, field: str) -> Iterator[tuple[str, Any]]:
    """What each document of ``chunk`` is in, and where that is: the object of a line; of a row at least the column that
    ``field`` is in; a text file's text.
    """
    path = chunk.paths[0]
    if chunk.lines:
        for number, line in enumerate(chunk.lines, chunk.first):
            if not line.isspace():
                where = f"{path!r} line {number}"
                yield where, _parse(line, where)
    elif chunk.rows:
        yield from ((f"{path!r} line {number}", record) for number, record in chunk.rows)
    elif kind(path) == "rows":
        with table(path) as found:
            name = field if field in found.names else field.split(".")[0]
            if found.names.count(name) != 1:
                what = f"two columns {name!r}" if name in found.names else f"no column {field!r}"
                raise ValueError(f"{path!r} has {what}; there is: {', '.join(found.names)}; name the column with --text-field")
            values, word = found.column(chunk.first, name), found.word
        for number, value in enumerate(values):
            yield f"{path!r} {word} {chunk.first} row {number}", {name: value}
    else:
        for text_file in chunk.paths:
            yield repr(text_file), _read_text(text_file)


def text_of(record: Any, field: str, where: str, skip_missing: bool = False) -> str | None:
    """The text in ``field`` of ``record``, as `documents` says."""
    value, there = record, isinstance(record, dict)
    for name in [field] if there and field in record else field.split("."):
        there = there and isinstance(value, dict) and name in value
        value = value[name] if there else None
    if isinstance(value, str):
        # JSON can escape half a surrogate pair, which UTF-8 cannot hold.
        return value if value.isascii() else value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if skip_missing:
        return None
    if not isinstance(record, dict):
        hint = "`jq -c '.[]' FILE` writes the objects of a list so"
        raise ValueError(f"{where} is no JSON object but {type(record).__name__}; {hint}")
    if not there:
        found = ", ".join(
            name for key, x in record.items() for name in ([f"{key}.{inner}" for inner in x] if isinstance(x, dict) else [key])
        )
        what = f"has no text in {field!r}; there is: {found:.300}; name the field with --text-field"
    else:
        what = f"has no text in {field!r} but {'null' if value is None else type(value).__name__}"
    raise ValueError(f"{where} {what}; --skip-missing passes such documents over")


def _parse(line: bytes, where: str) -> Any:
    text = _decode(line.removeprefix(codecs.BOM_UTF8), where)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        hint = "a line is a whole object, as `jq -c . FILE` writes it"
        raise ValueError(f"{where} cannot be read as JSON: {str(e).split(';')[0]}; {hint}") from None


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        hint = "name only text files, for example 'folder/**/*.txt'"
        raise ValueError(f"{where} is not UTF-8 text (byte {e.start}); {hint}") from None


def _read_text(path: str) -> str:
    try:
        with opened(path) as (file, _):
            pieces = iter(lambda: file.read(CHUNK_BYTES), b"")
            data = b"".join(islice(pieces, FILE_BYTES // CHUNK_BYTES + 1))
    except Exception as e:  # each decompressor has errors of its own
        raise ValueError(f"cannot read {path!r}: {e}") from None
    if len(data) > FILE_BYTES:
        hint = "split it into documents, a JSON object a line"
        raise ValueError(f"{path!r} is one document of more than {FILE_BYTES:,} bytes; {hint}")
    if b"\0" in data[:HEAD]:
        raise ValueError(f"{path!r} is not UTF-8 text (it has NUL bytes); name only text files")
    return _decode(data, repr(path))


def _line_chunks(path: str, size: int) -> Iterator[Chunk]:
    first, position = 1, 0
    lines: list[bytes] = []
    total = 0
    try:
        with opened(path) as (file, raw):
            while line := file.readline(LINE_BYTES + 1):
                if len(line) > LINE_BYTES:
                    raise ValueError(f"the next has more than {LINE_BYTES:,} bytes; split it into documents")
                lines.append(line)
                total += len(line)
                if total > size:
                    yield Chunk((path,), raw.tell() - position, tuple(lines), first)
                    first, position, lines, total = first + len(lines), raw.tell(), [], 0
            if lines:
                yield Chunk((path,), raw.tell() - position, tuple(lines), first)
    except Exception as e:  # each decompressor has errors of its own
        raise ValueError(f"cannot read {path!r} after line {first + len(lines) - 1}: {e}") from None


def _csv_chunks(path: str, size: int) -> Iterator[Chunk]:
    rows: list[tuple[int, dict[str, str]]] = []
    total = position = read = 0
    for line, record, length, read in csv_rows(path):
        rows.append((line, record))
        total += length
        if total > size:
            yield Chunk((path,), read - position, rows=tuple(rows))
            rows, total, position = [], 0, read
    if rows:
        yield Chunk((path,), read - position, rows=tuple(rows))
