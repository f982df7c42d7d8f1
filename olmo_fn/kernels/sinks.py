"""Attention sinks: a learned logit for each head that takes part in the softmax and has no value (gpt-oss).

With a sink s a row's weights are exp(x_j) / (Σ exp(x_i) + exp(s)): a head can attend to nothing. Only the row's log-sum-exp
is another one, lse' = log(exp(lse) + exp(s)), so what computes attention needs no change: its result is scaled by
exp(lse - lse'), and its backward pass is the same with lse' for lse.

B batch, H query heads, R rows, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """The result (B, H, R, K) and the log-sum-exp (B, H, R) with sinks (H,), of those without.

    >>> zero = torch.zeros(1, 1, 1)
    >>> out, lse = add_sinks(torch.ones(1, 1, 1, 2), zero, torch.zeros(1))  # half of the weight goes to the sink
    >>> out.flatten().tolist(), round(lse.item(), 4)
    ([0.5, 0.5], 0.6931)
    """
    total = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
    return (out * (lse - total).exp()[..., None]).to(out.dtype), total


def sinks_cotangent(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The cotangent (H,) of sinks: -Σ exp(s - lse') · delta over sequences and rows.

    ``lse`` (B, H, R) is the log-sum-exp with sinks, ``delta`` (B, H, R) the products of the result's rows with its cotangent's.
    """
    weights = (sinks.to(lse.dtype)[:, None] - lse).exp()
    return -(weights * delta).sum((0, 2)).to(sinks.dtype)
