"""FlashAttention 2 of the package flash-attn: as ATen's, and with soft-capped scores."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from olmo_fn.kernels.attention_backend import Need
from olmo_fn.kernels.attention_flash import FlashKernels, Lengths, Window, flash_backend, flash_lacks


@cache
def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, window: Window, cap: float | None
) -> tuple[Tensor, Tensor]:
    package = _interface()
    run = package._flash_attn_forward if lengths is None else package._flash_attn_varlen_forward
    out, lse, *_ = run(q, k, v, *(lengths or ()), **_how(q, window, cap), return_softmax=False)
    return out, lse


def _backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Lengths | None,
    window: Window,
    cap: float | None,
) -> tuple[Tensor, ...]:
    package = _interface()
    run = package._flash_attn_backward if lengths is None else package._flash_attn_varlen_backward
    found = tuple(x.new_empty(x.shape) for x in (q, k, v))
    deterministic = torch.are_deterministic_algorithms_enabled()
    run(d_out, q, k, v, out, lse, *found, *(lengths or ()), **_how(q, window, cap), deterministic=deterministic)
    return found


def _how(q: Tensor, window: Window, cap: float | None) -> dict[str, Any]:
    return {
        "dropout_p": 0.0,
        "softmax_scale": q.shape[-1] ** -0.5,
        "causal": window.causal,
        "window_size_left": window.left,
        "window_size_right": window.right,
        "softcap": cap or 0.0,
        "alibi_slopes": None,
    }


def _lacks(need: Need) -> str:
    if importlib.util.find_spec("flash_attn") is None:
        return "is not installed: pip install 'olmo-fn[flash]'"
    return flash_lacks(need)


PACKAGE = flash_backend("flash-attn", _lacks, FlashKernels(_forward, _backward))
