"""FlexAttention (Dong et al. 2024), which torch compiles for what no written kernel has: soft-capped scores."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from olmo_fn.kernels.attention_backend import AttentionBackend, Need, Scores, row_products
from olmo_fn.kernels.attention_sight import FAR, Sight


def _forward(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    from torch.nn.attention.flex_attention import AuxRequest

    mask = _block_mask(scores.sight, q, k)
    with torch.enable_grad():  # its backward is no operation that could be called: autograd keeps what it needs
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out, aux = compiled_flex()(
            *leaves,
            score_mod=None if scores.cap is None else _soft_cap(scores.cap),
            block_mask=mask,
            enable_gqa=q.shape[1] != k.shape[1],
            return_aux=AuxRequest(lse=True),
        )
    return out.detach(), aux.lse.detach().clamp(min=-FAR), (leaves, out, aux.lse)


def _backward(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, kept: Any, delta: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """With ``lse`` over more than these keys, the result is w · own, w = exp(own_lse - lse), plus what the others give.

    So the cotangents of own and own_lse are w d_out and w (d_out · own - d_out · out).
    """
    leaves, own, own_lse = kept
    delta = row_products(d_out, out) if delta is None else delta
    weights = (own_lse.detach() - lse).exp()
    d_own = (d_out * weights[..., None]).to(own.dtype)
    d_lse = (weights * (row_products(d_out, own.detach()) - delta)).to(own_lse.dtype)
    d_q, d_k, d_v = torch.autograd.grad((own, own_lse), leaves, (d_own, d_lse))
    return d_q, d_k, d_v


@cache
def compiled_flex() -> Callable[..., Any]:
    """torch's ``flex_attention``, compiled, without which it would keep all scores."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


@lru_cache(8)
def _soft_cap(cap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


def _block_mask(sight: Sight, q: Tensor, k: Tensor) -> Any:
    version = None if sight.documents is None else sight.documents._version  # a mask of numbers that were since overwritten
    return _mask_of(sight._replace(packing=None), version, q.shape[0], q.shape[2], k.shape[2], q.device)


@lru_cache(8)
def _mask_of(sight: Sight, version: int | None, B: int, R: int, T: int, device: torch.device) -> Any:
    """Which blocks of rows and keys are looked at: made once for all layers that see alike."""
    from torch.nn.attention.flex_attention import create_block_mask

    window, documents, offset, key_offset, _ = sight

    def mask_mod(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        row, column = row + offset, column + key_offset
        seen = column <= row
        seen = seen if window is None else seen & (row - column < window)
        return seen if documents is None else seen & (documents[b, row] == documents[b, column])

    return create_block_mask(mask_mod, None if documents is None else B, None, R, T, device)


def _lacks(need: Need) -> str:
    if need.device != "cuda":
        return "trains on a GPU only"
    return "computes in no float64" if need.dtype == torch.float64 else ""


FLEX = AttentionBackend("flex", _lacks, _forward, _backward)
