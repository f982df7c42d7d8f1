"""The model over a growing sequence: keys and values of what was seen are kept, so a new token costs one row.

Rows of different lengths are padded at the left, so that their newest tokens share a column. A row is
computed as if it were alone: positions count from its first token, and no token sees the padding.

B batch, T new columns, V vocabulary.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import PLAIN
from olmo_fn.models.config import Model
from olmo_fn.models.transformer import embedded, extend_layer, head_logits, layers, tables_of
from olmo_fn.nn.context import Context
from olmo_fn.tree import Tree

CHUNK = 128  # columns computed at once: bounds the memory of the scores


class Cache(NamedTuple):
    """What a model remembers of a batch of sequences.

    ``blocks``: by layer, and by the sublayer's name, what the sublayer keeps; ``length``: columns filled so far, of
    ``capacity``; ``padding``: (B,) int64, columns at the left of each row that are no tokens, or None if no row has any.
    """

    blocks: Tree
    length: int
    capacity: int
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
    """A cache for ``capacity`` columns of ``rows`` sequences; of attention, 2 · layers · B · N · S · K entries.

    S is the capacity, in layers with a window no more than that.
    """
    blocks: Tree = {
        str(i): {sub.name: sub.cache(rows, capacity, dtype, device) for sub in layer.sublayers}
        for i, layer in enumerate(layers(cfg))
    }
    return Cache(blocks, 0, capacity, padding)


def rewound(cfg: Model, cache: Cache, length: int) -> Cache | None:
    """The cache as it was after ``length`` columns; None where a sublayer has overwritten what it held then."""
    kept = min((sub.remembers for layer in layers(cfg) for sub in layer.sublayers if sub.extend), default=inf)
    return cache._replace(length=length) if length == cache.length or cache.length <= kept else None


def enlarged(cfg: Model, cache: Cache, capacity: int) -> Cache:
    """The same columns in a cache for ``capacity`` of them, which are at least as many."""
    leaves = tree.flatten(cache.blocks)
    some = next(iter(leaves.values()))
    new = empty_cache(cfg, some.shape[0], capacity, cache.padding, device=some.device)

    def filled(path: str, leaf: Tensor) -> Tensor:
        old = leaves[path]
        leaf = leaf.to(old.dtype)  # a state may be kept in another than keys and values
        leaf[tuple(map(slice, old.shape))] = old
        return leaf

    return new._replace(blocks=tree.map_with_path(filled, new.blocks), length=cache.length)


def extend(cfg: Model, params: Tree, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """Logits (B, V) after the last column of ``ids`` (B, T) int64, and the cache with these columns in it.

    It reads a whole prompt or one new token alike. The cache that is passed in is used up: the new one lives
    in its memory. ValueError if T columns do not fit.

    >>> from olmo_fn.models import transformer
    >>> from olmo_fn.models.config import dense
    >>> from olmo_fn.spec import init
    >>> cfg = dense(8, 1, 2, 16, vocab_size=11)
    >>> params, ids = init(transformer.specs(cfg), seed=0), torch.tensor([[1, 2, 3]])
    >>> _, cache = extend(cfg, params, ids[:, :2], empty_cache(cfg, 1, 3))
    >>> logits, cache = extend(cfg, params, ids[:, 2:], cache)
    >>> torch.allclose(logits, transformer.logits(cfg, params, {"input_ids": ids})[:, -1])
    True
    """
    if not 0 < ids.shape[1] <= cache.capacity - cache.length:
        raise ValueError(
            f"{ids.shape[1]} columns for a cache of {cache.capacity} that holds {cache.length}; "
            f"give it from 1 to {cache.capacity - cache.length}, or make a larger one"
        )
    for part in ids.split(CHUNK, dim=1):
        x, cache = _extend(cfg, params, part, cache)
    return head_logits(cfg, params, x[:, -1]), cache


def _extend(cfg: Model, params: Tree, ids: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
    """The last block's output (B, T, D) for a few columns, and the new cache."""
    start, stop = cache.length, cache.length + ids.shape[1]
    columns, built = torch.arange(start, stop, device=ids.device), layers(cfg)
    positions = columns if cache.padding is None else (columns - cache.padding[:, None]).clamp(min=0)
    tables = tables_of(built, positions)
    ctx = Context(PLAIN, ids, None, positions, tables=tables, start=start, padding=cache.padding)
    x, blocks = embedded(cfg, params, ctx), {}
    for i, layer in enumerate(built):
        x, blocks[str(i)] = extend_layer(layer, params["blocks"][str(i)], x, ctx, cache.blocks[str(i)])
    return x, cache._replace(blocks=blocks, length=stop)
