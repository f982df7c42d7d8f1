"""Loss on held-out text: per token, and per byte, which no choice of tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from olmo_fn.core.chain import IGNORE, Batch, Chain, loss_tokens
from olmo_fn.core.gradients import EAGER, Execution
from olmo_fn.core.tape import loss_sums
from olmo_fn.tree import Tree


class Heldout(NamedTuple):
    """``loss``: nats a token over ``tokens`` tokens; ``bits_per_byte``: None when the bytes are not known."""

    loss: float
    tokens: int
    bits_per_byte: float | None = None

    @property
    def perplexity(self) -> float:
        """e to the loss.

        >>> round(Heldout(math.log(50), 10).perplexity, 6)
        50.0
        """
        return math.exp(self.loss) if self.loss < 700 else math.inf


def evaluate(
    loss: Chain,
    params: Tree,
    batches: Iterator[Batch],
    num_bytes: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    execution: Execution = EAGER,
    show: Callable[[int], Any] = lambda tokens: None,
) -> Heldout | None:
    """Sum the cross entropy over all labels of ``batches`` and divide it once; None without any.

    bits per byte = (sum of nats / ln 2) / ``num_bytes``. Runs the stages as training does, so that it needs no
    compilation of its own; ``show`` gets the number of tokens of each batch that is done.
    """
    sharing, total, tokens = execution.layout.sharing, 0.0, 0
    execution = replace(execution, dtype=dtype)
    params = execution.layout.placement.to_local(params)
    for batch in batches:
        whole = sharing.as_given(padded(batch, sharing.multiple))
        total += float(loss_sums(loss, params, whole, execution)["ce"])
        count = int(loss_tokens(batch))
        tokens += count
        show(count)
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return Heldout(total / tokens, tokens, bits) if tokens else None


def padded(batch: Batch, multiple: int) -> Batch:
    """The batch with rows without labels behind it, up to a multiple of so many rows.

    >>> padded({"labels": torch.tensor([[5, 6]])}, 2)["labels"].tolist()
    [[5, 6], [-100, -100]]
    """
    missing = -len(batch["labels"]) % multiple
    if not missing:
        return batch
    rows = {name: x.new_full((missing, *x.shape[1:]), IGNORE if name == "labels" else 0) for name, x in batch.items() if x.ndim}
    return {name: torch.cat((x, rows[name])) if name in rows else x for name, x in batch.items()}
