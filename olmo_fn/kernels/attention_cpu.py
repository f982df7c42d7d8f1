"""Softmax attention of whole documents by torch's own blocked kernel, on a CPU in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_fn.kernels.sinks import add_sinks, sinks_cotangent

_aten = torch.ops.aten


def suits(q: Tensor, k: Tensor, window: int | None, cap: float | None = None) -> bool:
    """Whether `attend_whole_vjp` can do it, and is the faster way: in bf16 it is half as fast as attention by tiles.

    >>> q = torch.zeros(1, 2, 8, 4)
    >>> suits(q, q, None), suits(q, q, 7), suits(q.bfloat16(), q.bfloat16(), None)
    (True, False, False)
    """
    alone = cap is None and q.shape == k.shape  # grouped heads would have to be repeated
    return alone and (window is None or window >= k.shape[2]) and q.device.type == "cpu" and q.dtype == torch.float32


def attend_whole_vjp(
    q: Tensor, k: Tensor, v: Tensor, documents: Tensor | None = None, sinks: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Causal softmax(q kᵀ / √K) v of (B, H, T, K) each, fp32 or fp64, with its pullback from the result and its cotangent.

    One document after the other, given their starts ``documents`` (B, T), so that no two are multiplied. Keeps each row's
    log-sum-exp (Dao et al. 2022, FlashAttention, algorithms 1 and 4, in ATen's C++), of which the backward takes that with
    ``sinks`` (H,) as well; their cotangent is then the pullback's fourth.

    >>> v = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    >>> out, pullback = attend_whole_vjp(torch.zeros_like(v), torch.zeros_like(v), v)
    >>> out.flatten(), pullback(out, torch.ones_like(v))[2].flatten()
    (tensor([2., 3.]), tensor([1.5000, 0.5000]))
    """
    B, H, T, K = q.shape
    pieces = [(slice(0, B),)] if documents is None else _pieces(documents)

    def whole_backward(cotangent: Tensor, out: Tensor) -> tuple[Tensor, ...]:
        found = tuple(torch.empty_like(x) for x in (q, k, v))
        for piece in pieces:
            parts = (x[piece] for x in (cotangent, q, k, v, out, lse))
            more = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, True)
            if len(pieces) == 1:
                return tuple(more)
            for whole, part in zip(found, more, strict=True):
                whole[piece] = part
        return found

    if len(pieces) == 1:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    else:
        out, lse = q.new_empty(B, T, H, K).transpose(1, 2), q.new_empty(B, H, T)  # heads side by side, as the kernel has them
        for piece in pieces:
            out[piece], lse[piece] = _aten._scaled_dot_product_flash_attention_for_cpu(q[piece], k[piece], v[piece], 0.0, True)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)

    def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        found = whole_backward(cotangent, out)
        return found if sinks is None else (*found, sinks_cotangent(sinks, lse, (cotangent * out).sum(-1)))

    return out, pullback


def _pieces(documents: Tensor) -> list[tuple[slice, ...]]:
    """Where each document is in (B, H, T)."""
    found: list[tuple[slice, ...]] = []
    for b, row in enumerate(documents):
        starts = row.unique_consecutive().tolist()
        stops = [*starts[1:], len(row)]
        found += [(slice(b, b + 1), slice(None), slice(*piece)) for piece in zip(starts, stops, strict=True)]
    return found
