"""Loss on held-out text: per token, and per byte, which no choice of tokenizer can flatter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.grad import EAGER, Batch, Chain, Context, Execution, Stage, compute_copy, fuse, loss_tokens, pull, subtrees
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
    stages = fuse(loss.stages)
    for batch in batches:
        context: Context = loss.context(batch)
        carry: Any = None
        for stage in stages[:-1]:
            carry, _ = pull(stage, subtrees(params, stage), carry, context, False, dtype, execution)
        total += cross_entropy(stages[-1], params, carry, context["labels"])
        tokens += int(loss_tokens(batch))
        show(tokens)
    bits = total / math.log(2) / num_bytes if num_bytes else None
    return Heldout(total / max(tokens, 1), tokens, bits)


@torch.no_grad()
def cross_entropy(head: Stage, params: Tree, x: Tensor, labels: Tensor, rows: int = 1024) -> float:
    """The head's summed cross entropy, ``rows`` positions at a time. ``x`` (B, T, D), ``labels`` (B, T)."""
    parts = zip(x.flatten(0, 1).split(rows), labels.flatten().split(rows), strict=True)
    own = [tree.map(lambda p: compute_copy(p, x.dtype), subtree) for subtree in subtrees(params, head)]
    return sum(float(head.fn(*own, h, {"labels": l})[1]["ce"]) for h, l in parts)
