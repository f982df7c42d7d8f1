"""The keys and values that attention keeps while a model decodes: all columns, or with a window a ring of the last ones.

B batch, T new columns, H query heads, N key/value heads, S columns of the cache, C columns that are looked at, K head dim.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.kernels.attention import attend_masked
from olmo_fn.nn.context import Context
from olmo_fn.tree import Tree


class Seen(NamedTuple):
    """Keys and values (B, N, C, K) that new columns look at, and which of these each of them sees.

    ``mask`` (T, C), or with padding (B, 1, T, C), of booleans with at least one true in each row; None: all see all.
    """

    k: Tensor
    v: Tensor
    mask: Tensor | None


def kv_cache(
    rows: int, n_kv_heads: int, capacity: int, head_dim: int, window: int | None, dtype: torch.dtype, device: torch.device | str
) -> Tree:
    """Empty keys and values (B, N, S, K) for ``capacity`` columns, of which no more than ``window`` are kept."""
    size = capacity if window is None else min(window, capacity)
    return {name: torch.empty(rows, n_kv_heads, size, head_dim, dtype=dtype, device=device) for name in ("k", "v")}


def remember(cache: Tree, k: Tensor, v: Tensor, ctx: Context, window: int | None) -> Seen:
    """Put ``k``, ``v`` (B, N, T, K) of the columns from ``ctx.start`` on into ``cache``, and say what they look at.

    Column c is in slot c mod S. A single new column overwrites the one that has just left its window, so it looks at the
    cache itself, in the order of the slots. Several that do not fit before the end look at a copy: those that were there,
    and then themselves.
    """
    start, T, S = ctx.start, k.shape[2], cache["k"].shape[2]
    stop = start + T
    if stop <= S or T == 1:
        _put(cache, k, v, start)
        k, v = cache["k"][:, :, :stop], cache["v"][:, :, :stop]
        if T == 1 and ctx.padding is None:
            return Seen(k, v, None)  # all that is there
        columns = _columns(stop, min(stop, S), k.device)
    else:
        old = min(start, S)
        columns = torch.cat((_columns(start, old, k.device), torch.arange(start, stop, device=k.device)))
        seen = tuple(torch.cat((cache[name][:, :, :old], new), 2) for name, new in (("k", k), ("v", v)))
        _put(cache, k, v, start)
        k, v = seen
    return Seen(k, v, sight(torch.arange(start, stop, device=k.device), columns, window, ctx.padding))


def _columns(stop: int, S: int, device: torch.device) -> Tensor:
    """The column (S,) in each of S slots that were filled up to ``stop``, at least once around."""
    last = stop - 1
    return last - (last - torch.arange(S, device=device)) % max(S, 1)


def _put(cache: Tree, k: Tensor, v: Tensor, start: int) -> None:
    """Write the last S of the columns from ``start`` on into their slots: up to the ring's end, then from its beginning."""
    S, stop = cache["k"].shape[2], start + k.shape[2]
    first = max(start, stop - S)
    turn = min(stop, -(-(first + 1) // S) * S)  # the next column whose slot is the first
    for a, b in ((first, turn), (turn, stop)):
        if a < b:
            slots, new = slice(a % S, a % S + b - a), slice(a - start, b - start)
            cache["k"][:, :, slots], cache["v"][:, :, slots] = k[:, :, new], v[:, :, new]


def sight(rows: Tensor, columns: Tensor, window: int | None, padding: Tensor | None) -> Tensor:
    """Which of ``columns`` (C,) each of the columns ``rows`` (T,) sees: (T, C), or with ``padding`` (B,) a (B, 1, T, C).

    >>> sight(torch.tensor([3]), torch.tensor([4, 1, 2, 3]), 2, None).int().tolist()
    [[0, 0, 1, 1]]
    """
    distance = rows[:, None] - columns
    mask = (distance >= 0) if window is None else (distance >= 0) & (distance < window)
    if padding is None:
        return mask
    # Padding sees padding: a row of the softmax without anything to see would be NaN, and spread.
    token_row, token_column = rows >= padding[:, None], columns >= padding[:, None]
    return (mask & (token_row[:, :, None] == token_column[:, None, :]))[:, None]


def attend_seen(q: Tensor, seen: Seen, *, sinks: Tensor | None = None, cap: float | None = None) -> Tensor:
    """softmax(q kᵀ / √K) v over what is seen; ``q`` and the result are (B, H, T, K). The rest as `attend_masked` has it."""
    q = q if seen.k.shape[1] == q.shape[1] else q.unflatten(1, (seen.k.shape[1], -1))
    mask = seen.mask
    if mask is None and (sinks is not None or cap is not None):
        mask = torch.ones(q.shape[-2], seen.k.shape[2], dtype=torch.bool, device=q.device)
    if mask is not None:
        return attend_masked(q, seen.k, seen.v, mask, sinks=sinks, cap=cap)
    # Nothing tells apart the heads that share keys and values: they are so many rows of queries.
    return F.scaled_dot_product_attention(q.flatten(2, -2), seen.k, seen.v).view_as(q).flatten(1, -3)
