"""What is held out, in sets by name; and windows that predict every token of a set exactly once.

Windows of T inputs start every s <= T tokens. A window scores only the tokens that no window before it has scored, so each
token but those of the first window is predicted from at least T - s + 1 tokens before it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from olmo_fn.core.chain import IGNORE, Batch
from olmo_fn.data.instances.documents import document_numbers
from olmo_fn.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class TokenSet:
    """Tokens (N,) of an unsigned type to evaluate on; where ``mask`` (N,) is False, the prediction is not in the loss.

    ``text_bytes``: UTF-8 bytes of the whole text, where somebody has counted them before it was tokenized.
    """

    tokens: np.ndarray
    mask: np.ndarray | None = None
    text_bytes: int | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def first(self, count: int) -> TokenSet:
        """At most ``count`` tokens of it."""
        return self if count >= len(self) else TokenSet(self.tokens[:count], None if self.mask is None else self.mask[:count])

    def num_bytes(self, tokenizer: Tokenizer | None) -> int | None:
        """UTF-8 bytes of the text that is predicted; those of end-of-document tokens, which a model pays for too, are 0."""
        if self.text_bytes is not None and self.mask is None:
            return self.text_bytes
        return tokenizer.count_bytes(self.tokens if self.mask is None else self.tokens[self.mask]) if tokenizer else None


def joined(sets: Iterable[TokenSet]) -> TokenSet:
    """Sets one behind the other."""
    sets = tuple(sets)
    if len(sets) == 1:
        return sets[0]
    masks = [np.ones(len(each), bool) if each.mask is None else each.mask for each in sets]
    some = any(each.mask is not None for each in sets)
    known = [each.text_bytes for each in sets if each.text_bytes is not None]
    text_bytes = sum(known) if len(known) == len(sets) else None
    return TokenSet(np.concatenate([each.tokens for each in sets]), np.concatenate(masks) if some else None, text_bytes)


def by_name(pairs: Iterable[tuple[str, TokenSet]]) -> dict[str, TokenSet]:
    """Sets by their names, those of the same name joined."""
    pairs = tuple(pairs)
    return {name: joined(found for other, found in pairs if other == name) for name in dict.fromkeys(name for name, _ in pairs)}


def named(word: str, otherwise: str) -> tuple[str, str]:
    """The name of a set and the path in a word ``NAME=PATH``; ``otherwise`` is the name where there is none.

    >>> named("web=web/*.npy", "heldout"), named("runs/lr=0.1/a.npy", "heldout")
    (('web', 'web/*.npy'), ('heldout', 'runs/lr=0.1/a.npy'))
    """
    found = None if Path(word).exists() else re.fullmatch(r"([\w.-]+)=(.+)", word)
    return (found[1], found[2]) if found else (otherwise, word)


def num_windows(num_tokens: int, sequence_length: int, stride: int) -> int:
    """Windows that it takes to predict ``num_tokens`` tokens.

    >>> num_windows(10, 4, 4), num_windows(10, 4, 2), num_windows(3, 4, 2), num_windows(0, 4, 2)
    (3, 4, 1, 0)
    """
    return 0 if num_tokens == 0 else 1 + max(0, -(-(num_tokens - sequence_length) // stride))


def heldout_batches(
    found: TokenSet, sequence_length: int, stride: int, batch_size: int, eos_id: int | None, mask_documents: bool = False
) -> Iterator[Batch]:
    """``input_ids`` and ``labels``, (batch_size, T) int64, that predict each token that ``found.mask`` leaves in once.

    The first token is predicted from ``eos_id``; if that is None, it is only context. The last batch is filled up with rows
    without labels, so that all batches are of one shape. With ``mask_documents`` a batch has ``documents`` too.

    >>> batch, = heldout_batches(TokenSet(np.array([7, 8, 9])), sequence_length=2, stride=1, batch_size=2, eos_id=0)
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[0, 7], [7, 8]], [[7, 8], [-100, 9]])
    """
    if not 1 <= stride <= sequence_length:
        raise ValueError(f"the evaluation stride must be from 1 to the sequence length {sequence_length}, not {stride}")
    if mask_documents and eos_id is None:
        raise ValueError("held-out documents cannot be masked: there is no end-of-document id")
    tokens, mask = found.tokens, found.mask
    context = eos_id if eos_id is not None else int(tokens[0]) if len(tokens) else 0
    if eos_id is None:
        tokens, mask = tokens[1:], None if mask is None else mask[1:]
    windows = range(num_windows(len(tokens), sequence_length, stride))

    def batch(first: int) -> Batch:
        ids = np.full((batch_size, sequence_length), context, dtype=np.int64)
        labels = np.full((batch_size, sequence_length), IGNORE, dtype=np.int64)
        for row, window in enumerate(windows[first : first + batch_size]):
            start = window * stride
            target = tokens[start : start + sequence_length].astype(np.int64)
            if mask is not None:
                target[~mask[start : start + sequence_length]] = IGNORE
            seen = 0 if window == 0 else sequence_length - stride
            labels[row, seen : len(target)] = target[seen:]
            before = tokens[max(start - 1, 0) : start + len(target) - 1]
            ids[row, len(target) - len(before) : len(target)] = before
        arrays = {"input_ids": ids, "labels": labels}
        if mask_documents:
            arrays["documents"] = document_numbers(ids, context)
        return {name: torch.from_numpy(x) for name, x in arrays.items()}

    return map(batch, windows[::batch_size])
