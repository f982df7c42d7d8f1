"""The language-model head after its norm: logits, cross entropy and z-loss, without ever holding all logits in fp32.

N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.chain import IGNORE, Backend, Metrics
from olmo_fn.core.primitive import VJP
from olmo_fn.kernels import Kernel, on_triton
from olmo_fn.kernels.exponential import exp
from olmo_fn.kernels.huge_pages import new_large, to_large
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import pmax, psum
from olmo_fn.nn.context import Context
from olmo_fn.nn.embedding import local_rows
from olmo_fn.nn.linear import Weight, merged

LOGITS_BYTES = 1 << 25  # logits that live at once, within these numbers of rows:
LOGITS_ROWS = (1024, 2048)  # fast matrix products need the first, more than the second gain nothing
CUDA_LOGITS_BYTES = 1 << 30  # a chunk's products fill a GPU many times over, and its sum passes the weight's gradient but once
CUDA_LOGITS_ROWS = (4096, 8192)


def cross_entropy(
    ctx: Context,
    matrix: Weight,
    h: Tensor,
    labels: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    cap: float | None = None,
    sources: int = 0,
) -> tuple[Tensor, Metrics]:
    """Summed cross entropy plus ``z_loss · logsumexp²`` (PaLM, section 5) over the labels that count.

    ``matrix`` (V, D) in any dtype, ``h`` (B, T, D) after the final norm in that of the products, ``labels`` (B, T), `IGNORE`
    where there is no loss. Returns the sum (0-d, fp32) and its two parts ``ce`` and ``z``. On an axis ``tp`` each rank has some
    rows of the vocabulary, and the same ``h``; the sum is the whole one on all of them, the gradient of ``h`` a rank's share.
    With a ``cap`` logits are `capped`. With ``sources`` the metrics have ``source_ce`` and ``source_tokens`` (sources,),
    sums over the sequences that ``ctx.sources`` says are from each.

    >>> from olmo_fn.core.chain import Backend
    >>> h, labels = torch.tensor([[[2.0, 0.0, 0.0]]]), torch.tensor([[0]])
    >>> ctx = Context(Backend(), labels, labels, labels)
    >>> loss, metrics = cross_entropy(ctx, torch.eye(3), h, labels, vocab_size=3)
    >>> round(loss.item(), 3)  # the label's probability is 0.787
    0.24
    """
    backend, tp, w_out = ctx.backend, ctx.backend.axes.tp, merged(matrix)
    rows, inside = local_rows(labels, vocab_size, tp)
    of = None if not sources or ctx.sources is None else of_sources(ctx.sources, labels, sources)
    if not backend.primitive:
        return plain_cross_entropy(w_out, h, labels, rows, inside, z_loss, tp, cap, of)
    if backend.loss_weight is None:  # there will be no backward
        return _by_rows(w_out, h, labels, rows, inside, z_loss, tp, cap)
    vjp = _cross_entropy_vjp(labels, rows, inside, z_loss, tp, backend, cap, of)
    total, ce, z, *by_source = backend.primitive(vjp, [w_out], [h], backend.weight_grads)
    return total, {"ce": ce.detach(), "z": z.detach(), **_source_metrics(of, *(x.detach() for x in by_source))}


def of_sources(source: Tensor, labels: Tensor, sources: int) -> Tensor:
    """Which positions of ``labels`` (B, T) count for which source, given that of each sequence (B,): (sources, B·T) bool.

    >>> of_sources(torch.tensor([1, 0]), torch.tensor([[5, 6], [7, IGNORE]]), 2).int()
    tensor([[0, 0, 1, 0],
            [1, 1, 0, 0]], dtype=torch.int32)
    """
    inside = (source[:, None].expand_as(labels) == torch.arange(sources, device=labels.device)[:, None, None]) & (
        labels != IGNORE
    )
    return inside.flatten(1)


def _source_metrics(of: Tensor | None, *ce: Tensor) -> Metrics:
    return {} if of is None else {"source_ce": ce[0], "source_tokens": of.sum(1).to(ce[0].dtype)}


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """``cap · tanh(logits / cap)`` (Gemma 2, section 2), or the logits where there is none.

    >>> capped(torch.tensor([1.0, 100.0]), 30.0)
    tensor([ 0.9996, 29.9237])
    """
    return logits if cap is None else cap * torch.tanh(logits / cap)


def plain_cross_entropy(
    w_out: Tensor,
    h: Tensor,
    labels: Tensor,
    rows: Tensor,
    inside: Tensor | None,
    z_loss: float,
    tp: Axis,
    cap: float | None = None,
    of: Tensor | None = None,
) -> tuple[Tensor, Metrics]:
    """The definition, in plain differentiable operations; ``rows`` and ``inside`` are `local_rows` of the labels."""
    logits = h @ w_out.to(h.dtype).T
    logits = capped(logits if logits.dtype == torch.float64 else logits.float(), cap)
    counts = labels != IGNORE
    rows = rows.where(counts, 0)
    top = pmax(logits.detach().amax(-1), tp)
    lse = top + psum((logits - top[..., None]).exp().sum(-1), tp).log()
    target = logits.gather(-1, rows[..., None])[..., 0]
    target = target if inside is None else psum(target.where(inside, 0.0), tp)
    each = (lse - target).where(counts, 0.0)
    ce, z = each.sum(), z_loss * lse.square().where(counts, 0.0).sum()
    by_source = [] if of is None else [of.to(each.dtype) @ each.detach().flatten()]
    return ce + z, {"ce": ce.detach(), "z": z.detach(), **_source_metrics(of, *by_source)}


@torch.no_grad()
def _by_rows(
    w_out: Tensor,
    h: Tensor,
    labels: Tensor,
    rows: Tensor,
    inside: Tensor | None,
    z_loss: float,
    tp: Axis,
    cap: float | None,
    many: int = 1024,
) -> tuple[Tensor, Metrics]:
    """The loss alone, of ``many`` positions at a time."""
    w = to_large(w_out, h.dtype)  # once
    parts = [x.flatten().split(many) for x in (labels, rows, *([] if inside is None else [inside]))]
    sums: dict[str, Tensor] = {}
    for part, *indices in zip(h.flatten(0, -2).split(many), *parts, strict=True):
        some_labels, some_rows, some_inside = indices if inside is not None else (*indices, None)
        loss, metrics = plain_cross_entropy(w, part, some_labels, some_rows, some_inside, z_loss, tp, cap)
        for name, value in {"loss": loss, **metrics}.items():
            sums[name] = sums[name] + value if name in sums else value
    return sums.pop("loss"), sums


def _cross_entropy_vjp(
    labels: Tensor,
    label_rows: Tensor,
    inside: Tensor | None,
    z_loss: float,
    tp: Axis,
    backend: Backend,
    cap: float | None,
    of: Tensor | None = None,
) -> VJP:
    """Gradients of the logits are formed in place while the logits of a chunk of positions are in memory.

    So logits are computed once and never kept: for each chunk three matrix products and one kernel over its logits. The weight
    that the loss is known to have in the end is part of the gradients before they are rounded.
    """
    weight = backend.loss_weight
    assert weight is not None

    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        (w_out,), (h,) = weights, inputs
        shape, target = h.shape, labels.flatten()
        seen = label_rows.flatten(), None if inside is None else inside.flatten()
        h = h.flatten(0, -2)  # (N, D)
        N, V = h.shape[0], w_out.shape[0]
        many = rows_at_once(N, V * h.element_size(), h.is_cuda)
        w, d_w = to_large(w_out, h.dtype), None
        d_h = torch.empty_like(h)
        buffer = new_large(h, many, V)
        written = None if of is not None else _one_pass(backend.kernel, buffer, tp)
        sums = torch.zeros(2, dtype=torch.promote_types(h.dtype, torch.float32), device=h.device)  # ce, z
        by_source = [] if of is None else [sums.new_zeros(len(of))]
        for start in range(0, N, many):
            part = slice(start, min(start + many, N))
            logits = torch.mm(h[part], w.T, out=buffer[: part.stop - start])
            some = (target[part], seen[0][part], None if seen[1] is None else seen[1][part])
            if written:
                sums += written(logits, target[part], weight, z_loss, cap)
            else:
                each = _through_cap(logits, cap, *some, z_loss, weight, backend.kernel, tp)
                sums += each.sum((1, 2))
                if of is not None:
                    by_source[0] += of[:, part].to(each.dtype) @ each[0, :, 0]
            torch.mm(logits, w, out=d_h[part])
            if part.stop == N:
                del w  # a copy, or not, in whose place its gradient may lie
            d_w = _add_product(d_w, logits, h[part], many < N)
        del buffer, logits
        ce, z = sums.unbind()

        def pullback(c: Tensor, *_: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            nonlocal d_w
            gradient, d_w = d_w, None
            assert gradient is not None
            if c.data_ptr() == weight.data_ptr():
                return (lambda: gradient,), (d_h.view(shape),)
            times = c / weight  # another cotangent than was expected
            return (lambda: gradient.to(c.dtype) * times,), ((d_h.to(c.dtype) * times).to(d_h.dtype).view(shape),)

        return (ce + z, ce.clone(), z.clone(), *by_source), pullback

    return vjp


def _one_pass(kernel: Kernel, logits: Tensor, tp: Axis) -> Callable[..., Tensor] | None:
    """A kernel that does to ``logits`` in one pass what `_through_cap` does in two or more, where there is one."""
    if not on_triton(kernel, logits) or tp.size > 1 or logits.dtype != torch.bfloat16 or logits.shape[1] % 2:
        return None
    from olmo_fn.kernels.triton_logits import logits_gradient

    return logits_gradient


def _through_cap(logits: Tensor, cap: float | None, *rest: Any) -> Tensor:
    """`_to_gradient` of logits before they are capped."""
    slope = None if cap is None else _cap(logits, cap)
    each = _to_gradient(logits, *rest)
    if slope is not None:
        logits.mul_(slope)
    return each


def rows_at_once(N: int, row_bytes: int, cuda: bool) -> int:
    """How many of ``N`` positions, with logits of ``row_bytes`` each, are a chunk.

    >>> rows_at_once(8192, 2 * 100352, cuda=False), rows_at_once(8192, 2 * 100352, cuda=True)
    (1024, 4096)
    """
    (fewest, most), size = (CUDA_LOGITS_ROWS, CUDA_LOGITS_BYTES) if cuda else (LOGITS_ROWS, LOGITS_BYTES)
    at_most = max(fewest, min(most, size // row_bytes))
    return -(-N // -(-N // at_most)) if cuda else min(N, at_most)  # of one size, so that none is a small product


def _cap(logits: Tensor, cap: float) -> Tensor:
    """Overwrite logits by `capped` ones; returns the derivative, ``1 - tanh²``, in their dtype."""
    tanh = torch.tanh(logits.to(torch.promote_types(logits.dtype, torch.float32)) / cap)
    logits.copy_(cap * tanh)
    return (1 - tanh * tanh).to(logits.dtype)


def _to_gradient(
    logits: Tensor,
    target: Tensor,
    index: Tensor,
    inside: Tensor | None,
    z_loss: float,
    weight: Tensor,
    kernel: Kernel,
    tp: Axis,
) -> Tensor:
    """Overwrite ``logits`` (R, V) by the loss's gradient with respect to them; return ce and z of each row, (2, R, 1).

    d/dlogits = weight · (softmax · (1 + 2 z_loss · logsumexp) - onehot(target)), 0 in rows without a label.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    counts = (target != IGNORE)[:, None]
    weights = counts.to(wide) * weight.to(wide)
    index = index[:, None].where(counts, 0)
    here = counts if inside is None else inside[:, None]
    label = logits.gather(1, index).to(wide)
    if tp.size == 1:
        lse = kernel(_softmax_times)(logits, weights, z_loss)
    else:
        local = kernel(_logsumexp)(logits, wide)
        top = pmax(local, tp)
        lse = top + psum((local - top).exp(), tp).log()
        kernel(_softmax_given)(logits, lse, weights, z_loss)
    at_label = ((label - lse).exp() * (1 + 2 * z_loss * lse) - 1) * weights
    at_label = at_label.to(logits.dtype).where(here & counts, logits.gather(1, index))
    rows = torch.arange(len(target), device=target.device)
    logits.index_put_((rows, index[:, 0]), at_label[:, 0])  # scatter_ in bf16 would copy all logits there and back
    ce, z = lse - psum(label.where(here, 0.0), tp), z_loss * lse.square()
    return torch.stack((ce, z)).where(counts, 0.0)


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


def _add_product(total: Tensor | None, d_logits: Tensor, h: Tensor, summed: bool) -> Tensor:
    """``total + d_logitsᵀ h``; a single product keeps the dtype of its factors, a sum of them has at least fp32.

    On CUDA the product itself adds to the fp32 sum, before anything is rounded; on a CPU it cannot.
    """
    wide = torch.promote_types(h.dtype, torch.float32)
    if h.is_cuda and summed and h.dtype != wide:
        if total is None:
            return torch.mm(d_logits.T, h, out_dtype=wide)
        return torch.addmm(total, d_logits.T, h, out_dtype=wide, out=total)
    if total is None:
        return torch.mm(d_logits.T, h, out=new_large(h, d_logits.shape[1], h.shape[1]))
    if h.dtype == wide:
        return total.addmm_(d_logits.T, h)
    return total.to(wide).add_(d_logits.T @ h)
