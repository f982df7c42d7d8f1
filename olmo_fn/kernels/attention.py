"""Softmax attention in plain differentiable operations: the definition, with which every backend agrees.

B batch, T positions, H query heads, N key/value heads, G = H / N, K head dim; R rows of queries, S keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.kernels.attention_sight import TILE


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees: itself and those before it, at most ``window`` in all.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = rows[:, None] - columns[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def document_starts(documents: Tensor) -> Tensor:
    """The first position of each position's document, given numbers (B, T) that differ from one document to the next.

    >>> document_starts(torch.tensor([[4, 4, 7, 7, 7]])).tolist()
    [[0, 0, 2, 2, 2]]
    """
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    first = torch.ones_like(documents, dtype=torch.bool)
    first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(first, index, 0).cummax(dim=1).values


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    offset: int = 0,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, in plain differentiable operations: the definition.

    ``q`` (B, H, R, K) for the positions from ``offset`` on, ``k`` and ``v`` (B, N, T, K), N dividing H, for those from 0 on.
    ``documents`` (B, T), from `document_starts`: those of different documents do not see each other. ``sinks``, ``cap``: as in
    `attend_masked`. Returns (B, H, R, K). The softmax is in fp32. By blocks of rows, each of which multiplies only with keys
    that causality and the window leave; the documents are not read, so that this can be traced.
    """
    R, N = q.shape[2], k.shape[1]
    q = q if q.shape[1] == N else q.unflatten(1, (N, -1))
    block, out = max(TILE, -(-R // 8)), []  # few blocks, so that a traced program stays short
    for start in range(0, R, block):
        stop = min(start + block, R)
        rows = (offset + start, offset + stop)
        columns = (0 if window is None else max(0, rows[0] - window + 1), rows[1])
        mask, keys = _mask(rows, columns, window, documents, q.device), slice(*columns)
        out.append(attend_masked(q[..., start:stop, :], k[:, :, keys], v[:, :, keys], mask, sinks=sinks, cap=cap))
    return torch.cat(out, dim=2)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, *, sinks: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Softmax attention of R rows of queries to S keys where ``mask`` is true; returns (B, H, R, K).

    ``q`` (B, H, R, K) or (B, N, G, R, K); ``k``, ``v`` (B, N, S, K); ``mask`` (R, S) or (B, 1, R, S) of booleans, with
    at least one true in each row. ``sinks`` (H,): a logit for each head that the softmax has besides and that has no value
    (`olmo_fn.kernels.sinks`). ``cap``: scores x are cap · tanh(x / cap), so within ± cap (Gemma 2 report, section 2).

    >>> q, v = torch.zeros(1, 1, 1, 2), torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    >>> attend_masked(q, q.expand(1, 1, 2, 2), v, torch.ones(1, 2, dtype=torch.bool), sinks=torch.zeros(1)).item()
    2.0
    """
    *lead, R, K = q.shape
    grouped = len(lead) == 3
    rows = q.flatten(2, 3) if grouped else q
    scores = (rows * K**-0.5) @ k.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = scores if cap is None else cap * (scores / cap).tanh()
    bias = torch.where(mask, 0.0, float("-inf")).to(scores.dtype)
    if grouped:
        scores = scores.view(*lead, R, -1)
        bias = bias[:, :, None] if bias.ndim == 4 else bias
    scores = scores + bias
    top, logits = scores.detach().amax(-1, keepdim=True), None
    if sinks is not None:
        logits = sinks.to(scores.dtype).view(*lead[1:], 1, 1)
        top = torch.maximum(top, logits.detach())
    weights = (scores - top).exp()
    total = weights.sum(-1, keepdim=True)
    total = total if logits is None else total + (logits - top).exp()
    weights = weights.to(v.dtype)
    if grouped:
        return ((weights.flatten(2, 3) @ v).view(*lead, R, K) / total).to(v.dtype).flatten(1, 2)
    return ((weights @ v) / total).to(v.dtype)


def _mask(
    rows: tuple[int, int], columns: tuple[int, int], window: int | None, documents: Tensor | None, device: torch.device
) -> Tensor:
    """What rows ``[start, stop)`` see of such columns: (R, C), or (B, 1, R, C) with documents."""
    mask = visible(torch.arange(*rows, device=device), torch.arange(*columns, device=device), window)
    if documents is None:
        return mask
    return (mask & (documents[:, slice(*rows), None] == documents[:, None, slice(*columns)]))[:, None]
