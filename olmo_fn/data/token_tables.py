"""Tables whose rows are lists of tokens (parquet, arrow, feather), as token files: converted once, into the cache."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from olmo_fn.data.inputs import ARROW, PARQUET, endings
from olmo_fn.data.stores import is_remote
from olmo_fn.data.tables import table
from olmo_fn.files import filling
from olmo_fn.progress import progress

COLUMNS = ("input_ids", "tokens", "token_ids")


def is_table(path: str) -> bool:
    """Whether ``path`` has the ending of a table."""
    return endings(path)[0] in PARQUET + ARROW


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
    at, most = 0, int(np.iinfo(dtype).max)
    with (
        table(path) as found,
        progress(f"reading {Path(path).name}", found.rows, show) as advance,
        filling(target) as tokens,
        filling(bounds) as packed,
        gzip.open(packed, "wt") as rows,
    ):
        for lists in found.arrays(_column(found.schema, path)):
            values, lengths = lists.flatten().to_numpy(zero_copy_only=False), np.diff(lists.offsets.to_numpy())
            if len(values) and not 0 <= int(values.min()) <= int(values.max()) <= most:
                raise ValueError(f"{path!r} has the id {int(values.max())}, which {dtype} cannot hold; give --data.dtype")
            tokens.write(values.astype(np.dtype(dtype).newbyteorder("<")).tobytes())
            for length in lengths.tolist():
                rows.write(f"{at},{at + length}\n")
                at += length
            advance(len(lengths))
    return str(target)


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
