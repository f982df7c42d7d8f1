"""The gradient of cross entropy in one pass over the logits, for NVIDIA GPUs.

Inductor's kernel reads a row twice, since no reduction of its keeps what it has read. Here a block of threads keeps its row in
registers, up to 90,112 entries of bf16, and writes the gradient from there.

R rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from olmo_fn.kernels import new_op

PIECE = 4096  # pairs of entries that a block of threads works on at a time
MOST = 11  # pieces that it keeps (12 spill on sm_100, or with a cap); what is behind them is read twice
WARPS = 16  # all registers of a multiprocessor, 128 for each of 512 threads


def logits_gradient(logits: Tensor, labels: Tensor, weight: Tensor, z_loss: float, cap: float | None) -> Tensor:
    """Overwrite ``logits`` (R, V), bf16, V even, by the loss's gradient with respect to them; the sums of ce and z, (2,) fp32.

    ``labels`` (R,) are negative where there is no loss, and the gradient 0; ``weight`` (0-d) multiplies the gradient, not the
    sums. The loss is that of `olmo_fn.nn.cross_entropy.plain_cross_entropy`, which defines what is computed.
    """
    return torch.ops.olmo_fn.logits_gradient(logits, labels, weight.float(), z_loss, cap).sum(0)


def _launch(logits: Tensor, labels: Tensor, weight: Tensor, z_loss: float, cap: float | None) -> Tensor:
    R, V = logits.shape
    losses = _losses(logits)
    _logits_gradient[(R,)](
        *(logits, logits.view(torch.int32), labels, weight, losses, V // 2, z_loss, cap or 1.0, 0),
        CAPPED=cap is not None,
        PIECES=min(MOST, V // 2 // PIECE),
        PIECE=PIECE,
        num_warps=WARPS,
    )
    return losses


def _losses(logits: Tensor, *_: object) -> Tensor:
    """Memory for ce and z of every row."""
    return logits.new_empty(len(logits), 2, dtype=torch.float32)


new_op(
    "logits_gradient",
    "(Tensor(a!) logits, Tensor labels, Tensor weight, float z_loss, float? cap) -> Tensor",
    _launch,
    _losses,
)


@triton.jit
def _low(pair):
    """The first of two bf16, fp32."""
    return (pair << 16).to(tl.float32, bitcast=True)


@triton.jit
def _high(pair):
    """The second of two bf16, fp32."""
    return (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def _pair(low, high):
    """Two fp32 as bf16 in 32 bits."""
    low = low.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _tanh(x):
    return 1 - 2 / (tl.exp(2 * x) + 1)


@triton.jit
def _capped(x, cap, CAPPED: tl.constexpr):
    return cap * _tanh(x / cap) if CAPPED else x


@triton.jit
def _more(top, total, low, high):
    """The largest entry and the sum of exponentials relative to it, of what was seen and of ``low`` and ``high``."""
    new = tl.maximum(top, tl.max(tl.maximum(low, high), 0))
    return new, total * tl.exp(top - new) + tl.sum(tl.exp(low - new) + tl.exp(high - new), 0)


@triton.jit
def _slope(x, lse, times, target, weight, cap, CAPPED: tl.constexpr):
    """(exp(x - lse) · times - target) · weight, through the cap."""
    y = _capped(x, cap, CAPPED)
    d = (tl.exp(y - lse) * times - target) * weight
    return d * (1 - (y / cap) * (y / cap)) if CAPPED else d


@triton.jit
def _logits_gradient(
    logits,
    pairs,  # the same memory
    labels,
    weight,
    losses,
    half,  # V / 2
    z_loss,
    cap,
    zero,
    CAPPED: tl.constexpr,
    PIECES: tl.constexpr,
    PIECE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    pairs += row * half
    i = tl.arange(0, PIECE)
    if label < 0:
        for start in tl.range(0, half, PIECE):
            tl.store(pairs + start + i, tl.zeros_like(i), start + i < half)
        tl.store(losses + 2 * row, 0.0)
        tl.store(losses + 2 * row + 1, 0.0)
    else:
        w = tl.load(weight)
        x = tl.load(logits + 2 * row * half + label).to(tl.float32)
        top, total = float("-inf"), 0.0
        kept = ()
        for k in tl.static_range(PIECES):
            pair = tl.load(pairs + k * PIECE + i)
            top, total = _more(top, total, _capped(_low(pair), cap, CAPPED), _capped(_high(pair), cap, CAPPED))
            # zero is no constant: or else the compiler would keep both halves in fp32
            kept = kept + (pair ^ zero,)  # noqa: RUF005
        for start in tl.range(PIECES * PIECE, half, PIECE):
            pair = tl.load(pairs + start + i, start + i < half, 0)
            low, high = _capped(_low(pair), cap, CAPPED), _capped(_high(pair), cap, CAPPED)
            inside = start + i < half
            top, total = _more(top, total, tl.where(inside, low, float("-inf")), tl.where(inside, high, float("-inf")))
        lse = top + tl.log(total)
        times = 1 + 2 * z_loss * lse
        for k in tl.static_range(PIECES):
            low, high = _low(kept[k]), _high(kept[k])
            low, high = _slope(low, lse, times, 0.0, w, cap, CAPPED), _slope(high, lse, times, 0.0, w, cap, CAPPED)
            tl.store(pairs + k * PIECE + i, _pair(low, high))
        for start in tl.range(PIECES * PIECE, half, PIECE):
            pair = tl.load(pairs + start + i, start + i < half, 0)
            low, high = _low(pair), _high(pair)
            low, high = _slope(low, lse, times, 0.0, w, cap, CAPPED), _slope(high, lse, times, 0.0, w, cap, CAPPED)
            tl.store(pairs + start + i, _pair(low, high), start + i < half)
        tl.debug_barrier()  # or another thread might write the label's entry later
        tl.store(logits + 2 * row * half + label, _slope(x, lse, times, 1.0, w, cap, CAPPED).to(tl.bfloat16))
        tl.store(losses + 2 * row, lse - _capped(x, cap, CAPPED))
        tl.store(losses + 2 * row + 1, z_loss * lse * lse)
