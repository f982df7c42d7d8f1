"""Where the documents of a token file begin and end: found by the end-of-document token, or as written beside the file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import os
import zlib
from io import StringIO
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from olmo_fn.data.megatron import is_megatron, read_index
from olmo_fn.data.stores import NotShown, read_whole
from olmo_fn.data.tokens import CHUNK, TokenFile, read_tokens
from olmo_fn.files import filling

Boundaries: TypeAlias = Literal["eos", "metadata"]


def document_bounds(
    file: TokenFile, eos_id: int, bos_id: int | None = None, boundaries: Boundaries = "eos", cache: Path | None = None
) -> np.ndarray:
    """First token of each document of ``file`` and one past its last: (documents, 2) int64, in order.

    ``eos``: a document ends with ``eos_id``, and with ``bos_id`` given only where that follows, or the file ends. Tokens behind
    the last end are of no document, as in OLMo-core. ``metadata``: what the ``.csv.gz`` beside the file says, which dolma
    writes. What is found is kept in the folder ``cache``, so that a file is read through once.
    """
    if boundaries == "metadata":
        return _written(file)
    kept = cache and cache / f"{_key(file, eos_id, bos_id)}.npy"
    if kept and kept.is_file():
        found: np.ndarray = np.load(kept, mmap_mode="r")
        return found
    ends = np.concatenate([_ends(file, start, eos_id, bos_id) for start in range(0, file.num_tokens, CHUNK)])
    bounds = np.stack([np.concatenate([[0], ends[:-1]])[: len(ends)], ends], axis=1).astype(np.int64)
    if kept:
        with filling(kept) as out:
            np.save(out, bounds)
    return bounds


def fitting(bounds: np.ndarray, length: int, long: Literal["truncate", "fragment"]) -> np.ndarray:
    """The same documents, none longer than ``length``: longer ones are cut off there, or into several.

    >>> fitting(np.array([[0, 2], [2, 7]]), 2, "fragment").tolist()
    [[0, 2], [2, 4], [4, 6], [6, 7]]
    >>> fitting(np.array([[0, 2], [2, 7]]), 2, "truncate").tolist()
    [[0, 2], [2, 4]]
    """
    starts, ends = bounds[:, 0], bounds[:, 1]
    if long == "truncate":
        return np.stack([starts, np.minimum(ends, starts + length)], axis=1)
    counts = -(-(ends - starts) // length)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    first = np.repeat(starts, counts) + nth * length
    return np.stack([first, np.minimum(first + length, np.repeat(ends, counts))], axis=1)


def _ends(file: TokenFile, start: int, eos_id: int, bos_id: int | None) -> np.ndarray:
    """One past each end of a document, for ends in a chunk that begins at ``start``."""
    tokens = read_tokens(file, start, min(start + CHUNK + 1, file.num_tokens))  # one more, that may begin a document
    at = np.flatnonzero(tokens[:CHUNK] == eos_id)
    if bos_id is not None:
        last = at + 1 == len(tokens)
        at = at[last | (tokens[np.where(last, at, at + 1)] == bos_id)]
    return start + at + 1


def _written(file: TokenFile) -> np.ndarray:
    if is_megatron(file.path):
        return read_index(file.path).bounds
    path = file.path.removesuffix(".npy") + ".csv.gz"
    try:
        text = gzip.decompress(read_whole(path)).decode()
        rows = [(int(row[0]), int(row[1])) for row in csv.reader(StringIO(text, "")) if row and row[0].isdecimal()]
    except (FileNotFoundError, NotShown):
        raise ValueError(
            f"{path!r} is not there, which says where the documents of {file.path!r} end; leave out "
            "--data.boundaries metadata to find them by their last token"
        ) from None
    except (OSError, EOFError, ValueError, IndexError, csv.Error, zlib.error) as error:
        raise ValueError(f"cannot read the documents of {path!r}: {error}; a line is FIRST,END,…") from None
    bounds = np.array(rows, np.int64).reshape(-1, 2)
    wrong = np.flatnonzero((bounds[:, 0] > bounds[:, 1]) | (bounds[:, 1] > file.num_tokens))
    if len(wrong):
        first, end = bounds[wrong[0]]
        raise ValueError(
            f"{path!r} has a document from token {first:,} to {end:,}, and {file.path!r} {file.num_tokens:,} tokens; "
            "both files are not of one run of dolma, or --data.dtype is another"
        )
    return bounds


def _key(file: TokenFile, eos_id: int, bos_id: int | None) -> str:
    where = (file.path, file.remote.tag) if file.remote else (os.path.abspath(file.path), file.mtime_ns)
    what = (*where, file.dtype, file.num_tokens, eos_id, bos_id)
    return hashlib.sha256(repr(what).encode()).hexdigest()[:24]
