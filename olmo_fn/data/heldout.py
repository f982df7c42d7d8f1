"""Evaluation windows that predict every token of a held-out stream exactly once.

Windows of T inputs start every s <= T tokens. A window scores only the tokens that no window before it has
scored, so each token but those of the first window is predicted from at least T - s + 1 tokens before it.
The stream starts with a token that is only context, the end-of-document token, so that the first token of
the text is predicted as well: nothing is left out of bits per byte.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from olmo_fn.data.batches import IGNORE, Batch, share


def num_windows(num_tokens: int, sequence_length: int, stride: int) -> int:
    """Windows that it takes to predict ``num_tokens`` tokens.

    >>> num_windows(10, 4, 4), num_windows(10, 4, 2), num_windows(3, 4, 2), num_windows(0, 4, 2)
    (3, 4, 1, 0)
    """
    return 0 if num_tokens == 0 else 1 + max(0, -(-(num_tokens - sequence_length) // stride))


def eval_batches(
    tokens: np.ndarray,
    sequence_length: int,
    stride: int,
    batch_size: int,
    context: int,
    rank: int = 0,
    world: int = 1,
) -> Iterator[Batch]:
    """``input_ids`` and ``labels``, (batch_size / world, T) int64, that predict each of ``tokens`` (N,) once.

    ``context`` is the token before the first, normally the end-of-document token. The last batch is filled
    up with ``context`` and IGNORE labels, so that all batches, and all ranks, are alike in shape and number.

    >>> batch, = eval_batches(np.array([7, 8, 9]), sequence_length=2, stride=1, batch_size=2, context=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[0, 7], [7, 8]], [[7, 8], [-100, 9]])
    """
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"the evaluation stride must be from 1 to the sequence length {sequence_length}, not {stride}")
    rows = share(batch_size, rank, world)
    windows = range(num_windows(len(tokens), sequence_length, stride))

    def batch(first: int) -> Batch:
        ids = np.full((batch_size, sequence_length), context, dtype=np.int64)
        labels = np.full((batch_size, sequence_length), IGNORE, dtype=np.int64)
        for row, window in enumerate(windows[first : first + batch_size]):
            start = window * stride
            target = tokens[start : start + sequence_length]
            seen = 0 if window == 0 else sequence_length - stride
            labels[row, seen : len(target)] = target[seen:]
            before = tokens[max(start - 1, 0) : start + len(target) - 1]
            ids[row, len(target) - len(before) : len(target)] = before
        return {
            "input_ids": torch.from_numpy(ids[rows].copy()),
            "labels": torch.from_numpy(labels[rows].copy()),
        }

    return map(batch, windows[::batch_size])
