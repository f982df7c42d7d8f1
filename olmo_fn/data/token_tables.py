"""Tables whose rows are lists of tokens (parquet, arrow, feather), as token files: converted once, into the cache."""

from __future__ import annotations

import gzip
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from olmo_fn.data.stores import is_remote
from olmo_fn.progress import progress

ENDINGS = (".parquet", ".pq", ".arrow", ".feather")
COLUMNS = ("input_ids", "tokens", "token_ids")


def is_table(path: str) -> bool:
    """Whether ``path`` has the ending of a table."""
    return path.lower().endswith(ENDINGS)


def converted(path: str, dtype: str, cache: Path, show: bool = True) -> str:
    """The path of a token file with the rows of the table at ``path``, one behind the other, in the folder ``cache``.

    Beside it lies a ``.csv.gz`` with where each row begins and ends, for ``--data.boundaries metadata``. ValueError if the
    table has no column of lists of integers (input_ids, tokens, token_ids), or one that ``dtype`` cannot hold.
    """
    if is_remote(path):
        raise ValueError(f"{path} is a table, and these are read from a disk alone; copy it there, or make token files of it")
    stat = os.stat(path)
    what = os.path.abspath(path), stat.st_size, stat.st_mtime_ns, dtype
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    target = cache / f"{Path(path).stem}-{key}.npy"
    bounds = target.with_suffix(".csv.gz")
    if target.is_file() and bounds.is_file():
        return str(target)
    cache.mkdir(parents=True, exist_ok=True)
    drafts = [part.with_name(f"{part.name}.{os.getpid()}.draft") for part in (target, bounds)]
    at, most = 0, int(np.iinfo(dtype).max)
    with (
        _batches(path) as (total, batches),
        progress(f"reading {Path(path).name}", total, show) as advance,
        open(drafts[0], "wb") as tokens,
        gzip.open(drafts[1], "wt") as rows,
    ):
        for values, lengths in batches:
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= most:
                raise ValueError(f"{path!r} has the id {int(values.max())}, which {dtype} cannot hold; give --data.dtype")
            values.astype(np.dtype(dtype).newbyteorder("<")).tofile(tokens)
            for length in lengths.tolist():
                rows.write(f"{at},{at + length}\n")
                at += length
            advance(len(lengths))
    for draft, final in zip(drafts, (target, bounds), strict=True):
        draft.replace(final)
    return str(target)


@contextmanager
def _batches(path: str) -> Iterator[tuple[int, Iterator[tuple[np.ndarray, np.ndarray]]]]:
    """The number of rows, and of each batch of them all values and the lengths."""
    try:
        import pyarrow as arrow
        from pyarrow import ipc, parquet
    except ImportError:
        raise ValueError(f"reading {path!r} needs pyarrow: pip install 'olmo-fn[parquet]'") from None
    try:
        if path.lower().endswith((".parquet", ".pq")):
            with parquet.ParquetFile(path) as file:
                name = _column(file.schema_arrow, path)
                yield (
                    file.metadata.num_rows,
                    map(_values, (batch.column(0) for batch in file.iter_batches(4096, columns=[name]))),
                )
            return
        with arrow.memory_map(path) as source:
            try:
                reader = ipc.open_file(source)
                batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
            except arrow.ArrowInvalid:  # as Hugging Face datasets writes it
                source.seek(0)
                reader = ipc.open_stream(source)
                batches = list(reader)
            name = _column(reader.schema, path)
            yield sum(batch.num_rows for batch in batches), (_values(batch.column(name)) for batch in batches)
    except (arrow.ArrowException, OSError) as error:
        raise ValueError(f"{path!r} is no table that can be read: {error}") from None


def _column(schema: Any, path: str) -> str:
    import pyarrow as arrow

    for name in COLUMNS:
        index = schema.get_field_index(name)
        if index >= 0:
            kind = schema.field(index).type
            if (arrow.types.is_list(kind) or arrow.types.is_large_list(kind)) and arrow.types.is_integer(kind.value_type):
                return name
    raise ValueError(
        f"{path!r} has no column of lists of tokens ({', '.join(COLUMNS)}), but {', '.join(schema.names)}; text is tokenized "
        f"first: olmo-fn tokenize {path} --output tokens"
    )


def _values(column: Any) -> tuple[np.ndarray, np.ndarray]:
    return column.flatten().to_numpy(zero_copy_only=False), np.diff(column.offsets.to_numpy())
