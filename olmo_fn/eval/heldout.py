"""Loss on held-out text: per token, and per byte, which no choice of tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn.grad import EAGER, Batch, Chain, Context, Execution, Stage, loss_tokens, subtrees
from olmo_fn.tape import pull, segments
from olmo_fn.tree import Tree


class Heldout(NamedTuple):
    """``loss``: nats a token over ``tokens`` tokens; ``bits_per_byte``: None when the bytes are not known."""

    loss: float
    tokens: int
    bits_per_byte: float | None


def evaluate(
    loss: Chain,
    params: Tree,
    batches: Iterator[Batch],
    num_bytes: int | None,
    *,
    dtype: torch.dtype = torch.float32,
    execution: Execution = EAGER,
    show: Callable[[int], Any] = lambda tokens: None,
) -> Heldout:
    """Sum the cross entropy over all labels of ``batches`` and divide it once.

    bits per byte = (sum of nats / ln 2) / ``num_bytes``. Runs the stages as training does, so that it needs no
    compilation of its own; ``show`` gets the tokens done after each batch.
    """
    total, tokens = 0.0, 0
    parts = segments(loss.stages[:-1])
    for batch in batches:
        context: Context = loss.context(batch)
        carry: Any = None
        for segment in parts:
            weights = execution.layout.fetch(params, segment.params, dtype)
            carry, _ = pull(segment, weights, carry, context, execution)
        total += cross_entropy(loss.stages[-1], params, carry, context["labels"])
        tokens += int(loss_tokens(batch))
        show(tokens)
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return Heldout(total / max(tokens, 1), tokens, bits)


@torch.no_grad()
def cross_entropy(head: Stage, params: Tree, x: Tensor, labels: Tensor, rows: int = 1024) -> float:
    """The head's summed cross entropy, ``rows`` positions at a time. ``x`` (B, T, D), ``labels`` (B, T)."""
    parts = zip(x.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    return sum(float(head.fn(*subtrees(params, head), h, {"labels": l})[1]["ce"]) for h, l in parts)
