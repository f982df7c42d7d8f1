"""Grouped-query causal attention with full-width QK-norm, rotary positions and an optional sliding window.

B batch, T query positions, S key positions, D model width, H query heads, N key/value heads, G = H / N, K head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.nn.norm import rms_norm, rms_norm_spec
from olmo_fn.nn.rope import rotate
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


def project(p: Tree, x: Tensor, cos: Tensor, sin: Tensor, *, head_dim: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (B, H, T, K), keys and values (B, N, T, K) of ``x`` (B, T, D): projected, normalised, rotated."""
    B, T, _ = x.shape
    q = rotate(rms_norm(p["q_norm"], x @ p["w_q"], eps).view(B, T, -1, head_dim), cos, sin)
    k = rotate(rms_norm(p["k_norm"], x @ p["w_k"], eps).view(B, T, -1, head_dim), cos, sin)
    v = (x @ p["w_v"]).view(B, T, -1, head_dim)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def visible(rows: Tensor, columns: Tensor, window: int | None) -> Tensor:
    """Which key positions a query position sees: itself and those before it, at most ``window`` in all.

    >>> visible(torch.arange(3), torch.arange(3), window=2).int().tolist()
    [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    """
    distance = rows[:, None] - columns[None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, documents: Tensor | None = None) -> Tensor:
    """Causal softmax(q kᵀ / √K) v by blocks of rows, each of which multiplies only with keys that it may see.

    ``q`` (B, H, T, K), ``k`` and ``v`` (B, N, T, K) with N dividing H; ``documents`` (B, T): positions of different
    documents do not see each other. Returns (B, H, T, K). The softmax is in fp32.

    Plain matrix products by blocks, because torch's CPU flash kernel runs at a third of the GEMM rate.
    """
    B, H, T, K = q.shape
    N = k.shape[1]
    block = row_block(T)
    if H != N:
        q = q.view(B, N, H // N, T, K)
    out = []
    for start in range(0, T, block):
        stop = min(start + block, T)
        first = 0 if window is None else max(0, start - window + 1)
        rows = torch.arange(start, stop, device=q.device)
        mask = visible(rows, torch.arange(first, stop, device=q.device), window)
        if documents is not None:
            same = documents[:, start:stop, None] == documents[:, None, first:stop]
            mask = (mask & same)[:, None]
        out.append(attend_masked(q[..., start:stop, :], k[:, :, first:stop], v[:, :, first:stop], mask))
    return torch.cat(out, dim=2)


def row_block(length: int) -> int:
    """Rows a block of `attend`: at most eight blocks, so that the traced program stays short, of 128 rows or more."""
    return max(128, -(-length // 8))


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


def attention(
    p: Tree,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    documents: Tensor | None = None,
    *,
    head_dim: int,
    eps: float,
    window: int | None = None,
) -> Tensor:
    """Self-attention of ``x`` (B, T, D) with the rotary table of its positions; returns (B, T, D)."""
    q, k, v = project(p, x, cos, sin, head_dim=head_dim, eps=eps)
    out = attend(q, k, v, window=window, documents=documents)
    return merge_heads(p, out)


def merge_heads(p: Tree, out: Tensor) -> Tensor:
    """The heads' results (B, H, T, K) side by side through ``w_out``: (B, T, D)."""
    return out.transpose(1, 2).flatten(2) @ p["w_out"]
