"""The model over a growing sequence: keys and values of what was seen are kept, so a new token costs one row.

Rows of different lengths are padded at the left, so that their newest tokens share a column. A row is
computed as if it were alone: positions count from its first token, and no token sees the padding.

B batch, T new columns, S capacity of the cache, N key/value heads, K head dim, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn.kernels.attention_tiles import attend_masked, visible
from olmo_fn.mesh.axis import Axis
from olmo_fn.models.config import Model
from olmo_fn.models.transformer import embed, head_logits, residual
from olmo_fn.nn.attention import merge_heads, place_heads, project
from olmo_fn.nn.feed_forward import feed_forward
from olmo_fn.nn.rope import rope_table
from olmo_fn.tree import Tree

CHUNK = 128  # columns computed at once: bounds the memory of the scores


class Cache(NamedTuple):
    """What a model remembers of a batch of sequences.

    ``blocks``: by layer ``{"k": (B, N, S, K), "v": (B, N, S, K)}``; ``length``: columns filled so far;
    ``padding``: (B,) int64, columns at the left of each row that are no tokens, or None if no row has any.
    """

    blocks: Tree
    length: int
    padding: Tensor | None


def empty_cache(
    cfg: Model,
    rows: int,
    capacity: int,
    padding: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Cache:
    """A cache for ``capacity`` columns of ``rows`` sequences: 2 · layers · B · N · S · K entries."""
    shape = (rows, cfg.kv_heads, capacity, cfg.k)
    blocks: Tree = {
        str(layer): {name: torch.empty(shape, dtype=dtype, device=device) for name in ("k", "v")}
        for layer in range(cfg.n_layers)
    }
    return Cache(blocks, 0, padding)


def extend(cfg: Model, params: Tree, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """Logits (B, V) after the last column of ``ids`` (B, T) int64, and the cache with these columns in it.

    It reads a whole prompt or one new token alike. The cache that is passed in is used up: the new one lives
    in its memory. ValueError if T columns do not fit.

    >>> from olmo_fn.models import transformer
    >>> from olmo_fn.spec import init
    >>> cfg = Model(8, 1, 2, 16, vocab_size=11)
    >>> params, ids = init(transformer.specs(cfg), seed=0), torch.tensor([[1, 2, 3]])
    >>> _, cache = extend(cfg, params, ids[:, :2], empty_cache(cfg, 1, 3))
    >>> logits, cache = extend(cfg, params, ids[:, 2:], cache)
    >>> torch.allclose(logits, transformer.logits(cfg, params, {"input_ids": ids})[:, -1])
    True
    """
    capacity = cache.blocks["0"]["k"].shape[2]
    if not 0 < ids.shape[1] <= capacity - cache.length:
        raise ValueError(
            f"{ids.shape[1]} columns for a cache of {capacity} that holds {cache.length}; "
            f"give it from 1 to {capacity - cache.length}, or make a larger one"
        )
    for part in ids.split(CHUNK, dim=1):
        x, cache = _extend(cfg, params, part, cache)
    return head_logits(cfg, params, x[:, -1]), cache


def _extend(cfg: Model, params: Tree, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """The last block's output (B, T, D) for a few columns, and the new cache."""
    start, stop = cache.length, cache.length + ids.shape[1]
    columns = torch.arange(start, stop, device=ids.device)
    pads = cache.padding
    positions = columns if pads is None else (columns - pads[:, None]).clamp(min=0)
    cos, sin = rope_table(positions, cfg.k, cfg.rope_theta)
    windows = [cfg.window(layer) for layer in range(cfg.n_layers)]
    sees = {window: _seen(start, stop, window, pads, ids.device) for window in set(windows)}
    x = embed(params["embed"], ids)
    for layer, window in enumerate(windows):
        p, kept, (first, mask) = params["blocks"][str(layer)], cache.blocks[str(layer)], sees[window]
        a = p["attention"]
        qkv = project(a["w_q"], a["w_k"], a["w_v"], x)
        q, k, v = place_heads(a["q_norm"], a["k_norm"], qkv, cos, sin, cfg.k, cfg.norm_eps, Axis())
        if k.shape[1] != q.shape[1]:
            q = q.unflatten(1, (k.shape[1], -1))
        kept["k"][:, :, start:stop] = k
        kept["v"][:, :, start:stop] = v
        out = attend_masked(q, kept["k"][:, :, first:stop], kept["v"][:, :, first:stop], mask)
        x = residual(p["attention_norm"], x, merge_heads(a["w_out"], out), cfg.norm_eps)
        x = residual(p["feed_forward_norm"], x, feed_forward(p["feed_forward"], x), cfg.norm_eps)
    return x, cache._replace(length=stop)


def _seen(start: int, stop: int, window: int | None, pads: Tensor | None, device: torch.device) -> tuple[int, Tensor]:
    """The first column that any of columns ``start`` to ``stop`` sees, and the mask from there.

    The mask is (T, stop - first), or with padding (B, 1, T, stop - first).
    """
    first = 0 if window is None else max(0, start - window + 1)
    rows, columns = torch.arange(start, stop, device=device), torch.arange(first, stop, device=device)
    mask = visible(rows, columns, window)
    if pads is None:
        return first, mask
    # Padding sees padding: a row of the softmax without anything to see would be NaN, and spread.
    token_row, token_column = rows >= pads[:, None], columns >= pads[:, None]
    return first, (mask & (token_row[:, :, None] == token_column[:, None, :]))[:, None]
