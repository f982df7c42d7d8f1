"""Training instances as OLMo-core's fixed-sequence-length dataset defines them.

Each file is cut on its own into windows of ``sequence_length`` tokens without overlap; its tail is dropped.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import tyro

from olmo_fn.data.instances import Instances, InstancesSettings, Origin, TokenData
from olmo_fn.data.tokens import TokenFile, read_rows, vocab_error


@dataclass(frozen=True)
class FixedLength(InstancesSettings):
    """Windows of the sequence length, cut from each token file without overlap."""

    name: tyro.conf.Suppress[Literal["fixed"]] = "fixed"
    """This kind of dataset."""
    longest: int = 0
    """Cut files, and shuffle, as for this longer sequence length, and each window then into several sequences: the order of
    tokens is the same for every sequence length that divides it. 0: the sequence length."""

    def build(self, tokens: TokenData) -> Instances:
        """The windows of the files. Needs no end-of-document token."""
        return Windows(tokens.files, tokens.sequence_length, tokens.vocab_size, tokens.masks)


@dataclass(frozen=True)
class Windows:
    """The windows of ``files``, numbered in file order. ``masks``: none, or a label mask for each file."""

    files: tuple[TokenFile, ...]
    sequence_length: int
    vocab_size: int
    masks: tuple[TokenFile, ...] = ()

    @cached_property
    def ends(self) -> np.ndarray:
        """For each file, one past the number of its last window: (files,) int64."""
        return np.cumsum([f.num_tokens // self.sequence_length for f in self.files], dtype=np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def locate(self, number: int) -> tuple[int, int]:
        """The file of window ``number``, as its index in ``files``, and the offset of its first token there."""
        file = int(np.searchsorted(self.ends, number, side="right"))
        before = int(self.ends[file - 1]) if file else 0
        return file, self.sequence_length * (number - before)

    def origin(self, number: int) -> Origin:
        """The file of window ``number``, and the offset of its first token there."""
        file, start = self.locate(number)
        return Origin(self.files[file].path, start)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` (B, T) int64 of the windows ``numbers`` (B,), and ``label_mask`` (B, T) bool if there are masks.

        ValueError naming file, offset and value for a token that is not in the vocabulary.
        """
        t, many = self.sequence_length, len(numbers)
        file = np.searchsorted(self.ends, numbers, side="right")
        starts = t * (np.asarray(numbers, np.int64) - np.concatenate([[0], self.ends])[file])
        ids, mask = np.empty((many, t), np.int64), np.empty((many, t), np.bool_)
        for f in np.unique(file):
            at = np.flatnonzero(file == f)
            rows = read_rows(self.files[f], starts[at].tolist(), t)
            if rows.size and rows.max() >= self.vocab_size:
                row, column = np.argwhere(rows >= self.vocab_size)[0]
                raise vocab_error(self.files[f], int(starts[at[row]] + column), self.vocab_size)
            ids[slice(None) if len(at) == many else at] = rows
            if self.masks:
                mask[at] = read_rows(self.masks[f], starts[at].tolist(), t)
        return {"input_ids": ids, "label_mask": mask} if self.masks else {"input_ids": ids}
