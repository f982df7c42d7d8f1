"""Evaluation windows that predict every token of a held-out stream exactly once.

Windows of T inputs start every s <= T tokens. A window scores only the tokens that no window before it has scored, so each
token but those of the first window is predicted from at least T - s + 1 tokens before it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from olmo_fn.core.chain import IGNORE, Batch
from olmo_fn.data.instances.documents import document_numbers


def num_windows(num_tokens: int, sequence_length: int, stride: int) -> int:
    """Windows that it takes to predict ``num_tokens`` tokens.

    >>> num_windows(10, 4, 4), num_windows(10, 4, 2), num_windows(3, 4, 2), num_windows(0, 4, 2)
    (3, 4, 1, 0)
    """
    return 0 if num_tokens == 0 else 1 + max(0, -(-(num_tokens - sequence_length) // stride))


def heldout_batches(
    tokens: np.ndarray, sequence_length: int, stride: int, batch_size: int, eos_id: int | None, mask_documents: bool = False
) -> Iterator[Batch]:
    """``input_ids`` and ``labels``, (batch_size, T) int64, that predict each of ``tokens`` (N,) once.

    The first token is predicted from ``eos_id``; if that is None, it is only context. The last batch is filled up with rows
    without labels, so that all batches are of one shape. With ``mask_documents`` a batch has ``documents`` too.

    >>> batch, = heldout_batches(np.array([7, 8, 9]), sequence_length=2, stride=1, batch_size=2, eos_id=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[0, 7], [7, 8]], [[7, 8], [-100, 9]])
    """
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"the evaluation stride must be from 1 to the sequence length {sequence_length}, not {stride}")
    if mask_documents and eos_id is None:
        raise ValueError("held-out documents cannot be masked: there is no end-of-document id")
    context = eos_id if eos_id is not None else int(tokens[0]) if len(tokens) else 0
    tokens = tokens if eos_id is not None else tokens[1:]
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
        arrays = {"input_ids": ids, "labels": labels}
        if mask_documents:
            arrays["documents"] = document_numbers(ids, context)
        return {name: torch.from_numpy(x) for name, x in arrays.items()}

    return map(batch, windows[::batch_size])
