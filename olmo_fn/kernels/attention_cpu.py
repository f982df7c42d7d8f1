"""Softmax attention of whole documents by torch's own blocked kernel, on a CPU in fp32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from olmo_fn.kernels.attention_backend import AttentionBackend, Need, Scores

_aten = torch.ops.aten


def _lacks(need: Need) -> str:
    """Where it can do it, it is the faster way; in bf16 it is half as fast as attention by tiles."""
    if need.device != "cpu" or need.dtype != torch.float32:
        return "is for a CPU, in float32"
    if need.grouped or need.window or need.cap or need.part != "whole":  # grouped heads would have to be repeated
        return "has no grouped heads, no windows, no soft-capped scores and no parts of a sequence"
    return ""


def _forward(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, list[tuple[slice, ...]]]:
    """One document after the other, so that no two are multiplied."""
    B, H, T, K = q.shape
    documents = scores.sight.documents
    pieces: list[tuple[slice, ...]] = [(slice(0, B),)] if documents is None else _pieces(documents)
    if len(pieces) == 1:
        return *_aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True), pieces
    out, lse = q.new_empty(B, T, H, K).transpose(1, 2), q.new_empty(B, H, T)  # heads side by side, as the kernel has them
    for piece in pieces:
        out[piece], lse[piece] = _aten._scaled_dot_product_flash_attention_for_cpu(q[piece], k[piece], v[piece], 0.0, True)
    return out, lse, pieces


def _backward(
    scores: Scores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    pieces: list[tuple[slice, ...]],
    delta: Any,
) -> tuple[Tensor, ...]:
    found = tuple(torch.empty_like(x) for x in (q, k, v))
    for piece in pieces:
        parts = (x[piece] for x in (d_out, q, k, v, out, lse))
        more = _aten._scaled_dot_product_flash_attention_for_cpu_backward(*parts, 0.0, True)
        if len(pieces) == 1:
            return tuple(more)
        for whole, part in zip(found, more, strict=True):
            whole[piece] = part
    return found


def _pieces(documents: Tensor) -> list[tuple[slice, ...]]:
    """Where each document is in (B, H, T), given their first positions (B, T)."""
    found: list[tuple[slice, ...]] = []
    for b, row in enumerate(documents):
        starts = row.unique_consecutive().tolist()
        stops = [*starts[1:], len(row)]
        found += [(slice(b, b + 1), slice(None), slice(*piece)) for piece in zip(starts, stops, strict=True)]
    return found


WHOLE = AttentionBackend("whole", _lacks, _forward, _backward, by_head=True)  # type: ignore[arg-type]
