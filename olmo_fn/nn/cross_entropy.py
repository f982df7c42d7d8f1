"""The language-model head after its norm: logits, cross entropy and z-loss, without ever holding all logits in fp32.

N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from olmo_fn.core.chain import IGNORE, Kernel, Metrics, identity
from olmo_fn.kernels.exponential import exp
from olmo_fn.kernels.huge_pages import new_large, to_large
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import pmax, psum
from olmo_fn.nn.vocabulary import own_rows

LOGITS_BYTES = 1 << 25  # logits that live at once, within these numbers of rows:
LOGITS_ROWS = (1024, 2048)  # fast matrix products need the first, more than the second gain nothing


def head_loss(
    w_out: Tensor,
    h: Tensor,
    labels: Tensor,
    *,
    z_loss: float,
    tp: Axis = Axis(),  # noqa: B008
    first: int = 0,
) -> tuple[Tensor, Metrics]:
    """Summed cross entropy plus ``z_loss · logsumexp²`` (PaLM, section 5) over the labels that count.

    ``w_out`` (V, D) in any dtype, ``h`` (..., D) after the final norm in that of the products, ``labels`` (...), `IGNORE`
    where there is no loss. Returns the sum (0-d, fp32) and its two parts ``ce`` and ``z``. Plain differentiable operations:
    for ``torch.func``, and the definition that `head_vjp` must agree with. On an axis ``tp`` each rank has some rows of the
    vocabulary, those from ``first`` on, and the same ``h``; the sum is the whole one on all of them, the gradient of ``h`` a
    rank's share.
    """
    logits = h @ w_out.to(h.dtype).T
    logits = logits if logits.dtype == torch.float64 else logits.float()
    counts = labels != IGNORE
    index, here = own_rows(labels, first, w_out.shape[0])
    top = pmax(logits.detach().amax(-1), tp)
    lse = top + psum((logits - top[..., None]).exp().sum(-1), tp).log()
    target = psum(logits.gather(-1, index[..., None])[..., 0].where(here, 0.0), tp)
    ce = (lse - target).where(counts, 0.0).sum()
    z = z_loss * lse.square().where(counts, 0.0).sum()
    return ce + z, {"ce": ce.detach(), "z": z.detach()}


def head_vjp(
    w_out: Tensor,
    h: Tensor,
    labels: Tensor,
    *,
    z_loss: float,
    cotangent: Tensor | None = None,
    kernel: Kernel = identity,
    tp: Axis = Axis(),  # noqa: B008
    first: int = 0,
) -> tuple[tuple[Tensor, Metrics], Callable[[Tensor], tuple[Tensor, Tensor]]]:
    """`head_loss` with its pullback, which takes the cotangent of the sum to those of ``w_out`` and ``h``.

    Gradients of the logits are formed in place while the logits of a chunk of positions are in memory, so logits
    are computed once and never kept: for each chunk three matrix products and one kernel over its logits. A ``cotangent`` (0-d)
    known from the beginning is part of them before they are rounded, and then the pullback takes no other.

    >>> w, h, labels = torch.eye(3), torch.tensor([[2.0, 0.0, 0.0]]), torch.tensor([0])
    >>> (loss, metrics), pullback = head_vjp(w, h, labels, z_loss=0.0)
    >>> d_w, d_h = pullback(torch.tensor(1.0))
    >>> [round(x, 3) for x in (loss.item(), *d_h[0].tolist())]  # 0.787 is the label's probability
    [0.24, -0.213, 0.107, 0.107]
    """
    shape, target = h.shape, labels.flatten()
    h = h.flatten(0, -2)  # (N, D)
    N, V = h.shape[0], w_out.shape[0]
    fewest, most = LOGITS_ROWS
    rows = min(N, max(fewest, min(most, LOGITS_BYTES // (V * h.element_size()))))
    w, d_w = to_large(w_out, h.dtype), None
    d_h = torch.empty_like(h)
    buffer = new_large(h, rows, V)
    sums = torch.zeros(2, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)  # ce, z
    for start in range(0, N, rows):
        part = slice(start, min(start + rows, N))
        logits = torch.mm(h[part], w.T, out=buffer[: part.stop - start])
        sums += _to_gradient(logits, target[part], z_loss, cotangent, kernel, tp, first)
        torch.mm(logits, w, out=d_h[part])
        if part.stop == N:
            del w  # a copy, or not, in whose place its gradient may lie
        d_w = _add_product(d_w, logits, h[part])
    del buffer, logits
    ce, z = sums.unbind()

    def pullback(c: Tensor) -> tuple[Tensor, Tensor]:
        assert d_w is not None
        if cotangent is not None:
            assert c is cotangent
            return d_w, d_h.view(shape)
        wide = d_w.to(c.dtype)  # or this would round the scale of every gradient
        return wide * c, (d_h.to(c.dtype) * c).to(d_h.dtype).view(shape)

    return (ce + z, {"ce": ce, "z": z}), pullback


def _to_gradient(
    logits: Tensor, target: Tensor, z_loss: float, cotangent: Tensor | None, kernel: Kernel, tp: Axis, first: int
) -> Tensor:
    """Overwrite ``logits`` (R, V) by the loss's gradient with respect to them; return the sums of ce and z, (2,).

    d/dlogits = c · (softmax · (1 + 2 z_loss · logsumexp) - onehot(target)) with the cotangent c, 0 in rows without a label.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = (target != IGNORE)[:, None]
    weights = counts.to(wide) if cotangent is None else counts.to(wide) * cotangent.to(wide)
    index, here = (x[:, None] for x in own_rows(target, first, logits.shape[1]))
    label = logits.gather(1, index).to(wide)
    if tp.size == 1:
        lse = kernel(_softmax_times)(logits, weights, z_loss)
    else:
        own = kernel(_logsumexp)(logits, wide)
        top = pmax(own, tp)
        lse = top + psum((own - top).exp(), tp).log()
        kernel(_softmax_given)(logits, lse, weights, z_loss)
    at_label = ((label - lse).exp() * (1 + 2 * z_loss * lse) - 1) * weights
    at_label = at_label.to(logits.dtype).where(here & counts, logits.gather(1, index))
    rows = torch.arange(len(target), device=target.device)
    logits.index_put_((rows, index[:, 0]), at_label[:, 0])  # scatter_ in bf16 would copy all logits there and back
    ce, z = lse - psum(label.where(here, 0.0), tp), z_loss * lse.square()
    return torch.stack((ce, z)).where(counts, 0.0).sum((1, 2))


def _softmax_times(logits: Tensor, weights: Tensor, z_loss: float) -> Tensor:
    """Overwrite ``logits`` (R, V) by softmax · ``weights`` · (1 + 2 z_loss · lse); return the log-sum-exp (R, 1)."""
    lse = _logsumexp(logits, weights.dtype)
    _softmax_given(logits, lse, weights, z_loss)
    return lse


def _logsumexp(logits: Tensor, dtype: torch.dtype) -> Tensor:
    x = logits.to(dtype)
    top = x.amax(-1, keepdim=True)
    return top + exp(x - top).sum(-1, keepdim=True).log()


def _softmax_given(logits: Tensor, lse: Tensor, weights: Tensor, z_loss: float) -> None:
    logits.copy_(exp(logits.to(weights.dtype) - lse) * (weights * (1 + 2 * z_loss * lse)))


def _add_product(total: Tensor | None, d_logits: Tensor, h: Tensor) -> Tensor:
    """``total + d_logitsᵀ h``; a single product keeps the dtype of its factors, a sum of them has at least fp32."""
    if total is None:
        return torch.mm(d_logits.T, h, out=new_large(h, d_logits.shape[1], h.shape[1]))
    wide = torch.promote_types(h.dtype, torch.float32)
    if h.dtype == wide:
        return total.addmm_(d_logits.T, h)
    return total.to(wide).add_(d_logits.T @ h)
