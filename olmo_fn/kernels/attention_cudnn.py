"""Attention by cuDNN, through ATen: causal over whole sequences, or each row sees each key."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmo_fn.kernels.attention_backend import AttentionBackend, Need, Scores, lacks_on_gpu

_aten = torch.ops.aten


def _forward(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
    out, lse, *lengths, seed, offset, _ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, _causal(scores, q, k), False
    )
    return out, lse[..., 0], (seed, offset, lengths)  # of dropout, which there is none of, and of ragged sequences


def _backward(
    scores: Scores, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, kept: Any, delta: Any
) -> tuple[Tensor, Tensor, Tensor]:
    seed, offset, lengths = kept
    lse = lse.contiguous()[..., None]  # of a part of the rows it is none
    args = (d_out, q, k, v, out, lse, seed, offset, None, *lengths, 0.0, _causal(scores, q, k))
    return _aten._scaled_dot_product_cudnn_attention_backward(*args)


def _causal(scores: Scores, q: Tensor, k: Tensor) -> bool:
    """Whether rows see as many keys as causality leaves, or all of them. It has nothing else."""
    sight, R, T = scores.sight, q.shape[2], k.shape[2]
    shift = sight.offset - sight.key_offset
    assert sight.documents is scores.cap is None, "no documents, no soft cap"
    assert sight.window is None or sight.window >= shift + R, "no window"
    assert shift >= T - 1 or (shift, R) == (0, T), "neither all keys nor as many as rows"
    return shift < T - 1


def _lacks(need: Need) -> str:
    if lacks := lacks_on_gpu(need, 128):
        return lacks
    for wanted, what in ((need.window, "windows"), (need.documents, "documents"), (need.cap, "soft-capped scores")):
        if wanted:
            return f"has no {what}"
    if need.part == "rows":
        return "has no queries of a part of the positions (--mesh.cp-method ring and ulysses ask for none)"
    return "is not deterministic" if need.deterministic else ""


CUDNN = AttentionBackend("cudnn", _lacks, _forward, _backward)
