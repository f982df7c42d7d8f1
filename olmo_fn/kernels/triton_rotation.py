"""The norms of queries and keys and their rotation in one pass, and the pullback in another, for NVIDIA GPUs.

Inductor has a pass for the rotation's pullback, whose result it stores and loads again for the norm's.

B batch, T positions, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 32  # that a block of threads has in a backward pass at least, to add up gradients of gains before it stores them

Pair: TypeAlias = tuple[Tensor, Tensor]


def rotated_norms_vjp(
    xs: Pair, gains: Pair, cos: Tensor, sin: Tensor, eps: float, full: bool, processors: int | None = None
) -> tuple[Pair, Callable[[Pair], tuple[list[Callable[[], Tensor]], Pair]]]:
    """Queries and keys (B, T, H·K), each with an H of its own, normed and rotated; and the pullback.

    Results are (B, H, T, K), views of (B, T, H, K). ``full``: a norm is over all heads, or else over each. ``gains`` are
    (H·K,), or (K,) for all heads alike; ``cos``, ``sin`` (T, K/2) or (B, T, K/2), for halves. What is computed is defined by
    `olmo_fn.nn.norm.rms_norm` and `olmo_fn.nn.rope.rotate`. The pullback gives the gains' gradients, as functions, and those of
    ``xs``. ``processors``: those of the GPU, asked for if not given.
    """
    (B, T, _), half = xs[0].shape, cos.shape[-1]
    q, k = (x.contiguous() for x in xs)
    q_gain, k_gain, cos, sin = (x.contiguous() for x in (*gains, cos, sin))
    heads = q.shape[-1] // (2 * half), k.shape[-1] // (2 * half)
    outs = tuple(torch.empty(B, T, H, 2 * half, dtype=q.dtype, device=q.device).transpose(1, 2) for H in heads)
    table = cos.numel() // half
    sizes = block_sizes(heads, half, full, q_gain.numel() == q.shape[-1])
    tensors, numbers = (q, k, q_gain, k_gain, cos, sin), (T, *heads, table, eps)
    _forward[(B * T, 2)](*tensors, *outs, *outs[0].stride()[:3], *outs[1].stride()[:3], *numbers, **sizes)
    if processors is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    blocks = backward_blocks(B * T, processors)

    def pullback(d_outs: Pair) -> tuple[list[Callable[[], Tensor]], Pair]:
        d_q_out, d_k_out = (d if d.stride(-1) == 1 else d.contiguous() for d in d_outs)
        d_q, d_k = torch.empty_like(q), torch.empty_like(k)
        sums = [torch.empty(blocks, gain.numel(), device=q.device) for gain in (q_gain, k_gain)]
        strides = (*d_q_out.stride()[:3], *d_k_out.stride()[:3])
        _backward[(blocks, 2)](*tensors, d_q_out, d_k_out, *strides, d_q, d_k, *sums, B * T, *numbers, **sizes)
        return [lambda s=s, g=g: s.sum(0).to(g.dtype) for s, g in zip(sums, gains, strict=True)], (d_q, d_k)

    return outs, pullback


def block_sizes(heads: tuple[int, int], half: int, full: bool, by_head: bool) -> dict[str, int]:
    """What the kernels are compiled for; ``by_head``: heads have gains of their own."""
    q, k = map(triton.next_power_of_2, heads)
    warps = min(16, max(1, q * half // 256))
    return {"Q_HEADS": q, "K_HEADS": k, "HALF": half, "FULL": full, "BY_HEAD": by_head, "num_warps": warps}


def backward_blocks(rows: int, processors: int) -> int:
    """Blocks of threads that share the rows of queries, and as many of keys."""
    return max(1, min(processors, rows // ROWS))


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
