"""Copies of documents: exact ones by a hash, near ones by MinHash (Broder 1997) with banding.

A document has K keys of 64 bits, and is a copy if one before it that was kept has any of them. An exact copy has the same
hash of its text, K = 1. For near copies the MinHash of a text's runs of 5 words is cut into K bands; two texts whose runs have
the Jaccard similarity s share a band with probability 1 − (1 − s^r)^K, where r is the length of a band.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, Literal, TypeAlias

import numpy as np

Dedup: TypeAlias = Literal["none", "exact", "minhash"]
WORDS_TOGETHER, NUM_PERM, SCHEME = 5, 128, "affine32"


def keys(texts: Sequence[str], dedup: Dedup, similarity: float = 0.8) -> np.ndarray:
    """The keys of each of D texts, (D, K) uint64."""
    if dedup == "none":
        return np.zeros((len(texts), 0), np.uint64)
    if dedup == "exact":
        return np.array([[_hash(text.encode())] for text in texts], np.uint64).reshape(-1, 1)
    bands = lsh(similarity).hashranges
    return np.array([_bands(text, bands) for text in texts], np.uint64).reshape(-1, len(bands))


class Seen:
    """The keys of the documents that were kept."""

    def __init__(self, found: np.ndarray) -> None:
        self.found: set[int] = {*found.tolist()}

    def new(self, keys: np.ndarray) -> np.ndarray:
        """Which documents, of keys (D, K), are no copies of one before, (D,) bool; from now on they have been seen."""
        kept = np.ones(len(keys), np.bool_)
        if keys.shape[1]:
            for i, own in enumerate(keys.tolist()):
                kept[i] = self.found.isdisjoint(own)
                if kept[i]:
                    self.found.update(own)
        return kept


@lru_cache
def lsh(similarity: float) -> Any:
    """How datasketch cuts `NUM_PERM` values into bands for this threshold. ValueError without the library."""
    try:
        from datasketch import MinHashLSH
    except ImportError:
        raise ValueError("--dedup minhash needs datasketch: pip install 'olmo-fn[dedup]'") from None
    return MinHashLSH(threshold=similarity, num_perm=NUM_PERM)


def _bands(text: str, bands: Sequence[tuple[int, int]]) -> list[int]:
    from datasketch import MinHash

    words = [word.encode() for word in re.findall(r"\w+", text.lower())]
    words = words or [text.encode()]
    runs = {b" ".join(words[i : i + WORDS_TOGETHER]) for i in range(max(1, len(words) - WORDS_TOGETHER + 1))}
    found = MinHash(NUM_PERM, seed=1, hashfunc=zlib.crc32, permutations=_permutations(), scheme=SCHEME)
    found.update_batch(sorted(runs))
    return [_hash(b"%d:" % start + found.hashvalues[start:end].tobytes()) for start, end in bands]


@lru_cache
def _permutations() -> Any:
    from datasketch import MinHash

    return MinHash(NUM_PERM, seed=1, hashfunc=zlib.crc32, scheme=SCHEME).permutations


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")
