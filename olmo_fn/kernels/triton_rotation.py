"""The norm of queries or keys and their rotation in one pass, and its pullback in another, for NVIDIA GPUs.

Inductor has a pass for the rotation's pullback, whose result it stores and loads again for the norm's.

B batch, T positions, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def rotated_norm_vjp(
    x: Tensor, gain: Tensor, cos: Tensor, sin: Tensor, eps: float, full: bool, programs: int | None = None
) -> tuple[Tensor, Callable[[Tensor], tuple[Callable[[], Tensor], Tensor]]]:
    """``x`` (B, T, H·K) by heads, normed and rotated: (B, H, T, K), a view of (B, T, H, K); and the pullback.

    ``full``: the norm is over all heads, or else over each. ``gain`` (H·K,), or (K,) for all heads alike; ``cos``, ``sin``
    (T, K/2) or (B, T, K/2), of halves. As `olmo_fn.nn.norm.rms_norm` and `olmo_fn.nn.rope.rotate`, which define what is
    computed. The pullback gives the gain's gradient, as a function, and that of x. ``programs``: blocks of threads that share
    the rows of a backward pass.
    """
    B, T, width = x.shape
    half = cos.shape[-1]
    H = width // (2 * half)
    x, gain, cos, sin = x.contiguous(), gain.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty(B, T, H, 2 * half, dtype=x.dtype, device=x.device).transpose(1, 2)
    table = cos.numel() // half
    heads = triton.next_power_of_2(H)
    sizes = {"HEADS": heads, "HALF": half, "FULL": full, "BY_HEAD": gain.numel() == width}
    warps = min(16, max(1, heads * half // 256))
    numbers = (T, H, table, eps)
    _forward[(B * T,)](x, gain, cos, sin, out, *out.stride()[:3], *numbers, **sizes, num_warps=warps)
    if programs is None:
        programs = 2 * torch.cuda.get_device_properties(x.device).multi_processor_count

    def pullback(d_out: Tensor) -> tuple[Callable[[], Tensor], Tensor]:
        d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
        d_x, parts = torch.empty_like(x), torch.empty(min(programs, B * T), gain.numel(), device=x.device)
        tensors: tuple[Any, ...] = (x, gain, cos, sin, d_out, *d_out.stride()[:3], d_x, parts)
        _backward[(len(parts),)](*tensors, B * T, *numbers, **sizes, num_warps=warps)
        return lambda: parts.sum(0).to(gain.dtype), d_x

    return out, pullback


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
def _forward(
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
def _backward(
    x,
    gain,
    cos,
    sin,
    d_out,
    stride_b,
    stride_h,
    stride_t,
    d_x,
    parts,
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
        parts += tl.program_id(0) * H * 2 * HALF + at
        tl.store(parts, sum_a, inside)
        tl.store(parts + HALF, sum_b, inside)
    else:
        parts += tl.program_id(0) * 2 * HALF + tl.arange(0, HALF)
        tl.store(parts, tl.sum(sum_a, 0))
        tl.store(parts + HALF, tl.sum(sum_b, 0))
