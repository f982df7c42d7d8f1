"""The parts of grouped-query attention around `attend`: projections, full-width QK-norm with rotary positions, output.

B batch, T positions, D model width, H query heads, N key/value heads, K head dim. On an axis ``tp`` a rank has some of the
heads; the stream x is its part of the sequence, gathered for the projections (sequence parallelism, Korthikanti et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, reduce_scatter
from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.rope import rotate
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

Later: TypeAlias = Callable[[], tuple[Tensor, ...]]  # gradients of weights, computed when called
QKV: TypeAlias = tuple[Tensor, Tensor, Tensor]


def attention_specs(d_model: int, n_heads: int, n_kv_heads: int, head_dim: int, *, std: float, std_out: float) -> Tree:
    """Weights are (in, out); the norms of queries and keys span all heads, as in OLMo 2."""
    heads, kv = n_heads * head_dim, n_kv_heads * head_dim
    return {
        "w_q": Spec((d_model, heads), ("embed", "heads"), Init("trunc_normal", std)),
        "w_k": Spec((d_model, kv), ("embed", "kv_heads"), Init("trunc_normal", std)),
        "w_v": Spec((d_model, kv), ("embed", "kv_heads"), Init("trunc_normal", std)),
        "w_out": Spec((heads, d_model), ("heads", "embed"), Init("trunc_normal", std_out)),
        "q_norm": rms_norm_spec(heads, "heads"),
        "k_norm": rms_norm_spec(kv, "kv_heads"),
    }


def project(w_q: Tensor, w_k: Tensor, w_v: Tensor, x: Tensor, tp: Axis = Axis()) -> QKV:  # noqa: B008
    """Queries (B, T, H·K), keys and values (B, T, N·K) of the stream ``x`` (B, T, D)."""
    h = all_gather(x, 1, tp)
    return h @ w_q, h @ w_k, h @ w_v


def project_vjp(
    w_q: Tensor, w_k: Tensor, w_v: Tensor, x: Tensor, tp: Axis
) -> tuple[QKV, Callable[[QKV, Tensor], tuple[Later, Tensor]]]:
    """`project` with its pullback: from its results' cotangents, and one of ``x`` to add to, to the weights' and ``x``'s."""
    h = all_gather(x, 1, tp).flatten(0, 1)
    out = tuple((h @ w).unflatten(0, (x.shape[0], -1)) for w in (w_q, w_k, w_v))

    def pullback(cotangents: QKV, d_x: Tensor) -> tuple[Later, Tensor]:
        d_q, d_k, d_v = (c.flatten(0, 1) for c in cotangents)
        if tp.size == 1:
            d_h = torch.addmm(d_x.flatten(0, 1), d_q, w_q.T).addmm_(d_k, w_k.T).addmm_(d_v, w_v.T).view_as(x)
        else:
            d_h = (d_q @ w_q.T).addmm_(d_k, w_k.T).addmm_(d_v, w_v.T)
            d_h = d_x + reduce_scatter(d_h.unflatten(0, (x.shape[0], -1)), 1, tp)
        return lambda: (h.T @ d_q, h.T @ d_k, h.T @ d_v), d_h

    return out, pullback


def place_heads(q_norm: Tensor, k_norm: Tensor, qkv: QKV, cos: Tensor, sin: Tensor, head_dim: int, eps: float, tp: Axis) -> QKV:
    """Normed and rotated queries (B, H, T, K), keys and values (B, N, T, K). The norms span the heads of all ranks."""
    q, k, v = qkv
    q = rotate(rms_norm(q_norm, q, eps, tp).unflatten(-1, (-1, head_dim)), cos, sin)
    k = rotate(rms_norm(k_norm, k, eps, tp).unflatten(-1, (-1, head_dim)), cos, sin)
    v = v.unflatten(-1, (-1, head_dim))
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def merge_heads(w_out: Tensor, heads: Tensor, tp: Axis = Axis()) -> Tensor:  # noqa: B008
    """The heads' results (B, H, T, K) side by side through ``w_out`` (H·K, D): (B, T, D)."""
    return reduce_scatter(heads.transpose(1, 2).flatten(2) @ w_out, 1, tp)


def merge_heads_vjp(w_out: Tensor, heads: Tensor, tp: Axis) -> tuple[Tensor, Callable[[Tensor], tuple[Later, Tensor]]]:
    """`merge_heads` with its pullback."""
    B, H, T, K = heads.shape

    def side_by_side() -> Tensor:
        return heads.transpose(1, 2).reshape(B * T, H * K)

    out = reduce_scatter((side_by_side() @ w_out).view(B, T, -1), 1, tp)

    def pullback(cotangent: Tensor) -> tuple[Later, Tensor]:
        d_out = all_gather(cotangent, 1, tp).flatten(0, 1)
        d_heads = (d_out @ w_out.T).view(B, T, H, K).transpose(1, 2).contiguous()
        return lambda: (side_by_side().T @ d_out,), d_heads

    return out, pullback
