"""Experts: feed-forward networks each of which sees the tokens that were sent to it, on whatever ranks they are.

N tokens of a rank, k experts for each, E experts, of which a rank of ``ep`` has E/n; R rows, one for a token and expert, those
of an expert together; D width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import Function as AutogradFunction
from torch.autograd.function import once_differentiable

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels import Function, Kernel
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, exchange, reduce_scatter
from olmo_fn.nn.context import Context
from olmo_fn.nn.feed_forward import ACTIVATIONS, Activation

Dispatch: TypeAlias = Literal["auto", "exchange", "gather"]


class Rows(NamedTuple):
    """Which row is which choice: ``choice`` (R,) says for each row, ``row`` (M,) for each choice.

    ``counts`` (E,) are the rows of each expert; an integer: that many for every one. Unless they are ``whole`` some choices
    have no row, which is R for them, and some rows no choice, which is -1.
    """

    choice: Tensor
    row: Tensor
    counts: Tensor | int
    whole: bool = True


def permuted(order: Tensor, counts: Tensor | int = 0) -> Rows:
    """As many rows as choices, in this ``order``."""
    return Rows(order, torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=order.device)), counts)


def _sorted(experts: Tensor, E: int) -> tuple[Tensor, Tensor]:
    """The choices (M,) in the order of their experts, and how many each of the first E has."""
    counts = torch.zeros(E + 1, dtype=torch.int64, device=experts.device).index_add_(0, experts, torch.ones_like(experts))
    return experts.argsort(stable=True), counts[:E]


def rows_of(experts: Tensor, E: int, multiple: int = 1) -> Rows:
    """The rows of choices ``experts`` (N, k), those of an expert in the order of tokens; nothing waits for their numbers,
    unless each expert has rows up to a ``multiple`` above 1.
    """
    if multiple > 1:
        return rows_of_some(experts, E, None, multiple, usual=experts.numel())
    return permuted(*_sorted(experts.flatten(), E))


def rows_of_some(experts: Tensor, E: int, kept: Tensor | None, multiple: int, usual: int) -> Rows:
    """The same of the ``kept`` (N, k), all if None, of which there are ``usual`` where nobody knows; each expert has rows up to
    a ``multiple``, the last of which may have no choice. Waits for how many rows there are.
    """
    flat = (experts if kept is None else experts.where(kept, E)).flatten()
    order, counts = _sorted(flat, E)
    sizes = (counts + multiple - 1) // multiple * multiple
    return _with_room(flat, order, counts, sizes, sum(-(-n // multiple) * multiple for n in numbers(sizes, usual)))


def slots_of(experts: Tensor, E: int, kept: Tensor, most: int) -> Rows:
    """The same with ``most`` rows for each expert, which has no more choices that are ``kept``: nothing waits for anything."""
    flat = experts.where(kept, E).flatten()
    order, counts = _sorted(flat, E)
    return _with_room(flat, order, counts, torch.full_like(counts, most), E * most)._replace(counts=most)


def _with_room(experts: Tensor, order: Tensor, counts: Tensor, sizes: Tensor, R: int) -> Rows:
    """R rows, ``sizes`` (E,) of each expert, the first ``counts`` (E,) of which are its choices, in their ``order``."""
    shift = torch.cat((sizes.cumsum(0) - sizes - (counts.cumsum(0) - counts), sizes.new_full((1,), R)))
    places = torch.arange(len(order), device=order.device)
    slot = (places + shift[experts[order]]).clamp(max=R)
    row = torch.empty_like(order).index_copy_(0, order, slot)
    choice = torch.full((R + 1,), -1, dtype=torch.int64, device=order.device).index_copy_(0, slot, order)
    return Rows(choice[:-1], row, sizes, whole=False)


def numbers(counts: Tensor, *usual: int) -> list[int]:
    """The entries of ``counts`` on the host, which waits for them. Where nothing has been computed, in plans, and in traces,
    which see the wait: for each of ``usual`` as many, even ones that add up to it.

    >>> numbers(torch.empty(4, device="meta"), 10, 7)
    [5, 5, 4, 3]
    """
    host = counts if counts.is_meta else counts.cpu()
    if host.is_meta or is_fake(host):
        n = host.numel() // len(usual)
        return [total // n + (i < total % n) for total in usual for i in range(n)]
    found: list[int] = host.tolist()
    return found


def take(x: Tensor, rows: Rows, k: int = 1) -> Tensor:
    """The rows (R, …) of tokens ``x`` (N, …), each of which has k choices; 0 for a row without a choice. Differentiable once.

    >>> x, rows = torch.tensor([5.0, 7.0]), rows_of(torch.tensor([[1], [0]]), E=2)
    >>> take(x, rows), put(take(x, rows), rows)
    (tensor([7., 5.]), tensor([5., 7.]))
    """
    found: Tensor = _Linear.apply(x, _take, _put, rows, k)
    return found


def put(y: Tensor, rows: Rows, k: int = 1) -> Tensor:
    """The transpose of `take`: each token's rows of ``y`` (R, …) added up, (N, …)."""
    found: Tensor = _Linear.apply(y, _put, _take, rows, k)
    return found


def _take(x: Tensor, rows: Rows, k: int) -> Tensor:
    if rows.whole:
        return x[rows.choice // k if k > 1 else rows.choice]
    there = (rows.choice >= 0).to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return x[rows.choice.clamp(min=0) // k] * there


def _put(y: Tensor, rows: Rows, k: int) -> Tensor:
    y = y if rows.whole else torch.cat((y, y.new_zeros(1, *y.shape[1:])))
    return y[rows.row] if k == 1 else y[rows.row].unflatten(0, (-1, k)).sum(1)


class _Linear(AutogradFunction):
    """``fn(x, *args)``, linear in x, whose ``transpose(g, *args)`` is its backward."""

    @staticmethod
    def forward(x: Tensor, fn: Function, transpose: Function, *args: Any) -> Any:
        return fn(x, *args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.transpose, *ctx.args = inputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.transpose(g, *ctx.args), None, None, *[None] * len(ctx.args)


# --- products of many experts -----------------------------------------------------------------------------------------


def grouped_mm(x: Tensor, w: Tensor, counts: Tensor | int, ends: Tensor | None = None) -> Tensor:
    """Each expert's rows of ``x`` (R, D) times its matrix of ``w`` (E, D, F): (R, F); ``ends``: `ends_of` counts.

    >>> x, w = torch.ones(3, 2), torch.stack((torch.eye(2), 5 * torch.eye(2)))
    >>> grouped_mm(x, w, torch.tensor([1, 2]))[:, 0]
    tensor([1., 5., 5.])
    """
    if isinstance(counts, int):
        return torch.bmm(x.view(len(w), counts, -1), w).flatten(0, 1)
    if _fits(x, w):
        return F.grouped_mm(x, w, offs=ends_of(counts) if ends is None else ends)
    parts = x.split(numbers(counts, len(x)))
    return torch.cat([part @ matrix for part, matrix in zip(parts, w, strict=True)])


def ends_of(counts: Tensor) -> Tensor:
    """Where the rows of each expert end, as torch's grouped product wants to know it: int32."""
    return counts.cumsum(0, dtype=torch.int32)


def grouped_gradient(x: Tensor, d_y: Tensor, counts: Tensor | int, E: int, ends: Tensor | None = None) -> Tensor:
    """The gradient of ``w`` in `grouped_mm`: ``x``ᵀ ``d_y`` of each expert's rows, (E, D, F)."""
    if isinstance(counts, int):
        return torch.bmm(x.view(E, counts, -1).mT, d_y.view(E, counts, -1))
    if _fits(x, d_y):
        found = F.grouped_mm(x.T, d_y, offs=ends_of(counts) if ends is None else ends)
        return written(found, counts) if _leaves_gaps(x) else found
    sizes = numbers(counts, len(x))
    return torch.stack([a.T @ b for a, b in zip(x.split(sizes), d_y.split(sizes), strict=True)])


def written(found: Tensor, counts: Tensor) -> Tensor:
    """Gradients (E, D, F) with zeros for experts without rows, which Blackwell's kernel leaves unwritten (pytorch 172439)."""
    return found.masked_fill_((counts == 0)[:, None, None], 0)


def _leaves_gaps(x: Tensor) -> bool:
    return x.is_cuda and not (x.is_meta or is_fake(x)) and torch.cuda.get_device_capability(x.device)[0] >= 10


def _fits(x: Tensor, w: Tensor) -> bool:
    """What torch's grouped product takes (2.13): no fp64, rows of whole 16 bytes; on a GPU, or without memory, bf16 only."""
    dtypes = (torch.bfloat16,) if x.is_cuda or x.is_meta or is_fake(x) else (torch.bfloat16, torch.float32)
    even = all(n * x.itemsize % 16 == 0 for n in (x.shape[-1], w.shape[-1]))  # of the number of rows nothing is asked
    return x.dtype in dtypes and x.dtype == w.dtype and even and len(x) > 0


@cache
def _weighted(activation: Activation) -> tuple[Function, Function]:
    """``weight · act(gate) · up``; and from its cotangent that product again, and the cotangents of gate, up and weight."""
    fns = ACTIVATIONS[activation]

    def forward(gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        return (fns.gated(gate, up) * weight).to(gate.dtype)

    def gradient(gate: Tensor, up: Tensor, weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        wide = d.to(weight.dtype)
        hidden, d_gate, d_up = fns.gradient(gate, up, (wide * weight).to(d.dtype))
        return (hidden * weight).to(d.dtype), d_gate, d_up, (hidden * wide).sum(-1, keepdim=True)

    return forward, gradient


def grouped_gated(kernel: Kernel, activation: Activation, counts: Tensor | int) -> VJP:
    """``(weight · act(x w_gate) · (x w_up)) w_down`` of each row by its expert, as a primitive of the three stacks of matrices
    (E, D, F), (E, D, F), (E, F, D) and the inputs x (R, D) and weight (R,), as wide as the router's scores.
    """
    forward, gradient = _weighted(activation)

    def vjp(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        (w_gate, w_up, w_down), (x, weight) = tensors, inputs
        ends = None if isinstance(counts, int) else ends_of(counts)
        gate, up = grouped_mm(x, w_gate, counts, ends), grouped_mm(x, w_up, counts, ends)
        y = grouped_mm(kernel(forward)(gate, up, weight[:, None]), w_down, counts, ends)

        def pullback(d_y: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_y = d_y.contiguous()
            d_hidden = grouped_mm(d_y, w_down.mT, counts, ends)
            hidden, d_gate, d_up, d_weight = kernel(gradient)(gate, up, weight[:, None], d_hidden)
            d_x = grouped_mm(d_gate, w_gate.mT, counts, ends) + grouped_mm(d_up, w_up.mT, counts, ends)
            E = len(w_gate)
            d_weights = (
                lambda: grouped_gradient(x, d_gate, counts, E, ends),
                lambda: grouped_gradient(x, d_up, counts, E, ends),
                lambda: grouped_gradient(hidden, d_y, counts, E, ends),
            )
            return d_weights, (d_x, d_weight[:, 0])

        return y, pullback

    return vjp


# --- tokens and experts brought together ------------------------------------------------------------------------------


class Work(NamedTuple):
    """What experts are to do: tokens ``x`` (N, D), numbers of their ``experts`` (N, k) out of ``E``, and ``weights`` (N, k).

    ``kept`` (N, k): which of these choices count, all if None, and ``most``: how many of one expert they can be.
    ``matrices``: w_gate, w_up, w_down of this rank's experts.
    """

    x: Tensor
    experts: Tensor
    weights: Tensor
    E: int
    matrices: tuple[Tensor, Tensor, Tensor]
    activation: Activation = "silu"
    kept: Tensor | None = None
    most: int = 0


def by_experts(ctx: Context, work: Work, dispatch: Dispatch = "auto") -> Callable[[], Tensor]:
    """What the experts make of the tokens, (N, D): the weighted sum over each token's experts. Call the result to wait for it.

    Over ``ep`` rows travel to the ranks of their experts and back (``exchange``), or all tokens to all ranks, and sums of what
    their experts make back (``gather``): 2 k N D (n - 1) / n numbers a rank, or 2 N D (n - 1), so that gathering is less where
    a token has more experts than there are ranks. Computed out of the tape, by plain operations, tokens are gathered.
    """
    ep = ctx.backend.axes.ep
    if not ctx.backend.primitive:
        found = everywhere(work, ep)
        return lambda: found
    if ep.size == 1:
        found = alone(ctx, work)
        return lambda: found
    if dispatch == "gather" or (dispatch == "auto" and ep.size < work.experts.shape[1]):
        found = gathered(ctx, work, ep)
        return lambda: found
    return exchanged(ctx, work, ep)


def everywhere(work: Work, ep: Axis) -> Tensor:
    """The definition: every expert sees every token, and its weight is mostly 0. Differentiable any number of times."""
    weights = work.weights if work.kept is None else work.weights * work.kept.to(work.weights.dtype)
    dense = torch.zeros(len(weights), work.E, dtype=weights.dtype, device=weights.device).scatter_add(1, work.experts, weights)
    x, dense = all_gather(work.x, 0, ep), all_gather(dense, 0, ep)
    w_gate, w_up, w_down = work.matrices
    fns, first, total = ACTIVATIONS[work.activation], ep.index * len(w_gate), torch.zeros_like(x)
    for e in range(len(w_gate)):
        hidden = fns.gated(x @ w_gate[e], x @ w_up[e]) * dense[:, first + e, None]
        total = total + hidden.to(x.dtype) @ w_down[e]
    return reduce_scatter(total, 0, ep)


def alone(ctx: Context, work: Work) -> Tensor:
    """All experts are here."""
    rows, k = _rows(work, rows_at_once(work.x)), work.experts.shape[1]
    x, weight = take(work.x, rows, k), take(work.weights.flatten(), rows)
    return put(_computed(ctx, work, x, weight, rows.counts), rows, k)


def rows_at_once(x: Tensor) -> int:
    """Of what the number of an expert's rows is made a multiple. oneDNN, which multiplies in bf16 on a CPU, makes code for
    every number that it has not seen, in more time than the product takes: 132 ms for 8 experts of 512 x 1,024 and 4,096 rows
    in all where the numbers change, 20 where they are multiples of 64.
    """
    return 64 if x.dtype == torch.bfloat16 and x.device.type != "cuda" else 1


def _rows(work: Work, multiple: int = 1) -> Rows:
    if work.kept is None:
        return rows_of(work.experts, work.E, multiple)
    return slots_of(work.experts, work.E, work.kept, work.most)


def gathered(ctx: Context, work: Work, ep: Axis) -> Tensor:
    """All tokens come to all ranks, whose sums go back. Without a capacity it waits, once, for how many its experts get."""
    mine, k = len(work.matrices[0]), work.experts.shape[1]
    experts = all_gather(work.experts.int(), 0, ep).long() - ep.index * mine
    kept = (experts >= 0) & (experts < mine)
    if work.kept is None:
        rows = rows_of_some(experts, mine, kept, rows_at_once(work.x), _planned(ctx, work, ep))
    else:
        kept = kept & all_gather(work.kept.to(torch.uint8), 0, ep).bool()
        rows = slots_of(experts, mine, kept, ep.size * work.most)
    x, weight = take(all_gather(work.x, 0, ep), rows, k), take(all_gather(work.weights, 0, ep).flatten(), rows)
    return reduce_scatter(put(_computed(ctx, work, x, weight, rows.counts), rows, k), 0, ep)


def _planned(ctx: Context, work: Work, ep: Axis) -> int:
    """Rows for a rank's experts, in a plan: its even share of them, ``skew`` times, and no more than there are."""
    return min(round(ctx.backend.skew * work.experts.numel()), ep.size * work.experts.numel())


def exchanged(ctx: Context, work: Work, ep: Axis) -> Callable[[], Tensor]:
    """Rows travel to their experts and back. With a capacity as many to each rank; else it waits, once, for how many."""
    rows, k, mine = _rows(work), work.experts.shape[1], len(work.matrices[0])
    if isinstance(rows.counts, int):  # they come from rank after rank, and from each for its experts: (n, E/n, most)
        sent = received = [mine * work.most] * ep.size
        order = torch.arange(ep.size * sent[0], device=work.x.device).view(ep.size, mine, -1).transpose(0, 1).flatten()
        by_expert = permuted(order, ep.size * work.most)
    else:
        theirs = rows.counts.view(ep.size, mine)
        coming = exchange(theirs, [1] * ep.size, [1] * ep.size, ep)().view(ep.size, mine)
        both = numbers(torch.cat((theirs.sum(1), coming.sum(1))), len(rows.choice), _planned(ctx, work, ep))
        sent, received = both[: ep.size], both[ep.size :]
        of = torch.arange(mine, device=work.x.device).repeat(ep.size)
        of = of.repeat_interleave(coming.flatten(), output_size=sum(received))
        by_expert = rows_of(of, mine, rows_at_once(work.x))
    x = exchange(take(work.x, rows, k), sent, received, ep)
    weight = exchange(take(work.weights.flatten(), rows), sent, received, ep)

    def finish() -> Tensor:
        y = _computed(ctx, work, take(x(), by_expert), take(weight(), by_expert), by_expert.counts)
        return put(exchange(put(y, by_expert), received, sent, ep)(), rows, k)

    return finish


def _computed(ctx: Context, work: Work, x: Tensor, weight: Tensor, counts: Tensor | int) -> Tensor:
    vjp = grouped_gated(ctx.backend.kernel, work.activation, counts)
    assert ctx.backend.primitive
    found: Tensor = ctx.backend.primitive(vjp, work.matrices, [x, weight], ctx.backend.weight_grads)
    return found
