"""The norms of queries and keys and their rotation in one pass, and the pullback in another, for NVIDIA GPUs.

Inductor has a pass for the rotation's pullback, whose result it stores and loads again for the norm's.

B batch, T positions, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_fn.kernels import new_op

ROWS = 32  # in a backward pass: of a block of threads at least, which first adds up the gains' gradients of its own
BLOCKS = 128  # and so many blocks at most

Pair: TypeAlias = tuple[Tensor, Tensor]


def rotated_norms_vjp(
    xs: Pair, gains: Pair, cos: Tensor, sin: Tensor, eps: float, full: bool
) -> tuple[Pair, Callable[[Pair], tuple[list[Callable[[], Tensor]], Pair]]]:
    """Queries and keys (B, T, H·K), each with an H of its own, normed and rotated; and the pullback.

    Results are (B, H, T, K), views of (B, T, H, K). ``full``: a norm is over all heads, or else over each. ``gains`` are
    (H·K,), or (K,) for all heads alike; ``cos``, ``sin`` (T, K/2) or (B, T, K/2), for halves. What is computed is defined by
    `olmo_fn.nn.norm.rms_norm` and `olmo_fn.nn.rope.rotate`. The pullback gives the gains' gradients, as functions, and those of
    ``xs``.
    """
    known = [x.contiguous() for x in (*xs, *gains, cos, sin)]
    q, k = torch.ops.olmo_fn.rotated_norms(*known, eps, full)

    def pullback(d_outs: Pair) -> tuple[list[Callable[[], Tensor]], Pair]:
        d_q_out, d_k_out = (d if d.stride(-1) == 1 else d.contiguous() for d in d_outs)
        d_q, d_k, *sums = torch.ops.olmo_fn.rotated_norms_backward(d_q_out, d_k_out, *known, eps, full)
        return [lambda s=s, g=g: s.sum(0).to(g.dtype) for s, g in zip(sums, gains, strict=True)], (d_q, d_k)

    return (q.transpose(1, 2), k.transpose(1, 2)), pullback


def block_sizes(heads: Sequence[int], half: int, full: bool, by_head: bool) -> dict[str, int]:
    """What the kernels are compiled for; ``by_head``: heads have gains of their own."""
    q, k = map(triton.next_power_of_2, heads)
    warps = min(16, max(1, q * half // 256))
    return {"Q_HEADS": q, "K_HEADS": k, "HALF": half, "FULL": full, "BY_HEAD": by_head, "num_warps": warps}


def backward_blocks(rows: int) -> int:
    """Blocks of threads that share the rows of queries, and as many of keys."""
    return max(1, min(BLOCKS, rows // ROWS))


def _outs(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """Both (B, T, H, K)."""
    return [torch.empty_like(x).unflatten(-1, (-1, 2 * cos.shape[-1])) for x in (q, k)]


def _gradients(q: Tensor, k: Tensor, q_gain: Tensor, k_gain: Tensor) -> tuple[Tensor, ...]:
    """Those of q and k, and every block's part of those of the gains."""
    sums = (g.new_empty(backward_blocks(q.shape[0] * q.shape[1]), g.numel(), dtype=torch.float32) for g in (q_gain, k_gain))
    return torch.empty_like(q), torch.empty_like(k), *sums


def _rotated_norms(q: Tensor, k: Tensor, *rest: Any) -> list[Tensor]:
    *tensors, eps, full = rest
    outs = _outs(q, k, *tensors)
    strides = [stride for x in outs for stride in x.transpose(1, 2).stride()[:3]]
    numbers, sizes = _numbers(q, outs, *tensors, eps, full)
    _forward[(q.shape[0] * q.shape[1], 2)](q, k, *tensors, *outs, *strides, *numbers, **sizes)
    return outs


def _rotated_norms_backward(d_q_out: Tensor, d_k_out: Tensor, q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *tensors, eps, full = rest
    found, d_outs = _gradients(q, k, *tensors[:2]), (d_q_out, d_k_out)
    strides = [stride for d in d_outs for stride in d.stride()[:3]]
    numbers, sizes = _numbers(q, [d.transpose(1, 2) for d in d_outs], *tensors, eps, full)
    rows = q.shape[0] * q.shape[1]
    _backward[(len(found[2]), 2)](q, k, *tensors, *d_outs, *strides, *found, rows, *numbers, **sizes)
    return found


def _numbers(
    q: Tensor, by_head: Sequence[Tensor], q_gain: Tensor, k_gain: Tensor, cos: Tensor, sin: Tensor, eps: float, full: bool
) -> tuple[tuple[Any, ...], dict[str, int]]:
    heads, half = [x.shape[2] for x in by_head], cos.shape[-1]
    sizes = block_sizes(heads, half, full, q_gain.numel() == q.shape[-1])
    return (q.shape[1], *heads, cos.numel() // half, eps), sizes


_INPUTS = "Tensor q, Tensor k, Tensor q_gain, Tensor k_gain, Tensor cos, Tensor sin, float eps, bool full"
_GRADIENTS = "(Tensor, Tensor, Tensor, Tensor)"
new_op("rotated_norms", f"({_INPUTS}) -> (Tensor, Tensor)", _rotated_norms, lambda *args: _outs(*args[:6]))
new_op(
    "rotated_norms_backward",
    f"(Tensor d_q_out, Tensor d_k_out, {_INPUTS}) -> {_GRADIENTS}",
    _rotated_norms_backward,
    lambda _, __, *args: _gradients(*args[:4]),
)


@triton.jit
def _normed(x, row, H, at, inside, eps, HALF: tl.constexpr, FULL: tl.constexpr):
    """Both halves of a row's heads over their root mean square, and the reciprocal of that."""
    a = tl.load(x + row * H * 2 * HALF + at, inside, 0.0).to(tl.float32)
    b = tl.load(x + row * H * 2 * HALF + HALF + at, inside, 0.0).to(tl.float32)
    scale = tl.rsqrt(_mean(a * a + b * b, H, HALF, FULL) + eps)
    return a * scale, b * scale, scale


@triton.jit
def _mean(x, H, HALF: tl.constexpr, FULL: tl.constexpr):
    """Over all heads, or over each, of the sum of both halves."""
    return tl.sum(x) / (H * 2 * HALF) if FULL else tl.sum(x, 1, keep_dims=True) / (2 * HALF)


@triton.jit
def _forward_of(
    x,
    gain,
    cos,
    sin,
    out,
    stride_b,
    stride_h,
    stride_t,
    T,
    H,
    table,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at, inside = head * 2 * HALF + i, head < H
    a, b, _ = _normed(x, row, H, at, inside, eps, HALF, FULL)
    gain += at if BY_HEAD else i
    dtype = out.dtype.element_ty
    a = (a * tl.load(gain, inside, 0.0)).to(dtype).to(tl.float32)
    b = (b * tl.load(gain + HALF, inside, 0.0)).to(dtype).to(tl.float32)
    c, s = tl.load(cos + row % table * HALF + i), tl.load(sin + row % table * HALF + i)
    out += row // T * stride_b + row % T * stride_t + head * stride_h + i
    tl.store(out, (a * c - b * s).to(dtype), inside)
    tl.store(out + HALF, (b * c + a * s).to(dtype), inside)


@triton.jit
def _forward(
    q,
    k,
    q_gain,
    k_gain,
    cos,
    sin,
    q_out,
    k_out,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    T,
    Q,
    K,
    table,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    if tl.program_id(1) == 0:
        q_where = (q_out, q_stride_b, q_stride_h, q_stride_t)
        _forward_of(q, q_gain, cos, sin, *q_where, T, Q, table, eps, Q_HEADS, HALF, FULL, BY_HEAD)
    else:
        k_where = (k_out, k_stride_b, k_stride_h, k_stride_t)
        _forward_of(k, k_gain, cos, sin, *k_where, T, K, table, eps, K_HEADS, HALF, FULL, BY_HEAD)


@triton.jit
def _backward_of(
    x,
    gain,
    cos,
    sin,
    d_out,
    stride_b,
    stride_h,
    stride_t,
    d_x,
    sums,
    rows,
    T,
    H,
    table,
    eps,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at, inside = head * 2 * HALF + i, head < H
    gain += at if BY_HEAD else i
    gain_a, gain_b = tl.load(gain, inside, 0.0).to(tl.float32), tl.load(gain + HALF, inside, 0.0).to(tl.float32)
    sum_a, sum_b = tl.zeros((HEADS, HALF), tl.float32), tl.zeros((HEADS, HALF), tl.float32)
    dtype = d_x.dtype.element_ty
    for row in tl.range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        a, b, scale = _normed(x, row, H, at, inside, eps, HALF, FULL)
        from_row = d_out + row // T * stride_b + row % T * stride_t + head * stride_h + i
        first, second = tl.load(from_row, inside, 0.0).to(tl.float32), tl.load(from_row + HALF, inside, 0.0).to(tl.float32)
        c, s = tl.load(cos + row % table * HALF + i), tl.load(sin + row % table * HALF + i)
        d_a = (first * c + second * s).to(dtype).to(tl.float32)
        d_b = (second * c - first * s).to(dtype).to(tl.float32)
        sum_a += d_a * a
        sum_b += d_b * b
        d_a, d_b = d_a * gain_a, d_b * gain_b
        mean = _mean(d_a * a + d_b * b, H, HALF, FULL)
        to_row = d_x + row * H * 2 * HALF + at
        tl.store(to_row, (scale * (d_a - a * mean)).to(dtype), inside)
        tl.store(to_row + HALF, (scale * (d_b - b * mean)).to(dtype), inside)
    if BY_HEAD:
        sums += tl.program_id(0) * H * 2 * HALF + at
        tl.store(sums, sum_a, inside)
        tl.store(sums + HALF, sum_b, inside)
    else:
        sums += tl.program_id(0) * 2 * HALF + tl.arange(0, HALF)
        tl.store(sums, tl.sum(sum_a, 0))
        tl.store(sums + HALF, tl.sum(sum_b, 0))


@triton.jit
def _backward(
    q,
    k,
    q_gain,
    k_gain,
    cos,
    sin,
    d_q_out,
    d_k_out,
    q_stride_b,
    q_stride_h,
    q_stride_t,
    k_stride_b,
    k_stride_h,
    k_stride_t,
    d_q,
    d_k,
    q_sums,
    k_sums,
    rows,
    T,
    Q,
    K,
    table,
    eps,
    Q_HEADS: tl.constexpr,
    K_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    FULL: tl.constexpr,
    BY_HEAD: tl.constexpr,
):
    if tl.program_id(1) == 0:
        q_where = (d_q_out, q_stride_b, q_stride_h, q_stride_t)
        _backward_of(q, q_gain, cos, sin, *q_where, d_q, q_sums, rows, T, Q, table, eps, Q_HEADS, HALF, FULL, BY_HEAD)
    else:
        k_where = (d_k_out, k_stride_b, k_stride_h, k_stride_t)
        _backward_of(k, k_gain, cos, sin, *k_where, d_k, k_sums, rows, T, K, table, eps, K_HEADS, HALF, FULL, BY_HEAD)
