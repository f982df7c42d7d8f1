"""Softmax attention by tiles: a plain form to differentiate, and a faster one that brings its own pullback.

B batch, T positions, H query heads, N key/value heads, G = H / N, K head dim; R rows and C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn.grad import Kernel, identity

UNSEEN = -1e30  # added to scores: finite, so that a row that sees nothing has a log-sum-exp that weighs nothing, and no NaN
TILE = 128  # rows or columns of a tile: its scores stay in the processor's cache between two products


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees: itself and those before it, at most ``window`` in all.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = rows[:, None] - columns[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, documents: Tensor | None = None, offset: int = 0
) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, in plain differentiable operations: the definition.

    ``q`` (B, H, R, K) for the positions from ``offset`` on, ``k`` and ``v`` (B, N, T, K), N dividing H, for those from 0 on.
    ``documents`` (B, T): positions of different documents do not see each other. Returns (B, H, R, K). The softmax is in fp32.
    By blocks of rows, each of which multiplies only with keys that it may see.
    """
    R, N = q.shape[2], k.shape[1]
    q = q if q.shape[1] == N else q.unflatten(1, (N, -1))
    block, out = max(TILE, -(-R // 8)), []  # few blocks, so that a traced program stays short
    for start in range(0, R, block):
        stop = min(start + block, R)
        rows = (offset + start, offset + stop)
        columns = (0 if window is None else max(0, rows[0] - window + 1), rows[1])
        mask, keys = _mask(rows, columns, window, documents, q.device), slice(*columns)
        out.append(attend_masked(q[..., start:stop, :], k[:, :, keys], v[:, :, keys], mask))
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
    offset: int = 0,
    kernel: Kernel = identity,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """`attend` with its pullback, which takes the result's cotangent to those of ``q``, ``k`` and ``v``.

    Keeps only the result and each row's log-sum-exp, and computes the weights again (Dao et al. 2022, FlashAttention,
    algorithms 1 and 4). ``kernel`` compiles the two elementwise functions.
    """
    tiles = Tiles(window, documents, offset, 0, kernel)
    out, lse = tiles.forward(q, k, v)

    def pullback(cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tiles.backward(q, k, v, cotangent, lse, (cotangent.to(lse.dtype) * out).sum(-1))

    return out, pullback


class Tiles(NamedTuple):
    """Attention of queries for the positions from ``offset`` on to keys for those from ``key_offset`` on.

    Forward goes by tiles of rows and backward by tiles of columns, whose scores are transposed, so that the large operand
    of four products in five is contiguous and only the queries' gradient is added up.
    """

    window: int | None
    documents: Tensor | None
    offset: int
    key_offset: int
    kernel: Kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The result (B, H, R, K), and the log-sum-exp of each row (B, H, R), very negative where a row sees nothing."""
        queries, keys, values, heads = *_by_kv_head(q, k, v), _Heads(q, k)
        softmax, size = self.kernel(_softmax), heads.G
        out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2], dtype=heads.wide)
        scratch = q.new_empty(queries.shape[0] * min(TILE, q.shape[2]) * size * k.shape[2])
        for start in reversed(range(0, q.shape[2], TILE)):  # the widest first, so that kernels are not traced with a square
            stop = min(start + TILE, q.shape[2])
            columns, rows = self._columns(start, stop, k.shape[2]), slice(start * size, stop * size)
            tile = _product(scratch, queries[:, rows], keys[:, columns].mT)
            total, lse[:, rows] = softmax(tile, self._bias((start, stop), (columns.start, columns.stop), heads), heads.scale)
            out[:, rows] = (tile @ values[:, columns]).div_(total)
        return heads.apart(out), heads.apart(lse[..., None])[..., 0]

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of ``q``, ``k`` and ``v`` from that of the result. ``lse`` and ``delta`` = Σ d_out · out (B, H, R) may be
        those of a softmax over more keys than these.
        """
        queries, keys, values, heads = *_by_kv_head(q, k, v), _Heads(q, k)
        d_out, lse, delta = heads.together(d_out), *(heads.together(x[..., None])[..., 0] for x in (lse, delta))
        gradient, size = self.kernel(_softmax_gradient), heads.G
        d_q = torch.zeros_like(queries, dtype=heads.wide)
        d_k, d_v = torch.zeros_like(keys), torch.zeros_like(values)
        one, two = (q.new_empty(queries.shape[0] * min(TILE, k.shape[2]) * size * q.shape[2]) for _ in range(2))
        for start in range(0, k.shape[2], TILE):
            stop = min(start + TILE, k.shape[2])
            first, last = self._rows(start, stop, q.shape[2])
            if first >= last:
                continue
            rows, columns = slice(first * size, last * size), slice(start, stop)
            some_keys, some_queries, some_d_out = (x.contiguous() for x in (keys[:, columns], queries[:, rows], d_out[:, rows]))
            weights = _product(one, some_keys, some_queries.mT)
            d_scores = _product(two, values[:, columns].contiguous(), some_d_out.mT)
            statistics = (x[:, rows].contiguous()[:, None] for x in (lse, delta))
            gradient(weights, d_scores, self._bias((first, last), (start, stop), heads).mT, *statistics, heads.scale)
            d_v[:, columns] = weights @ some_d_out
            d_k[:, columns] = d_scores @ some_queries
            d_q[:, rows] += d_scores.mT @ some_keys
        return heads.apart(d_q.to(q.dtype)), d_k.view_as(k), d_v.view_as(v)

    def _columns(self, start: int, stop: int, T: int) -> slice:
        """The keys that rows ``start`` to ``stop`` may see; at least one, so that a row has a softmax."""
        shift = self.offset - self.key_offset
        end = max(1, min(T, stop + shift))
        return slice(0 if self.window is None else min(max(0, start + shift - self.window + 1), end - 1), end)

    def _rows(self, start: int, stop: int, R: int) -> tuple[int, int]:
        """The rows that may see keys ``start`` to ``stop``."""
        shift = self.offset - self.key_offset
        return max(0, start - shift), R if self.window is None else min(R, stop - 1 - shift + self.window)

    def _bias(self, rows: tuple[int, int], columns: tuple[int, int], heads: _Heads) -> Tensor:
        at = [(a + by, b + by) for (a, b), by in ((rows, self.offset), (columns, self.key_offset))]
        if self.documents is None:
            return _bias(at[0], at[1], self.window, heads.G, heads.wide, heads.device)
        mask = _mask(at[0], at[1], self.window, self.documents, heads.device)
        table = _as_bias(mask, heads.G, heads.wide)
        return table.expand(-1, heads.N, -1, -1).flatten(0, 1)


class _Heads:
    """Sizes, and the two layouts of queries: (B, H, R, K), and (B·N, R·G, K), where a range of positions is one of rows."""

    def __init__(self, q: Tensor, k: Tensor) -> None:
        self.B, H, self.R, K = q.shape
        self.N = k.shape[1]
        self.G, self.scale, self.device = H // self.N, K**-0.5, q.device
        self.wide = torch.promote_types(q.dtype, torch.float32)

    def together(self, x: Tensor) -> Tensor:
        """(B, H, R, ·) as (B·N, R·G, ·)."""
        return x.unflatten(1, (self.N, self.G)).transpose(2, 3).reshape(self.B * self.N, self.R * self.G, -1)

    def apart(self, x: Tensor) -> Tensor:
        """(B·N, R·G, ·) as (B, H, R, ·)."""
        return x.view(self.B, self.N, self.R, self.G, -1).transpose(2, 3).reshape(self.B, self.N * self.G, self.R, -1)


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _Heads(q, k).together(q), k.flatten(0, 1), v.flatten(0, 1)


@lru_cache(256)
def _bias(
    rows: tuple[int, int], columns: tuple[int, int], window: int | None, G: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    return _as_bias(_mask(rows, columns, window, None, device), G, dtype)


def _as_bias(mask: Tensor, G: int, dtype: torch.dtype) -> Tensor:
    """0 where ``mask`` (..., R, C) is true and UNSEEN elsewhere, each row G times: (..., R·G, C)."""
    bias = torch.where(mask, 0.0, UNSEEN).to(dtype)
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
