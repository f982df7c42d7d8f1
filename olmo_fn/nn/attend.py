"""Softmax attention by tiles: a plain form to differentiate, and a faster one that brings its own pullback.

B batch, T positions, H query heads, N key/value heads, G = H / N, K head dim; R rows and C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from olmo_fn.grad import Kernel, identity

TILE = 128  # rows or columns of a tile: its scores stay in the processor's cache between two products


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees: itself and those before it, at most ``window`` in all.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = rows[:, None] - columns[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, in plain differentiable operations: the definition.

    ``q`` (B, H, T, K), ``k`` and ``v`` (B, N, T, K) with N dividing H; ``documents`` (B, T): positions of different
    documents do not see each other. Returns (B, H, T, K). The softmax is in fp32. By blocks of rows, each of which
    multiplies only with keys that it may see.
    """
    T, N = q.shape[2], k.shape[1]
    q = q if q.shape[1] == N else q.unflatten(1, (N, -1))
    block, out = max(TILE, -(-T // 8)), []  # few blocks, so that a traced program stays short
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = 0 if window is None else max(0, start - window + 1)
        mask = _mask((start, stop), (first, stop), window, documents, q.device)
        out.append(attend_masked(q[..., start:stop, :], k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(out, dim=2)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Softmax attention of R rows of queries to S keys where ``mask`` is true; returns (B, H, R, K).

    ``q`` (B, H, R, K) or (B, N, G, R, K); ``k``, ``v`` (B, N, S, K); ``mask`` (R, S) or (B, 1, R, S) of booleans, with
    at least one true in each row.
    """
    *lead, R, K = q.shape
    grouped = len(lead) == 3
    rows = q.flatten(2, 3) if grouped else q
    scores = (rows * K**-0.5) @ k.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    bias = torch.where(mask, 0.0, float("-inf")).to(scores.dtype)
    if grouped:
        scores = scores.view(*lead, R, -1)
        bias = bias[:, :, None] if bias.ndim == 4 else bias
    scores = scores + bias
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    total = weights.sum(-1, keepdim=True)
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


# --- the faster form --------------------------------------------------------------------------------------------------


def attend_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    kernel: Kernel = identity,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """`attend` with its pullback, which takes the result's cotangent to those of ``q``, ``k`` and ``v``.

    Keeps only the result and each row's log-sum-exp, and computes the weights again (Dao et al. 2022, FlashAttention,
    algorithms 1 and 4). Forward goes by tiles of rows and backward by tiles of columns, whose scores are transposed, so that
    the large operand of four products in five is contiguous and only the queries' gradient is added up. ``kernel`` compiles
    the two elementwise functions.
    """
    B, H, T, K = q.shape
    N = k.shape[1]
    G, scale, wide = H // N, K**-0.5, torch.promote_types(q.dtype, torch.float32)
    softmax, gradient = kernel(_softmax), kernel(_softmax_gradient)
    size = B * H * TILE * T

    def rows_of(x: Tensor) -> Tensor:  # row t·G + g: a range of positions is a range of rows
        return x.unflatten(1, (N, G)).transpose(2, 3).reshape(B * N, T * G, K)

    def heads_of(x: Tensor) -> Tensor:
        return x.view(B, N, T, G, K).transpose(2, 3).reshape(B, H, T, K)

    def bias(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        if documents is None:
            return _bias(rows, columns, window, G, wide, q.device)
        table = _as_bias(_mask(rows, columns, window, documents, q.device), G, wide)
        return table.expand(-1, N, -1, -1).flatten(0, 1)

    keys, values, queries = k.reshape(B * N, T, K), v.reshape(B * N, T, K), rows_of(q)
    lse = torch.empty(B * N, T * G, dtype=wide, device=q.device)
    out = torch.empty_like(queries)
    scratch = q.new_empty(size)
    for start in reversed(range(0, T, TILE)):  # the widest first: a kernel traced with a square tile would be compiled twice
        stop = min(start + TILE, T)
        first = 0 if window is None else max(0, start - window + 1)
        rows = slice(start * G, stop * G)
        tile = _product(scratch, queries[:, rows], keys[:, first:stop].mT)
        total, lse[:, rows] = softmax(tile, bias((start, stop), (first, stop)), scale)
        out[:, rows] = (tile @ values[:, first:stop]).div_(total)
    del scratch, tile

    def pullback(cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_out = rows_of(cotangent)
        delta = (d_out.to(wide) * out).sum(-1)
        d_q = torch.zeros_like(queries, dtype=wide)
        d_k, d_v = torch.empty_like(keys), torch.empty_like(values)
        one, two = q.new_empty(size), q.new_empty(size)
        for start in range(0, T, TILE):
            stop = min(start + TILE, T)
            last = T if window is None else min(T, stop - 1 + window)
            rows, columns = slice(start * G, last * G), slice(start, stop)
            some_keys, some_queries, some_d_out = (x.contiguous() for x in (keys[:, columns], queries[:, rows], d_out[:, rows]))
            weights = _product(one, some_keys, some_queries.mT)
            d_scores = _product(two, values[:, columns].contiguous(), some_d_out.mT)
            statistics = (x[:, rows].contiguous()[:, None] for x in (lse, delta))
            gradient(weights, d_scores, bias((start, last), (start, stop)).mT, *statistics, scale)
            d_v[:, columns] = weights @ some_d_out
            d_k[:, columns] = d_scores @ some_queries
            d_q[:, rows] += d_scores.mT @ some_keys
        return heads_of(d_q.to(q.dtype)), d_k.view_as(k), d_v.view_as(v)

    return heads_of(out), pullback


@lru_cache(256)
def _bias(
    rows: tuple[int, int], columns: tuple[int, int], window: int | None, G: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return _as_bias(_mask(rows, columns, window, None, device), G, dtype)


def _as_bias(mask: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` (..., R, C) is true and -inf elsewhere, each row G times: (..., R·G, C)."""
    bias = torch.where(mask, 0.0, float("-inf")).to(dtype)
    return bias if G == 1 else bias.repeat_interleave(G, -2)


def _product(scratch: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The batched product of ``a`` (n, R, K) and ``b`` (n, K, C), in the memory of ``scratch``."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=scratch[: math.prod(shape)].view(shape))


def _softmax(scores: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Overwrite ``scores`` (n, R, C) by exp(x - max x), x = scale · scores + bias.

    Returns the sums (n, R, 1) of what it wrote and the log-sum-exp (n, R) of x.
    """
    x = scores.to(bias.dtype) * scale + bias
    top = x.amax(-1, keepdim=True)
    weights = (x - top).exp()
    total = weights.sum(-1, keepdim=True)
    scores.copy_(weights)
    return total, (top + total.log())[..., 0]


def _softmax_gradient(scores: Tensor, d_weights: Tensor, bias: Tensor, lse: Tensor, delta: Tensor, scale: float) -> None:
    """Overwrite transposed ``scores`` (n, C, R) by the weights, and ``d_weights`` by the cotangent of the scores."""
    weights = (scores.to(bias.dtype) * scale + bias - lse).exp()
    d_scores = weights * (d_weights.to(bias.dtype) - delta) * scale
    scores.copy_(weights)
    d_weights.copy_(d_scores)
