"""Softmax attention tile by tile: the backend of a CPU, and of everything that no other one can.

B batch, T positions, H query heads, N key/value heads, G = H / N, K head dim; R rows and C columns of a tile.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from olmo_fn.kernels.attention_backend import AttentionBackend, Scores, row_products
from olmo_fn.kernels.attention_sight import FAR, Tile
from olmo_fn.kernels.exponential import exp


def _forward(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
    """By tiles of rows: the result (B, H, R, K), and the log-sum-exp of each row (B, H, R)."""
    queries, keys, values, heads = *_by_kv_head(q, k, v), _Heads(q, k)
    weigh, total = scores.kernel(_weigh), scores.kernel(_total)
    out, lse = torch.zeros_like(queries), queries.new_full(queries.shape[:2], -FAR, dtype=heads.wide)
    positions, ends = _positions(scores, k.shape[2], heads), _ends(scores, heads)
    tiles = list(scores.sight.row_tiles(heads.B, heads.R, k.shape[2]))
    scratch = q.new_empty(heads.largest(tiles))
    for tile in tiles:
        some, rows, columns = heads.of(tile.batch), heads.rows(tile.rows), tile.columns
        some_queries, some_keys, some_values = _contiguous(queries[some, rows], keys[some, columns], values[some, columns])
        weights = _product(scratch, some_queries, some_keys.mT)
        at, *seen = _own(positions[columns], *(_of(x, tile.batch)[:, :, rows, None] for x in ends))
        top = weigh(heads.by_row(weights), at, heads.scale, scores.cap, *seen)
        sums, lse[some, rows] = total(weights, top.flatten(0, 1))
        torch.div(torch.bmm(weights, some_values), sums, out=out[some, rows])
    return heads.apart(out), heads.apart(lse[..., None])[..., 0], None


def _backward(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, kept: None, delta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """By tiles of columns, whose scores are transposed, so that the large operand of four products in five is contiguous and
    only the queries' gradient is added up.
    """
    delta = row_products(d_out, out) if delta is None else delta
    queries, keys, values, heads = *_by_kv_head(q, k, v), _Heads(q, k)
    d_out, lse, delta = heads.together(d_out), *(heads.together(x[..., None])[..., 0] for x in (lse, delta))
    gradient = scores.kernel(_gradient)
    d_q = torch.zeros_like(queries, dtype=heads.wide)
    d_k, d_v = torch.zeros_like(keys), torch.zeros_like(values)
    positions, ends = _positions(scores, k.shape[2], heads), _ends(scores, heads)
    tiles = list(scores.sight.column_tiles(heads.B, heads.R, k.shape[2]))
    one, two = (q.new_empty(heads.largest(tiles)) for _ in range(2))
    for tile in tiles:
        some, rows, columns = heads.of(tile.batch), heads.rows(tile.rows), tile.columns
        some_queries, some_d_out, *statistics = _contiguous(*(x[some, rows] for x in (queries, d_out, lse, delta)))
        some_keys, some_values = _contiguous(keys[some, columns], values[some, columns])
        weights = _product(one, some_keys, some_queries.mT)
        d_scores = _product(two, some_values, some_d_out.mT)
        parts = (heads.by_row(x) for x in (weights, d_scores, *(x[:, None] for x in statistics)))
        at, *seen = _own(positions[columns, None], *(_of(x, tile.batch)[:, :, None, rows] for x in ends))
        gradient(*parts, at, heads.scale, scores.cap, *seen)
        torch.bmm(weights, some_d_out, out=d_v[some, columns])
        torch.bmm(d_scores, some_queries, out=d_k[some, columns])
        d_q[some, rows].add_(torch.bmm(d_scores.mT, some_keys))
    return heads.apart(d_q.to(q.dtype)), d_k.view_as(k), d_v.view_as(v)


TILES = AttentionBackend("tiles", lambda need: "", _forward, _backward, by_head=True)


def _positions(scores: Scores, T: int, heads: _Heads) -> Tensor:
    """Of each key its position, times `FAR`."""
    start = scores.sight.key_offset
    return torch.arange(start, start + T, dtype=heads.wide, device=heads.device) * FAR


def _ends(scores: Scores, heads: _Heads) -> tuple[Tensor, ...]:
    """`Sight.ends` as (1 or B, 1, R·G), times `FAR`."""
    ends = scores.sight.ends(heads.R, heads.device)
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
        """(B·N, ·, ·) as (B, N, ·, ·), also of some sequences."""
        return x.unflatten(0, (-1, self.N))

    def of(self, batch: slice) -> slice:
        """Sequences, in B·N."""
        return slice(batch.start * self.N, batch.stop * self.N)

    def rows(self, rows: slice) -> slice:
        """Rows, in R·G."""
        return slice(rows.start * self.G, rows.stop * self.G)

    def largest(self, tiles: Sequence[Tile]) -> int:
        """Scores of the largest tile, over all heads."""
        return max((_length(t.batch) * _length(t.rows) * _length(t.columns) for t in tiles), default=0) * self.N * self.G

    def apart(self, x: Tensor) -> Tensor:
        """(B·N, R·G, ·) as (B, H, R, ·)."""
        return x.view(self.B, self.N, self.R, self.G, -1).transpose(2, 3).reshape(self.B, self.N * self.G, self.R, -1)


def _by_kv_head(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _Heads(q, k).together(q), k.flatten(0, 1), v.flatten(0, 1)


def _length(x: slice) -> int:
    return int(x.stop - x.start)


def _of(x: Tensor, batch: slice) -> Tensor:
    """Some sequences of (1 or B, ...), of which one stands for all."""
    return x if len(x) == 1 else x[batch]


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.contiguous() for x in tensors)  # a batched product copies what is not, and slower


def _own(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In memory of their own: a kernel is compiled again for a view that begins elsewhere, or is strided."""
    return tuple(x.clone(memory_format=torch.contiguous_format) for x in tensors)


def _product(scratch: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The batched product of ``a`` (n, R, K) and ``b`` (n, K, C), in the memory of ``scratch``."""
    shape = (a.shape[0], a.shape[1], b.shape[2])
    return torch.bmm(a, b, out=scratch[: math.prod(shape)].view(shape))


def _weigh(
    scores: Tensor, positions: Tensor, scale: float, cap: float | None, last: Tensor, first: Tensor | None = None
) -> Tensor:
    """Overwrite ``scores`` (B, N, R, C) by exp(x - max x), x the scaled and masked scores; returns max x (B, N, R, 1)."""
    x = _masked(_scaled(scores, positions.dtype, scale, cap), positions, last, first)
    top = x.amax(-1, keepdim=True)
    scores.copy_(exp(x - top))
    return top


def _scaled(scores: Tensor, dtype: torch.dtype, scale: float, cap: float | None) -> Tensor:
    x = scores.to(dtype) * scale
    return x if cap is None else cap * (x / cap).tanh()


def _masked(x: Tensor, positions: Tensor, last: Tensor, first: Tensor | None) -> Tensor:
    x = x - (positions - last).relu()
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
    cap: float | None,
    last: Tensor,
    first: Tensor | None = None,
) -> None:
    """Overwrite transposed ``scores`` (B, N, C, R) by the weights, and ``d_weights`` by the cotangent of the scores."""
    x = _scaled(scores, positions.dtype, scale, cap)
    weights = exp(_masked(x, positions, last, first) - lse)
    d_scores = weights * (d_weights.to(lse.dtype) - delta) * scale
    d_scores = d_scores if cap is None else d_scores * (1 - (x / cap).square())
    scores.copy_(weights)
    d_weights.copy_(d_scores)
