"""Grouped-query attention with full-width QK-norm and rotary positions, and the primitive that attends.

B batch, T positions, D model width, H query heads, N key/value heads, K head dim. On an axis ``tp`` a rank has some of the
heads; the stream x is its part of the sequence, gathered for the projections (sequence parallelism, Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels.attention_cp import AttendVJP, attend_over, attend_over_vjp
from olmo_fn.kernels.attention_tiles import attend_vjp
from olmo_fn.mesh.axis import Axis
from olmo_fn.nn.cache import attend_seen, kv_cache, remember
from olmo_fn.nn.context import Context
from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.rope import rope_table, rotate
from olmo_fn.nn.sublayer import Names, Result, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


def attention_sublayer(
    d_model: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    *,
    window: int | None,
    theta: float,
    eps: float,
    std: float,
    std_out: float,
    attend: AttendVJP = attend_vjp,
) -> Sublayer:
    """Attention as a sublayer. Weights are (in, out); the norms of queries and keys span all heads, as in OLMo 2.

    ``window``: tokens that a position sees, itself included; None sees all before it. ``attend`` computes softmax attention and
    its pullback on the fast path.
    """
    heads, kv, rope = n_heads * head_dim, n_kv_heads * head_dim, ("rope", head_dim, theta)

    def qkv(p: Tree, x: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        q, k, v = ctx.column_linear(x, p["w_q"], p["w_k"], p["w_v"])
        place = ctx.fuse(norm_and_rotate, head_dim, eps, ctx.backend.axes.tp)
        return place(p["q_norm"], p["k_norm"], q, k, v, *ctx.tables[rope])

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        q, k, v = qkv(p, x, ctx)
        return ctx.row_linear(attention(ctx, q, k, v, window, attend), p["w_out"])

    def extend(p: Tree, x: Tensor, ctx: Context, cache: Tree) -> tuple[Tensor, Tree]:
        q, k, v = qkv(p, x, ctx)
        out = attend_seen(q, remember(cache, k, v, ctx, window))
        return ctx.row_linear(_side_by_side(out), p["w_out"]), cache

    def empty_cache(rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Tree:
        return kv_cache(rows, n_kv_heads, capacity, head_dim, window, dtype, device)

    def flops(length: int) -> int:
        return 2 * length * d_model * (2 * heads + 2 * kv) + 4 * heads * causal_pairs(length, window)

    return Sublayer(
        "attention",
        specs={
            "w_q": Spec((d_model, heads), ("embed", "heads"), Init("trunc_normal", std)),
            "w_k": Spec((d_model, kv), ("embed", "kv_heads"), Init("trunc_normal", std)),
            "w_v": Spec((d_model, kv), ("embed", "kv_heads"), Init("trunc_normal", std)),
            "w_out": Spec((heads, d_model), ("heads", "embed"), Init("trunc_normal", std_out)),
            "q_norm": rms_norm_spec(heads, "heads"),
            "k_norm": rms_norm_spec(kv, "kv_heads"),
        },
        apply=apply,
        flops=flops,
        extend=extend,
        cache=empty_cache,
        remembers=inf if window is None else window,
        tables={rope: lambda positions: rope_table(positions, head_dim, theta)},
        divided=("tp", "cp"),
        names=NAMES,
    )


NAMES = {
    "w_q": Names("self_attn.q_proj.weight", "attention.w_q.weight"),
    "w_k": Names("self_attn.k_proj.weight", "attention.w_k.weight"),
    "w_v": Names("self_attn.v_proj.weight", "attention.w_v.weight"),
    "w_out": Names("self_attn.o_proj.weight", "attention.w_out.weight"),
    "q_norm": Names("self_attn.q_norm.weight", "attention.q_norm.weight"),
    "k_norm": Names("self_attn.k_norm.weight", "attention.k_norm.weight"),
}


def causal_pairs(length: int, window: int | None = None) -> int:
    """Pairs of a query and a key that it sees, in one sequence: ``S (S + 1) / 2``, or with a window w below S
    ``w (w + 1) / 2 + (S - w) w``.

    >>> causal_pairs(4), causal_pairs(4, window=2)
    (10, 7)
    """
    w = length if window is None else min(window, length)
    return w * (w + 1) // 2 + (length - w) * w


def norm_and_rotate(
    head_dim: int,
    eps: float,
    tp: Axis,
    q_norm: Tensor,
    k_norm: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed and rotated queries (B, H, T, K), keys and values (B, N, T, K), of projections (B, T, H·K) and (B, T, N·K).

    The norms span the heads of all ranks of ``tp``.
    """
    q = rotate(rms_norm(q_norm, q, eps, tp).unflatten(-1, (-1, head_dim)), cos, sin)
    k = rotate(rms_norm(k_norm, k, eps, tp).unflatten(-1, (-1, head_dim)), cos, sin)
    v = v.unflatten(-1, (-1, head_dim))
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def attention(ctx: Context, q: Tensor, k: Tensor, v: Tensor, window: int | None, attend: AttendVJP = attend_vjp) -> Tensor:
    """Causal softmax(q kᵀ / √K) v, inside documents if there are any, with the heads side by side: (B, T, H·K).

    ``q`` (B, H, T, K), ``k``, ``v`` (B, N, T, K) of this rank's positions and heads.
    """
    backend, documents = ctx.backend, ctx.documents
    cp, method = backend.axes.cp, backend.cp_method
    if not backend.primitive:
        return _side_by_side(attend_over(q, k, v, cp=cp, method=method, window=window, documents=documents))
    options: dict[str, Any] = {"cp": cp, "method": method, "window": window, "documents": documents}
    vjp = _attention_vjp(partial(attend_over_vjp, **options, kernel=backend.kernel, attend=attend))
    return backend.primitive(vjp, [], [q, k, v])


def _attention_vjp(attend: Callable[..., Any]) -> VJP:
    def vjp(_: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        q, k, v = inputs
        out, back = attend(q, k, v)
        rows = _side_by_side(out)  # what the next product keeps as well; so the other order of the heads is not kept

        def pullback(cotangent: Tensor) -> tuple[Sequence[Any], Sequence[Tensor]]:
            by_head = rows.view(*rows.shape[:2], -1, q.shape[-1]).transpose(1, 2)
            return (), back(by_head, cotangent.view(by_head.transpose(1, 2).shape).transpose(1, 2).contiguous())

        return rows, pullback

    return vjp


def _side_by_side(heads: Tensor) -> Tensor:
    """(B, H, T, K) as (B, T, H·K)."""
    return heads.transpose(1, 2).flatten(2)
