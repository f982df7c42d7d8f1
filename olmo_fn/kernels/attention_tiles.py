"""Softmax attention by tiles: a plain form to differentiate, and a faster one that brings its own pullback.

B batch, T positions, H query heads, N key/value heads, G = H / N, K head dim; R rows and C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.kernels import Kernel, identity
from olmo_fn.kernels.attention_cpu import attend_whole_vjp, suits
from olmo_fn.kernels.exponential import exp

Pullback: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""From the result (B, H, R, K), which the caller keeps, and its cotangent, to the cotangents of queries, keys and values."""

FAR = 1e30  # taken from a score for each position out of sight: finite, so that a row that sees nothing has no NaN
TILE = 128  # rows or columns of a tile: its scores stay in the processor's cache between two products


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
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, documents: Tensor | None = None, offset: int = 0
) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, in plain differentiable operations: the definition.

    ``q`` (B, H, R, K) for the positions from ``offset`` on, ``k`` and ``v`` (B, N, T, K), N dividing H, for those from 0 on.
    ``documents`` (B, T), from `document_starts`: those of different documents do not see each other. Returns (B, H, R, K).
    The softmax is in fp32. By blocks of rows, each of which multiplies only with keys that it may see.
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
) -> tuple[Tensor, Pullback]:
    """`attend` with its pullback, which takes the result and its cotangent to the cotangents of ``q``, ``k`` and ``v``.

    Keeps only each row's log-sum-exp beside these, and computes the weights again (Dao et al. 2022, FlashAttention,
    algorithms 1 and 4). ``kernel`` compiles what is between the products.
    """
    if offset == 0 and suits(q, k, window, documents):
        return attend_whole_vjp(q, k, v)
    tiles = Tiles(window, documents, offset, 0, kernel)
    out, lse = tiles.forward(q, k, v)

    def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return tiles.backward(q, k, v, cotangent, lse, row_products(cotangent, out))

    return out, pullback


def row_products(d_out: Tensor, out: Tensor) -> Tensor:
    """Σ d_out · out over the last dim (B, H, R), in at least fp32: what a softmax's backward subtracts (delta)."""
    return (d_out.to(torch.promote_types(out.dtype, torch.float32)) * out).sum(-1)


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
        weigh, total, size = self.kernel(_weigh), self.kernel(_total), heads.G
        out, lse = torch.empty_like(queries), queries.new_empty(queries.shape[:2], dtype=heads.wide)
        positions, sight = self._positions(k.shape[2], heads), self._sight(heads)
        scratch = q.new_empty(queries.shape[0] * min(TILE, q.shape[2]) * size * k.shape[2])
        for start in reversed(range(0, q.shape[2], TILE)):  # the widest first, so that kernels are not traced with a square
            stop = min(start + TILE, q.shape[2])
            columns, rows = self._columns(start, stop, k.shape[2]), slice(start * size, stop * size)
            some_queries, some_keys, some_values = _contiguous(queries[:, rows], keys[:, columns], values[:, columns])
            weights = _product(scratch, some_queries, some_keys.mT)
            at, *seen = _own(positions[columns], *(x[:, :, rows, None] for x in sight))
            top = weigh(heads.by_row(weights), at, heads.scale, *seen)
            sums, lse[:, rows] = total(weights, top.flatten(0, 1))
            torch.div(torch.bmm(weights, some_values), sums, out=out[:, rows])
        return heads.apart(out), heads.apart(lse[..., None])[..., 0]

    def backward(
        self, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, lse: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Cotangents of ``q``, ``k`` and ``v`` from that of the result. ``lse`` and ``delta``, `row_products` of the result,
        may be those of a softmax over more keys than these.
        """
        queries, keys, values, heads = *_by_kv_head(q, k, v), _Heads(q, k)
        d_out, lse, delta = heads.together(d_out), *(heads.together(x[..., None])[..., 0] for x in (lse, delta))
        gradient, size = self.kernel(_gradient), heads.G
        d_q = torch.zeros_like(queries, dtype=heads.wide)
        d_k, d_v = torch.zeros_like(keys), torch.zeros_like(values)
        positions, sight = self._positions(k.shape[2], heads), self._sight(heads)
        one, two = (q.new_empty(queries.shape[0] * min(TILE, k.shape[2]) * size * q.shape[2]) for _ in range(2))
        for start in range(0, k.shape[2], TILE):
            stop = min(start + TILE, k.shape[2])
            first, last = self._rows(start, stop, q.shape[2])
            if first >= last:
                continue
            rows, columns = slice(first * size, last * size), slice(start, stop)
            some_queries, some_d_out, *statistics = _contiguous(*(x[:, rows] for x in (queries, d_out, lse, delta)))
            some_keys, some_values = _contiguous(keys[:, columns], values[:, columns])
            weights = _product(one, some_keys, some_queries.mT)
            d_scores = _product(two, some_values, some_d_out.mT)
            tiles = (heads.by_row(x) for x in (weights, d_scores, *(x[:, None] for x in statistics)))
            at, *seen = _own(positions[columns, None], *(x[:, :, None, rows] for x in sight))
            gradient(*tiles, at, heads.scale, *seen)
            torch.bmm(weights, some_d_out, out=d_v[:, columns])
            torch.bmm(d_scores, some_queries, out=d_k[:, columns])
            d_q[:, rows].add_(torch.bmm(d_scores.mT, some_keys))
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

    def _positions(self, T: int, heads: _Heads) -> Tensor:
        """Of each key its position, times `FAR`."""
        return torch.arange(self.key_offset, self.key_offset + T, dtype=heads.wide, device=heads.device) * FAR

    def _sight(self, heads: _Heads) -> tuple[Tensor, ...]:
        """Of each row the last position that it sees, and the first if that is not always 0; (1 or B, 1, R·G), times `FAR`."""
        last = torch.arange(self.offset, self.offset + heads.R, device=heads.device)
        first = [] if self.window is None else [(last - self.window + 1)[None]]
        first += [] if self.documents is None else [self.documents[:, self.offset : self.offset + heads.R]]
        ends = last[None], *([torch.maximum(first[0], first[-1])] if first else [])
        return tuple(x.repeat_interleave(heads.G, -1)[:, None].to(heads.wide) * FAR for x in ends)


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

    def by_row(self, x: Tensor) -> Tensor:
        """(B·N, ·, ·) as (B, N, ·, ·)."""
        return x.unflatten(0, (self.B, self.N))

    def apart(self, x: Tensor) -> Tensor:
        """(B·N, R·G, ·) as (B, H, R, ·)."""
        return x.view(self.B, self.N, self.R, self.G, -1).transpose(2, 3).reshape(self.B, self.N * self.G, self.R, -1)


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _Heads(q, k).together(q), k.flatten(0, 1), v.flatten(0, 1)


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)  # a batched product copies what is not, and slower


def _own(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In memory of their own: a kernel is compiled again for a view that begins elsewhere, or is strided."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _product(scratch: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The batched product of ``a`` (n, R, K) and ``b`` (n, K, C), in the memory of ``scratch``."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=scratch[: math.prod(shape)].view(shape))


def _weigh(scores: Tensor, positions: Tensor, scale: float, last: Tensor, first: Tensor | None = None) -> Tensor:
    """Overwrite ``scores`` (B, N, R, C) by exp(x - max x), x the scaled and masked scores; returns max x (B, N, R, 1)."""
    x = _masked(scores, positions, scale, last, first)
    top = x.amax(-1, keepdim=True)
    scores.copy_(exp(x - top))
    return top


def _masked(scores: Tensor, positions: Tensor, scale: float, last: Tensor, first: Tensor | None) -> Tensor:
    x = scores.to(positions.dtype) * scale - (positions - last).relu()
    return x if first is None else x - (first - positions).relu()


def _total(weights: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """Sums (n, R, 1) of the rows of what `_weigh` wrote, and the log-sum-exp (n, R).

    Apart from `_weigh`, since Inductor makes one slow loop of an exponential that is both stored and added up.
    """
    total = weights.to(top.dtype).sum(-1, keepdim=True)
    return total, (top + total.log())[..., 0]


def _gradient(
    scores: Tensor,
    d_weights: Tensor,
    lse: Tensor,
    delta: Tensor,
    positions: Tensor,
    scale: float,
    last: Tensor,
    first: Tensor | None = None,
) -> None:
    """Overwrite transposed ``scores`` (B, N, C, R) by the weights, and ``d_weights`` by the cotangent of the scores."""
    weights = exp(_masked(scores, positions, scale, last, first) - lse)
    d_scores = weights * (d_weights.to(lse.dtype) - delta) * scale
    scores.copy_(weights)
    d_weights.copy_(d_scores)
