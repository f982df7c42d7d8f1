"""Texts of evaluation sets inside of documents, found by runs of n words, in any case and with any punctuation between them.

The runs are compared by 64-bit hashes: of a billion runs against a million, one in ten thousand times a run is found wrongly.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np

WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Grams:
    """The runs of ``n`` words of evaluation sets: ``hashes`` (G,) uint64, sorted, and the set of each, ``owners`` (G,)."""

    n: int
    names: tuple[str, ...]
    hashes: np.ndarray
    owners: np.ndarray

    def find(self, text: str) -> tuple[str, str] | None:
        """The first run that a text has of a set: the set's name, and the words; None if it has none."""
        words = WORD.findall(text.lower())
        own = hashes(words, self.n)
        if not len(own) or not len(self.hashes):
            return None
        at = np.minimum(np.searchsorted(self.hashes, own), len(self.hashes) - 1)
        hits = np.flatnonzero(self.hashes[at] == own)
        if not len(hits):
            return None
        first = int(hits[0])
        return self.names[self.owners[at[first]]], " ".join(words[first : first + self.n])


def hashes(words: list[str], n: int) -> np.ndarray:
    """Of each run of ``n`` words a hash, (len(words) − n + 1,) uint64.

    >>> a, b = hashes("a b c d".split(), 3), hashes("x b c d".split(), 3)
    >>> (a == b).tolist()
    [False, True]
    """
    if len(words) < n:
        return np.zeros(0, np.uint64)
    each = np.array([zlib.crc32(word.encode("utf-8", "replace")) for word in words], np.uint64)
    each = (each + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    each ^= each >> np.uint64(29)
    found = np.zeros(len(words) - n + 1, np.uint64)
    for i in range(n):  # a polynomial, modulo 2^64
        found = found * np.uint64(0xBF58476D1CE4E5B9) + each[i : len(words) - n + 1 + i]
    return found


def collect(sets: Mapping[str, Iterable[str]], n: int) -> tuple[Grams, int]:
    """The runs of the texts of evaluation sets, by name; and how many texts have fewer than ``n`` words, and so none."""
    found, owners, short = [np.zeros(0, np.uint64)], [np.zeros(0, np.int32)], 0
    for number, texts in enumerate(sets.values()):
        for text in texts:
            own = hashes(WORD.findall(text.lower()), n)
            short += not len(own)
            found.append(own)
            owners.append(np.full(len(own), number, np.int32))
    unique, first = np.unique(np.concatenate(found), return_index=True)
    return Grams(n, tuple(sets), unique, np.concatenate(owners)[first]), short


def strings(record: Any) -> Iterable[str]:
    """All texts in a record, in lists and objects in it too: an evaluation set has them in fields of its own.

    >>> list(strings({"question": "a", "choices": ["b", {"text": "c"}], "answer": 1}))
    ['a', 'b', 'c']
    """
    if isinstance(record, str):
        yield record
    elif isinstance(record, Mapping):
        for value in record.values():
            yield from strings(value)
    elif isinstance(record, list):
        for value in record:
            yield from strings(value)


def packed(grams: Grams) -> bytes:
    """A file of ``grams``, which `load_grams` reads."""
    file = BytesIO()
    np.savez(file, hashes=grams.hashes, owners=grams.owners, n=grams.n, names=np.array(grams.names))
    return file.getvalue()


@lru_cache(maxsize=1)
def load_grams(path: str, version: object = None) -> Grams:
    """The `Grams` in a file, read once for each ``version`` of it."""
    with np.load(path) as found:
        return Grams(int(found["n"]), tuple(found["names"].tolist()), found["hashes"], found["owners"])
