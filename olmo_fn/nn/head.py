"""The language-model head: final norm, logits, cross entropy and z-loss, without ever holding all logits in fp32.

N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_fn.grad import IGNORE, Metrics
from olmo_fn.nn.norm import rms_norm

LOGITS_BYTES = 1 << 27  # logits that live at once: enough rows for fast matrix products, small beside the weights
CACHE_BYTES = 1 << 23  # logits that one pass of the softmax touches: they stay in the processor's cache


def head_loss(norm: Tensor, w_out: Tensor, x: Tensor, labels: Tensor, *, eps: float, z_loss: float) -> tuple[Tensor, Metrics]:
    """Summed cross entropy plus ``z_loss · logsumexp²`` (PaLM, section 5) over the labels that count.

    ``norm`` (D,), ``w_out`` (V, D), ``x`` (..., D), ``labels`` (...) with `IGNORE` where there is no loss. Returns the sum
    (0-d, fp32) and its two parts ``ce`` and ``z``. Plain differentiable operations: for ``torch.func``, and the
    definition that `head_vjp` must agree with.
    """
    logits = rms_norm(norm, x, eps) @ w_out.T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counts = labels != IGNORE
    lse = logits.logsumexp(-1)
    target = logits.gather(-1, labels.where(counts, 0)[..., None])[..., 0]
    ce = (lse - target).where(counts, 0.0).sum()
    z = z_loss * lse.square().where(counts, 0.0).sum()
    return ce + z, {"ce": ce.detach(), "z": z.detach()}


def head_vjp(
    norm: Tensor, w_out: Tensor, x: Tensor, labels: Tensor, *, eps: float, z_loss: float
) -> tuple[tuple[Tensor, Metrics], Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """`head_loss` with its pullback, which takes the cotangent of the sum to those of ``norm``, ``w_out`` and ``x``.

    Gradients of the logits are formed in place while the logits of a chunk of positions are in memory, so logits
    are computed once and never kept: for each chunk three matrix products and two passes over its logits.
    """
    with torch.enable_grad():
        x_leaf, norm_leaf = x.detach().requires_grad_(), norm.detach().requires_grad_()
        normed = rms_norm(norm_leaf, x_leaf, eps)
    h = normed.detach().flatten(0, -2)  # (N, D)
    target = labels.flatten()
    N, V = h.shape[0], w_out.shape[0]
    rows = max(1, min(N, LOGITS_BYTES // (V * 4)))
    accumulator = torch.float64 if h.dtype == torch.float64 else torch.float32
    d_w = torch.empty_like(w_out, dtype=accumulator)
    d_h = torch.empty_like(h)
    ce = torch.zeros((), dtype=accumulator, device=h.device)
    z = torch.zeros_like(ce)
    buffer = torch.empty(rows, V, dtype=h.dtype, device=h.device)
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits = torch.mm(h[part], w_out.T, out=buffer[: part.stop - start])
        part_ce, part_z = _to_gradient(logits, target[part], z_loss)
        ce, z = ce + part_ce, z + part_z
        torch.mm(logits, w_out, out=d_h[part])
        _add_product(d_w, logits, h[part], first=start == 0)
    del buffer

    def pullback(cotangent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d_normed = (d_h * cotangent.to(d_h.dtype)).view_as(normed)
        d_norm, d_x = torch.autograd.grad(normed, (norm_leaf, x_leaf), d_normed)
        return d_norm, d_w.mul_(cotangent), d_x

    return (ce + z, {"ce": ce, "z": z}), pullback


def _to_gradient(logits: Tensor, target: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    """Overwrite ``logits`` (R, V) by the loss's gradient with respect to them; return the sums of ce and z.

    d/dlogits = softmax · (1 + 2 z_loss · logsumexp) - onehot(target), and 0 in rows without a label.
    """
    counts = target != IGNORE
    index = target.where(counts, 0)[:, None]
    sums_ce, sums_z = [], []
    step = max(1, CACHE_BYTES // (logits.shape[1] * 4))
    for start in range(0, logits.shape[0], step):
        block, on, at = (t[start : start + step] for t in (logits, counts, index))
        log_p = torch.log_softmax(block, -1, dtype=torch.promote_types(block.dtype, torch.float32))
        lse = (block[:, :1] - log_p[:, :1]).to(log_p.dtype)
        sums_ce.append(-log_p.gather(1, at)[:, 0].where(on, 0.0).sum())
        sums_z.append(lse[:, 0].square().where(on, 0.0).sum())
        scale = (1 + 2 * z_loss * lse).where(on[:, None], 0.0)
        p = log_p.exp_()
        if z_loss or not bool(on.all()):
            p.mul_(scale)
        p.scatter_add_(1, at, -on[:, None].to(p.dtype))
        block.copy_(p)
    return torch.stack(sums_ce).sum(), z_loss * torch.stack(sums_z).sum()


def _add_product(total: Tensor, d_logits: Tensor, h: Tensor, *, first: bool) -> None:
    """``total (+)= d_logitsᵀ h`` without a temporary when the dtypes agree."""
    if total.dtype == h.dtype:
        torch.addmm(total, d_logits.T, h, beta=0.0 if first else 1.0, out=total)
    elif first:
        total.copy_(d_logits.T @ h)
    else:
        total.add_(d_logits.T @ h)
