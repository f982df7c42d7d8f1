"""Instances that are put together of pieces of token files, and padded: what all kinds that know documents share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from olmo_fn.data.instances import Origin
from olmo_fn.data.tokens import TokenFile, read_tokens, vocab_error


@dataclass(frozen=True)
class Pieces:
    """Instances of pieces of ``files``, one behind the other, with ``pad_id`` behind them up to ``sequence_length``.

    ``where`` (pieces, 3) int64: the file of each piece as its index, its first token there, and one past its last. The pieces
    of instance i are ``first[i]`` to before ``first[i + 1]``. ``masks``: none, or a label mask for each file. What is padded is
    not in the loss.
    """

    files: tuple[TokenFile, ...]
    masks: tuple[TokenFile, ...]
    where: np.ndarray
    first: np.ndarray
    sequence_length: int
    vocab_size: int
    pad_id: int

    def __len__(self) -> int:
        return len(self.first) - 1

    def origin(self, number: int) -> Origin:
        """The file of the first piece of instance ``number``, and the offset of its first token there."""
        file, start, _ = self.where[self.first[number]]
        return Origin(self.files[int(file)].path, int(start))

    def of(self, number: int) -> np.ndarray:
        """The pieces of instance ``number``, rows of ``where``."""
        return self.where[self.first[number] : self.first[number + 1]]

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` (B, T) int64 and ``label_mask`` (B, T) bool. ValueError names a token outside of the vocabulary."""
        shape = len(numbers), self.sequence_length
        ids, mask = np.full(shape, self.pad_id, np.int64), np.zeros(shape, np.bool_)
        for row, number in enumerate(numbers):
            at = 0
            for file, start, end in self.of(int(number)).tolist():
                part = ids[row, at : at + end - start]
                part[:] = read_tokens(self.files[file], start, end)
                if part.size and (part.max() >= self.vocab_size or part.min() < 0):
                    bad = int(np.argmax((part >= self.vocab_size) | (part < 0)))
                    raise vocab_error(self.files[file], start + bad, self.vocab_size)
                mask[row, at : at + end - start] = read_tokens(self.masks[file], start, end) if self.masks else True
                at += end - start
        return {"input_ids": ids, "label_mask": mask}

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """The number of the piece of each token (B, T) int64, from 0 in each row; padding is a piece of its own."""
        found = np.empty((len(numbers), self.sequence_length), np.int64)
        for row, number in enumerate(numbers):
            of = self.of(int(number))
            lengths = of[:, 2] - of[:, 1]
            found[row] = np.repeat(np.arange(len(of) + 1), [*lengths, self.sequence_length - lengths.sum()])
        return found


def per_file(bounds: Sequence[np.ndarray]) -> np.ndarray:
    """Documents of each file, (documents, 2), as rows of `Pieces.where`."""
    parts = [np.column_stack([np.full(len(b), i, np.int64), b]) for i, b in enumerate(bounds)]
    return np.concatenate(parts) if parts else np.zeros((0, 3), np.int64)
