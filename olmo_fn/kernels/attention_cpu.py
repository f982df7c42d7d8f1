"""Softmax attention of whole sequences by torch's own blocked kernel, on a CPU in fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_fn.kernels.sinks import add_sinks, sinks_cotangent

_aten = torch.ops.aten


def suits(q: Tensor, k: Tensor, window: int | None, documents: Tensor | None, cap: float | None = None) -> bool:
    """Whether `attend_whole_vjp` can do it, and is the faster way: in bf16 it is half as fast as attention by tiles.

    >>> q = torch.zeros(1, 2, 8, 4)
    >>> suits(q, q, None, None), suits(q, q, 7, None), suits(q.bfloat16(), q.bfloat16(), None, None)
    (True, False, False)
    """
    T, alone = k.shape[2], documents is None and cap is None and q.shape == k.shape  # grouped heads would be repeated
    return alone and (window is None or window >= T) and q.device.type == "cpu" and q.dtype == torch.float32


def attend_whole_vjp(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None = None
) -> tuple[Tensor, Callable[[Tensor, Tensor], tuple[Tensor, ...]]]:
    """Causal softmax(q kᵀ / √K) v of (B, H, T, K) each, fp32 or fp64, with its pullback from the result and its cotangent.

    Keeps each row's log-sum-exp (Dao et al. 2022, FlashAttention, algorithms 1 and 4, in ATen's C++), of which the backward
    takes that with ``sinks`` (H,) as well; their cotangent is then the pullback's fourth.

    >>> v = torch.tensor([2.0, 4.0]).view(1, 1, 2, 1)
    >>> out, pullback = attend_whole_vjp(torch.zeros_like(v), torch.zeros_like(v), v)
    >>> out.flatten(), pullback(out, torch.ones_like(v))[2].flatten()
    (tensor([2., 3.]), tensor([1.5000, 0.5000]))
    """
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)

    def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        found = _aten._scaled_dot_product_flash_attention_for_cpu_backward(cotangent, q, k, v, out, lse, 0.0, True)
        return tuple(found) if sinks is None else (*found, sinks_cotangent(sinks, lse, (cotangent * out).sum(-1)))

    return out, pullback
