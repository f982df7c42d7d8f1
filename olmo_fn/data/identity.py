"""What the data of a run is, beyond its names: the size of every file and a hash of what is in it. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeAlias

from olmo_fn.data.stores import head, is_remote

BUDGET = 256 << 20
"""Bytes that are hashed of all files together: a second. Data that is no larger is hashed whole."""
PIECES, PIECE, PAGE = 66, 1 << 20, 4096

Identity: TypeAlias = list[list[str | int]]
"""Of each file its path, the type of its numbers, its size in bytes, and its hash."""


def identity(files: Sequence[tuple[str, str]]) -> Identity:
    """Of each file, given as path and type, what `Identity` has. Of large data first, last and 64 spread pieces are hashed."""
    share = max(2 * PAGE, BUDGET // max(1, len(files)))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(partial(_size_and_hash, share=share), [path for path, _ in files]))
    return [[path, dtype, *one] for (path, dtype), one in zip(files, found, strict=True)]


def difference(old: Identity, new: Identity) -> str:
    """The first file in which the data is another, and how; empty if there is none. Where files lie is no difference.

    >>> difference([["a.npy", "uint16", 8, "00"]], [["b.npy", "uint16", 8, "00"]])
    ''
    >>> difference([["a.npy", "uint16", 8, "00"]], [["a.npy", "uint16", 8, "00"], ["b.npy", "uint16", 8, "11"]])
    'b.npy is new'
    >>> difference([["a.npy", "uint16", 8, "00"]], [["a.npy", "uint16", 6, "11"]])
    'a.npy has 6 bytes, had 8'
    """
    if len(old) != len(new):
        (before, after), word = (old, new), "new"
        if len(old) > len(new):
            (before, after), word = (new, old), "gone"
        known = {path for path, *_ in before}
        return f"{next((path for path, *_ in after if path not in known), after[-1][0])} is {word}"
    for (_, old_type, old_size, old_hash), (path, new_type, size, new_hash) in zip(old, new, strict=True):
        if old_type != new_type:
            return f"{path} is read as {new_type}, was as {old_type}"
        if old_size != size:
            return f"{path} has {size:,} bytes, had {old_size:,}"
        if old_hash != new_hash:
            return f"{path} has another content than it had"
    return ""


def _size_and_hash(path: str, share: int) -> tuple[int, str]:
    if is_remote(path):
        remote = head(path)
        return remote.size, hashlib.sha256(remote.tag.encode()).hexdigest()[:16]
    with open(path, "rb", buffering=0) as file:
        size, found = os.fstat(file.fileno()).st_size, hashlib.sha256()
        piece = min(PIECE, max(PAGE, share // PIECES))
        count = min(PIECES, share // piece)
        whole = size <= max(share, count * piece)
        starts = range(0, size, PIECE) if whole else (i * (size - piece) // (count - 1) for i in range(count))
        for start in starts:
            found.update(os.pread(file.fileno(), PIECE if whole else piece, start))
    return size, found.hexdigest()[:16]
