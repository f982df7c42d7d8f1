"""Collectives inside a stage, by axis. On an axis of size 1 each returns its argument itself.

Each takes a tensor (fp32, bf16, fp64; any layout) and an `Axis`, and is differentiable any number of times, under
``torch.func``, autograd, and ``torch.compile(fullgraph=True)`` with autograd on detached leaves. They come in pairs, each
one's gradient being the other:

    enter     identity: a replicated value enters computation that differs by rank   psum            sum over ranks
    all_gather                                                                       reduce_scatter
    gather_replicated   parts become a value that all ranks go on with alike         take_part       a rank's part of it
    all_to_all(split, concat)                                                        all_to_all(concat, split)
    exchange(sent, received)                                                         exchange(received, sent)
    ring_shift(by)                                                                   ring_shift(-by)

The convention for gradients: a value that is replicated over the axis has a gradient that is replicated too, and a value
that differs by rank has its own. `enter` and `psum` are the borders between the two (f and g of Megatron-LM,
Shoeybi et al. 2019, arXiv 1909.08053, figure 3). Shards are even.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed.distributed_c10d import GroupName, _coalescing_manager, _resolve_process_group

from olmo_fn.mesh.axis import Axis


def enter(x: Tensor, axis: Axis) -> Tensor:
    """``x``, equal on all ranks, enters computation that differs by rank; its gradient is summed over the axis."""
    return x if axis.size == 1 else _Enter.apply(x, axis.group)


def psum(x: Tensor, axis: Axis) -> Tensor:
    """The sum of ``x`` over the axis, on every rank. The gradient passes as it is: it is equal on all ranks."""
    return x if axis.size == 1 else _Sum.apply(x, axis.group)


def pmax(x: Tensor, axis: Axis) -> Tensor:
    """The elementwise maximum of ``x`` over the axis, on every rank; it has no gradient."""
    return x if axis.size == 1 else _Max.apply(x, axis.group)


def all_gather(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The ranks' ``x`` concatenated along ``dim``, in the order of the axis, on every rank."""
    return x if axis.size == 1 else _Gather.apply(x, dim % x.ndim, axis.size, axis.group)


def gather_replicated(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """The ranks' ``x`` concatenated along ``dim``, for computation that is the same on all: its gradient is replicated, and a
    rank takes its part of it.
    """
    return x if axis.size == 1 else _Replicate.apply(x, dim % x.ndim, axis.index, axis.size, axis.group)


def take_part(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's chunk, along ``dim``, of a value that is equal on all ranks."""
    if axis.size == 1:
        return x
    _check_even(x, dim, axis)
    return _Part.apply(x, dim % x.ndim, axis.index, axis.size, axis.group)


def reduce_scatter(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's chunk, along ``dim``, of the sum of ``x`` over the axis."""
    if axis.size == 1:
        return x
    _check_even(x, dim, axis)
    return _Scatter.apply(x, dim % x.ndim, axis.size, axis.group)


def all_to_all(x: Tensor, split_dim: int, concat_dim: int, axis: Axis) -> Tensor:
    """Chunk j of ``x`` along ``split_dim`` goes to rank j; what comes is concatenated along ``concat_dim``.

    A dim that was whole becomes sharded and one that was sharded whole: (T/n, H, D) to (T, H/n, D), for example.
    """
    if axis.size == 1:
        return x
    _check_even(x, split_dim, axis)
    return _AllToAll.apply(x, split_dim % x.ndim, concat_dim % x.ndim, axis.size, axis.group)


def exchange(x: Tensor, sent: Sequence[int], received: Sequence[int], axis: Axis) -> Callable[[], Tensor]:
    """Rows go to other ranks: the first ``sent[0]`` of ``x`` to rank 0, the next to rank 1, and so on; ``received`` says how
    many come from each. Call the result to wait for them, one rank's behind the other's; what is computed meanwhile, forward
    and, by autograd, backward, hides the way. Differentiable once.
    """
    if axis.size == 1:
        return lambda: x
    route = _Route([*sent], [*received], axis.group)
    begun = _Exchange.apply(x, route)
    return lambda: _Exchanged.apply(begun, route)


def ring_shift(x: Tensor, axis: Axis, by: int = 1) -> Tensor:
    """This rank's ``x`` goes to the rank ``by`` places on, modulo the size; returns what came."""
    by %= axis.size
    return x if by == 0 else _Shift.apply(x, by, axis.index, axis.size, axis.group)


def _check_even(x: Tensor, dim: int, axis: Axis) -> None:
    if x.shape[dim] % axis.size:
        raise ValueError(
            f"dim {dim} of a tensor of shape {tuple(x.shape)} has size {x.shape[dim]}, which the {axis.size} ranks of axis "
            f"{axis.name!r} cannot share evenly"
        )


_c10d = torch.ops._c10d_functional


def gather_into(out: Tensor, x: Tensor, size: int, group: str) -> Tensor:
    """Begin to gather ``x`` of every rank into ``out``, one behind the other along dim 0; wait for the result.

    Always this form: gloo notes the name of each collective in a string that its threads share without a lock (torch 2.13),
    and ``all_gather_into_tensor``, which gloo calls ALLGATHER_COALESCED, is the one name too long to be stored in place. Its
    memory is then freed twice now and then, which ends the rank.
    """
    return _c10d.all_gather_into_tensor_out(x, size, group, out=out)


def gather_each(outs: Sequence[Tensor], xs: Sequence[Tensor], axis: Axis) -> Callable[[], None]:
    """Begin to gather each of ``xs`` of every rank into its one of ``outs``; call the result to wait.

    NCCL (``axis.coalesces``) is given all at once, and makes one kernel of them; gloo one after the other.
    """
    pairs = [(_as_bytes(out), _as_bytes(x.contiguous())) for out, x in zip(outs, xs, strict=True)]
    if axis.coalesces:
        group = _resolve_process_group(GroupName(axis.group))
        with _coalescing_manager(group, async_ops=True) as work:
            for out, x in pairs:
                dist.all_gather_into_tensor(out, x, group=group)

        def wait_for_all() -> None:
            work.wait()
            pairs.clear()  # what was read, and had to live until now

        return wait_for_all
    begun = [gather_into(out, x, axis.size, axis.group) for out, x in pairs]

    def wait() -> None:
        for out in begun:
            _c10d.wait_tensor(out)

    return wait


def _as_bytes(x: Tensor) -> Tensor:
    return x.view(-1).view(torch.uint8)


def _reduce(x: Tensor, op: str, group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_reduce(x.contiguous(), op, group))


def _exchange(x: Tensor, received: list[int], sent: list[int], group: str) -> Tensor:
    return _c10d.wait_tensor(_c10d.all_to_all_single(x, received, sent, group))


class _Enter(Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Sum.apply(g, ctx.group), None


class _Sum(Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _reduce(x, "sum", group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Enter.apply(g, ctx.group), None


class _Max(Function):
    @staticmethod
    def forward(x: Tensor, group: str) -> Tensor:
        return _reduce(x, "max", group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return None, None


class _Gather(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, size: int, group: str) -> Tensor:
        out = _c10d.wait_tensor(gather_into(x.new_empty(size * x.shape[0], *x.shape[1:]), x.contiguous(), size, group))
        return out if dim == 0 else torch.cat(out.chunk(size), dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Scatter.apply(g, *ctx.args), None, None, None


class _Scatter(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, size: int, group: str) -> Tensor:
        parts = x.contiguous() if dim == 0 else torch.cat(x.chunk(size, dim))
        return _c10d.wait_tensor(_c10d.reduce_scatter_tensor(parts, "sum", size, group))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Gather.apply(g, *ctx.args), None, None, None


class _Replicate(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, index: int, size: int, group: str) -> Tensor:
        return _Gather.apply(x, dim, size, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Part.apply(g, *ctx.args), None, None, None, None


class _Part(Function):
    @staticmethod
    def forward(x: Tensor, dim: int, index: int, size: int, group: str) -> Tensor:
        return x.chunk(size, dim)[index].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.args = inputs[1:]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Replicate.apply(g, *ctx.args), None, None, None, None


class _AllToAll(Function):
    @staticmethod
    def forward(x: Tensor, split_dim: int, concat_dim: int, size: int, group: str) -> Tensor:
        parts = torch.stack(x.chunk(size, split_dim))
        return torch.cat(_exchange(parts, [1] * size, [1] * size, group).unbind(), concat_dim)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.split_dim, ctx.concat_dim, *ctx.axis = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _AllToAll.apply(g, ctx.concat_dim, ctx.split_dim, *ctx.axis), None, None, None, None


@dataclass
class _Route:
    """What both ends of an exchange know, and in the backward sweep the tensor that is under way."""

    sent: list[int]
    received: list[int]
    group: str
    under_way: Tensor | None = None


class _Exchange(Function):
    """Begins; in backward waits for what `_Exchanged` has begun."""

    @staticmethod
    def forward(x: Tensor, route: _Route) -> Tensor:
        return _c10d.all_to_all_single(x.contiguous(), route.received, route.sent, route.group)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.route = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        found, ctx.route.under_way = _c10d.wait_tensor(ctx.route.under_way), None
        return found, None


class _Exchanged(Function):
    """Waits; in backward begins."""

    @staticmethod
    def forward(begun: Tensor, route: _Route) -> Tensor:
        return _c10d.wait_tensor(begun).view_as(begun)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.route = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Any:
        route = ctx.route
        route.under_way = _c10d.all_to_all_single(g.contiguous(), route.sent, route.received, route.group)
        return g, None


class _Shift(Function):
    @staticmethod
    def forward(x: Tensor, by: int, index: int, size: int, group: str) -> Tensor:
        sent, received = [0] * size, [0] * size
        sent[(index + by) % size] = received[(index - by) % size] = x.numel()
        return _exchange(x.reshape(-1), received, sent, group).view(x.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.by, *ctx.axis = inputs

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return _Shift.apply(g, -ctx.by, *ctx.axis), None, None, None, None
