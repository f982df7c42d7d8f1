"""Training instances as OLMo-core's fixed-sequence-length dataset defines them.

Each file is cut on its own into windows of ``sequence_length`` tokens without overlap; its tail is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from olmo_fn.data.tokens import TokenFile, open_tokens, view, vocab_error


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

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The file (its place in ``files``) and the first token's offset there of each of the windows ``numbers`` (B,)."""
        which = np.searchsorted(self.ends, numbers, side="right")
        return which, self.sequence_length * (numbers - np.where(which > 0, self.ends[which - 1], 0))

    def read(self, numbers: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Token ids (B, T) int64 and label mask (B, T) bool or None of the windows ``numbers``.

        ValueError naming file, offset and value for a token that is not in the vocabulary.
        """
        numbers = np.asarray(numbers, dtype=np.int64)
        t = self.sequence_length
        ids = np.empty((len(numbers), t), dtype=np.int64)
        mask = np.empty((len(numbers), t), dtype=np.bool_) if self.masks else None
        which, starts = self.locate(numbers)
        for row, (file, start) in enumerate(zip(which.tolist(), starts.tolist(), strict=True)):
            ids[row] = view(self.files[file])[start : start + t]
            if mask is not None:
                mask[row] = view(self.masks[file])[start : start + t]
        # A uint64 beyond int64 is negative here.
        if ids.size and (ids.max() >= self.vocab_size or ids.min() < 0):
            row, column = np.argwhere((ids >= self.vocab_size) | (ids < 0))[0].tolist()
            raise vocab_error(self.files[which[row]], int(starts[row]) + column, self.vocab_size)
        return ids, mask


def open_masks(paths: Sequence[str], files: Sequence[TokenFile]) -> tuple[TokenFile, ...]:
    """The label masks ``paths`` of ``files``. ValueError when they do not go together."""
    if paths and len(paths) != len(files):
        raise ValueError(f"{len(paths)} label mask files for {len(files)} token files; give one for each, in their order")
    masks = tuple(open_tokens(path, "bool") for path in paths)
    for mask, file in zip(masks, files, strict=False):
        if mask.num_tokens != file.num_tokens:
            raise ValueError(
                f"the label mask {mask.path!r} has {mask.num_tokens:,} entries, {file.path!r} has {file.num_tokens:,} tokens"
            )
    return masks
