"""Megatron-LM's token files: ``X.bin`` holds the tokens, ``X.idx`` their type and the documents.

The index (its ``indexed_dataset.py``, version 1): nine bytes of magic, version (8 bytes), type (1), numbers of sequences and of
document ends (8 each), then lengths (int32), places in bytes (int64) and document ends (int64), little-endian.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

import numpy as np

from olmo_fn.data.stores import NotShown, read_whole

MAGIC = b"MMIDIDX\x00\x00"
TYPES = {1: "uint8", 4: "uint32", 5: "uint64", 8: "uint16"}  # 4 and 5 are signed there, and no id is negative


class MegatronIndex(NamedTuple):
    """What an ``.idx`` file says."""

    dtype: str
    bounds: np.ndarray
    """First token of each sequence and one past its last: (sequences, 2) int64."""


def is_megatron(path: str) -> bool:
    """Whether ``path`` is the tokens of such a pair.

    >>> is_megatron("a/text_document.bin"), is_megatron("a.npy")
    (True, False)
    """
    return path.endswith(".bin")


def read_index(path: str) -> MegatronIndex:
    """The index of the tokens at ``path``. ValueError, one line, for what is none."""
    name = path.removesuffix(".bin") + ".idx"
    try:
        data = read_whole(name)
    except OSError as error:
        raise ValueError(f"{path!r} needs its index, and {name!r} cannot be read: {error.strerror}") from None
    except NotShown as error:
        raise ValueError(f"{path!r} needs its index: {error}") from None
    if not data.startswith(MAGIC) or len(data) < 34:
        raise ValueError(f"{name!r} is no index of Megatron-LM; a file of tokens alone is called .npy")
    version, kind, count, ends = struct.unpack_from("<QBQQ", data, len(MAGIC))
    if version != 1 or kind not in TYPES:
        raise ValueError(f"{name!r} is of version {version} and type {kind}; version 1 is read, and types {sorted(TYPES)}")
    if len(data) != 34 + 12 * count + 8 * ends:
        raise ValueError(f"{name!r} has {len(data):,} bytes, and {34 + 12 * count + 8 * ends:,} are announced; it is cut off")
    lengths = np.frombuffer(data, "<i4", count, 34).astype(np.int64)
    stops = np.cumsum(lengths)
    return MegatronIndex(TYPES[kind], np.stack([stops - lengths, stops], axis=1))
