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
        """``input_ids`` (B, T) of the windows ``numbers`` (B,), and ``label_mask`` (B, T) bool if there are masks.

        The tokens are of the type of their files, the widest of them. ValueError naming file, offset and value for a token that
        is not in the vocabulary.
        """
        t, file = self.sequence_length, np.searchsorted(self.ends, numbers, side="right")
        starts = t * (np.asarray(numbers, np.int64) - np.concatenate([[0], self.ends])[file])
        used = np.unique(file).tolist()
        arrays = {"input_ids": np.empty((len(file), t), np.result_type(*(self.files[f].dtype for f in used or [0])))}
        if self.masks:
            arrays["label_mask"] = np.empty((len(file), t), np.bool_)
        for f in used:
            at = np.flatnonzero(file == f)
            for rows, of in zip(arrays.values(), (self.files, self.masks), strict=False):
                read_rows(of[f], starts[at].tolist(), rows, at.tolist())
        ids = arrays["input_ids"]
        if ids.size and ids.max() >= self.vocab_size:
            row, column = np.argwhere(ids >= self.vocab_size)[0]
            raise vocab_error(self.files[file[row]], int(starts[row] + column), self.vocab_size)
        return arrays
