"""The projections of grouped-query attention, with full-width QK-norm and rotary positions; `attend` is between them.

B batch, T positions, D model width, H query heads, N key/value heads, K head dim.
"""

from __future__ import annotations

from torch import Tensor

from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.rope import rotate
from olmo_fn.parallel.axis import Axis
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


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


def project(
    p: Tree,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    head_dim: int,
    eps: float,
    tp: Axis = Axis(),  # noqa: B008
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, N, T, K) of ``x`` (B, T, D): projected, normalised, rotated.

    On an axis ``tp`` each rank has some of the heads, and the norms still span all of them.
    """
    B, T, _ = x.shape
    q = rotate(rms_norm(p["q_norm"], x @ p["w_q"], eps, tp).view(B, T, -1, head_dim), cos, sin)
    k = rotate(rms_norm(p["k_norm"], x @ p["w_k"], eps, tp).view(B, T, -1, head_dim), cos, sin)
    v = (x @ p["w_v"]).view(B, T, -1, head_dim)
    return q.transpose(1, 2).contiguous(), k.transpose(1, 2).contiguous(), v.transpose(1, 2).contiguous()


def merge_heads(w_out: Tensor, heads: Tensor) -> Tensor:
    """The heads' results (B, H, T, K) side by side through ``w_out`` (H·K, D): (B, T, D)."""
    return heads.transpose(1, 2).flatten(2) @ w_out
