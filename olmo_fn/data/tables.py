"""Rows of tables, as records by the names of their columns: parquet, arrow (files and streams), csv and tsv."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from itertools import islice
from typing import Any, NamedTuple

from olmo_fn.data.inputs import PARQUET, endings, opened

CELL_BYTES = 1 << 26


class Table(NamedTuple):
    """A table on disk that is read in ``groups`` of rows: parquet's row groups, arrow's record batches."""

    schema: Any
    groups: int
    word: str
    reader: Any
    streamed: int = 0
    """Rows of a stream."""

    @property
    def rows(self) -> int:
        """How many there are. Of an arrow file every batch is looked at for that."""
        if self.word == "row group":
            return int(self.reader.metadata.num_rows)
        if hasattr(self.reader, "get_batch"):
            return sum(self.reader.get_batch(i).num_rows for i in range(self.groups))
        return self.streamed

    @property
    def names(self) -> list[str]:
        """Of the columns."""
        return list(self.schema.names)

    def column(self, group: int, name: str) -> list[Any]:
        """The values of one column in one group. One group is read each time that a table is opened."""
        if self.word == "row group":
            return list(self.reader.read_row_group(group, columns=[name]).column(name).to_pylist())
        if hasattr(self.reader, "get_batch"):
            batch = self.reader.get_batch(group)
        else:  # a stream; it is mapped into memory, so that what is passed over is not read
            batch = next(islice(self.reader, group, None))
        return list(_checked(batch, name).to_pylist())

    def arrays(self, name: str) -> Iterator[Any]:
        """All values of one column, in arrays of pyarrow, one behind the other."""
        if self.word == "row group":
            batches = self.reader.iter_batches(4096, columns=[name])
        elif hasattr(self.reader, "get_batch"):
            batches = map(self.reader.get_batch, range(self.groups))
        else:
            batches = self.reader
        return (_checked(batch, name) for batch in batches)


def _checked(batch: Any, name: str) -> Any:
    column = batch.column(batch.schema.get_field_index(name))
    column.validate(full=True)  # or what is damaged might be read beyond its end
    return column


@contextmanager
def table(path: str) -> Iterator[Table]:
    """The parquet or arrow file, while whatever is wrong with it is one error."""
    ending = endings(path)[0]
    parquet_file = ending in PARQUET
    try:
        import pyarrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise ValueError(f"reading {ending} needs pyarrow: pip install 'olmo-fn[parquet]'") from None
    try:
        if parquet_file:
            with parquet.ParquetFile(path) as file:
                yield Table(file.schema_arrow, file.num_row_groups, "row group", file)
            return
        with pyarrow.memory_map(path) as mapped:
            if mapped.read(6) == b"ARROW1":
                with ipc.open_file(mapped) as file:
                    yield Table(file.schema, file.num_record_batches, "record batch", file)
                return
            mapped.seek(0)
            with ipc.open_stream(mapped) as stream:
                counts = [batch.num_rows for batch in stream]
            mapped.seek(0)
            with ipc.open_stream(mapped) as stream:
                yield Table(stream.schema, len(counts), "record batch", stream, sum(counts))
    except (pyarrow.ArrowException, OSError, UnicodeError) as e:
        kind = "a parquet file" if parquet_file else "an arrow or feather file"
        raise ValueError(f"{path!r} is not {kind} that can be read: {e}") from None


def csv_rows(path: str) -> Iterator[tuple[int, dict[str, str], int, int]]:
    """Of each row of a .csv or .tsv with a header: its first line, its record, its length and how much of the file is read.

    ValueError, with the line, for a row of another length than the header.
    """
    csv.field_size_limit(CELL_BYTES)
    line = 1
    try:
        with opened(path) as (file, raw), TextIOWrapper(file, "utf-8-sig", newline="") as text:
            rows = csv.reader(text, delimiter="\t" if endings(path)[0] == ".tsv" else ",", strict=True)
            names = next(rows, [])
            if len({*names}) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise ValueError(f"two columns are {twice!r}; the first line names the columns")
            line = rows.line_num + 1
            for row in rows:
                if row:
                    if len(row) != len(names):
                        raise ValueError(
                            f"{len(row)} values, and the header has {len(names)}; a value with a comma is in quotes"
                        )
                    yield line, dict(zip(names, row, strict=True)), sum(map(len, row)), raw.tell()
                line = rows.line_num + 1
    except GeneratorExit:
        raise
    except Exception as e:  # each decompressor has errors of its own
        raise ValueError(f"cannot read {path!r} line {line}: {e}") from None
