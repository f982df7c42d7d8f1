"""What the kernels of a GPU promise, in plain fp64: the operations of ATen and the functions of flash-attn, on a CPU.

Written from their C++ and their documentation, one row at a time where that is clearer, and not from what calls them. What they
leave undefined is NaN here, and what they do not check is asserted.
"""

import sys
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.library import Library

INFINITE = float("inf")


def seen(R: int, T: int, causal: bool, left: int, right: int) -> Tensor:
    """Which of T keys each of R rows sees; the last of both are aligned. Negative limits are none."""
    right = 0 if causal else right
    distance = torch.arange(T) - (torch.arange(R)[:, None] + T - R)
    mask = torch.ones(R, T, dtype=torch.bool)
    mask = mask if left < 0 else mask & (distance >= -left)
    return mask if right < 0 else mask & (distance <= right)


def scores_of(q, k, mask, cap):
    """(H, R, T) of (R, H, K) and (T, N, K)."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    x = torch.einsum("rhk,thk->hrt", q, k) * q.shape[-1] ** -0.5
    x = x if not cap else cap * torch.tanh(x / cap)
    return x.masked_fill(~mask, -INFINITE)


def forward_of(q, k, v, mask, cap):
    """The result (R, H, K) and the log-sum-exp (H, R); 0 and +inf for a row that sees nothing."""
    scores = scores_of(q, k, mask, cap)
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0)
    out = torch.einsum("hrt,thk->rhk", weights, v.repeat_interleave(q.shape[1] // v.shape[1], 1))
    return out, lse.masked_fill(lse == -INFINITE, INFINITE)


def backward_of(d_out, q, k, v, out, lse, mask, cap):
    """By the ``out`` and ``lse`` that are given, whosever they are."""
    groups = q.shape[1] // k.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (k, v))
    scores = scores_of(q, k, mask, cap)
    weights = (scores - lse[..., None]).exp()
    d_weights = torch.einsum("rhk,thk->hrt", d_out, values)
    d_scores = weights * (d_weights - (d_out * out).sum(-1).T[..., None])
    d_scores = d_scores if not cap else d_scores * (1 - (scores.nan_to_num(neginf=0) / cap).square())
    d_scores = d_scores * q.shape[-1] ** -0.5
    d_q = torch.einsum("hrt,thk->rhk", d_scores, keys)
    d_k, d_v = torch.einsum("hrt,rhk->thk", d_scores, q), torch.einsum("hrt,rhk->thk", weights, d_out)
    return d_q, *(x.unflatten(1, (-1, groups)).sum(2) for x in (d_k, d_v))


def pieces(q, k, cu_q, cu_k, max_q, max_k):
    """Index of each sequence's rows, keys, and log-sum-exp; what lengths have to be is asserted."""
    assert q.stride(-1) == k.stride(-1) == 1
    if cu_q is None:
        assert q.ndim == 4
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        return [(b, b, b) for b in range(len(q))]
    assert q.ndim == 3
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert len(cu_q) == len(cu_k)
    found = []
    for cu, total, most in ((cu_q, len(q), max_q), (cu_k, len(k), max_k)):
        assert cu.is_contiguous()
        assert (int(cu[0]), int(cu[-1])) == (0, total)
        assert ((cu.diff() >= 0) & (cu.diff() <= most)).all(), "longer than the launch knows"
        found.append([slice(*pair) for pair in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True)])
    return [(rows, keys, (slice(None), rows)) for rows, keys in zip(*found, strict=True)]


def flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right, cap=0.0):
    places = pieces(q, k, cu_q, cu_k, max_q, max_k)
    out = torch.full_like(q, torch.nan)
    lse = q.new_full((len(q), q.shape[2], q.shape[1]) if cu_q is None else (q.shape[1], len(q)), torch.nan)
    for rows, keys, statistics in places:
        mask = seen(q[rows].shape[0], k[keys].shape[0], causal, left, right)
        out[rows], lse[statistics] = forward_of(q[rows], k[keys], v[keys], mask, cap)
    return out, lse


def flash_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, left, right, cap=0.0):
    assert lse.is_contiguous()
    found = tuple(torch.full_like(x, torch.nan) for x in (q, k, v))
    for rows, keys, statistics in pieces(q, k, cu_q, cu_k, max_q, max_k):
        mask = seen(q[rows].shape[0], k[keys].shape[0], causal, left, right)
        parts = backward_of(d_out[rows], q[rows], k[keys], v[keys], out[rows], lse[statistics], mask, cap)
        for whole, place, part in zip(found, (rows, keys, keys), parts, strict=True):
            whole[place] = part
    return found


# --- ATen's operations ------------------------------------------------------------------------------------------------


def aten_flash_forward(
    q, k, v, cu_q, cu_k, max_q, max_k, dropout, causal, debug, *, scale=None, window_size_left=None, window_size_right=None, **_
):
    assert (dropout, debug, scale) == (0.0, False, None)
    left, right = (-1 if w is None else w for w in (window_size_left, window_size_right))
    out, lse = flash_forward(q, k, v, cu_q, cu_k, max_q, max_k, causal, left, right)
    return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty((), dtype=torch.uint64), q.new_empty(0)


def aten_flash_backward(
    d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout, causal, seed, unused, *, scale=None, **windows
):
    assert (dropout, scale, seed.dtype) == (0.0, None, torch.uint64)
    left, right = (-1 if w is None else w for w in (windows["window_size_left"], windows["window_size_right"]))
    return flash_backward(d_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, causal, left, right)


def aten_cudnn_forward(q, k, v, bias, with_lse, dropout=0.0, causal=False, debug=False, *, scale=None):
    """Causal from the first row and the first key."""
    assert (bias, with_lse, dropout, debug, scale) == (None, True, 0.0, False, None)
    R, T = q.shape[2], k.shape[2]
    mask = torch.ones(R, T, dtype=torch.bool)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    both = [forward_of(*some, mask.tril() if causal else mask, 0.0) for some in zip(q, k, v, strict=True)]
    out, lse = (torch.stack(x) for x in zip(*both, strict=True))
    seed = torch.zeros((), dtype=torch.int64)
    return out.transpose(1, 2), lse[..., None], None, None, R, T, seed, seed.clone(), None


def aten_cudnn_backward(d_out, q, k, v, out, lse, seed, offset, bias, cu_q, cu_k, max_q, max_k, dropout, causal, *, scale=None):
    assert (bias, dropout, scale, max_q, max_k) == (None, 0.0, None, q.shape[2], k.shape[2])
    assert lse.shape == (*q.shape[:3], 1)
    assert lse.is_contiguous()
    mask = torch.ones(max_q, max_k, dtype=torch.bool)
    tensors = [x.transpose(1, 2) for x in (d_out, q, k, v, out)]
    parts = [backward_of(*some, mask.tril() if causal else mask, 0.0) for some in zip(*tensors, lse[..., 0], strict=True)]
    return tuple(torch.stack(x).transpose(1, 2) for x in zip(*parts, strict=True))


@contextmanager
def promised():
    """The operations of ATen, and the package, are there on a CPU."""
    library = Library("aten", "IMPL")
    for name, fn in {
        "_flash_attention_forward": aten_flash_forward,
        "_flash_attention_backward": aten_flash_backward,
        "_scaled_dot_product_cudnn_attention": aten_cudnn_forward,
        "_scaled_dot_product_cudnn_attention_backward": aten_cudnn_backward,
    }.items():
        library.impl(name, fn, "CPU")
    sys.modules |= {"flash_attn": ModuleType("flash_attn"), "flash_attn.flash_attn_interface": package()}
    try:
        yield
    finally:
        library._destroy()
        del sys.modules["flash_attn"], sys.modules["flash_attn.flash_attn_interface"]


# --- the package ------------------------------------------------------------------------------------------------------


def package():
    """Of flash-attn 2.7 and 2.8 those functions of ``flash_attn_interface`` that are below autograd, by their signatures."""

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, softmax_scale, alibi_slopes, return_softmax) == (0.0, q.shape[-1] ** -0.5, None, False)
        args = None, None, q.shape[1], k.shape[1], causal, window_size_left, window_size_right, softcap
        return *flash_forward(q, k, v, *args), q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
    ):
        assert (dropout_p, softmax_scale, alibi_slopes, return_softmax) == (0.0, q.shape[-1] ** -0.5, None, False)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = flash_forward(q, k, v, *lengths, causal, window_size_left, window_size_right, softcap)
        return out, lse, q.new_empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        args = None, None, q.shape[1], k.shape[1], causal, window_size_left, window_size_right, softcap
        for into, found in zip((dq, dk, dv), flash_backward(dout, q, k, v, out, softmax_lse, *args), strict=True):
            into.copy_(found)
        return q.new_empty(0)

    def _flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        args = *lengths, causal, window_size_left, window_size_right, softcap
        for into, found in zip((dq, dk, dv), flash_backward(dout, q, k, v, out, softmax_lse, *args), strict=True):
            into.copy_(found)
        return q.new_empty(0)

    module = ModuleType("flash_attn.flash_attn_interface")
    vars(module).update({fn.__name__: fn for fn in (_flash_attn_forward, _flash_attn_varlen_forward)})
    vars(module).update({fn.__name__: fn for fn in (_flash_attn_backward, _flash_attn_varlen_backward)})
    return module
