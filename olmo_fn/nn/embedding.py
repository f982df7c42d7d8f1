"""Rows of an embedding, and where their gradients go; a vocabulary whose rows may lie on the ranks of an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.chain import wide
from olmo_fn.kernels.huge_pages import new_large
from olmo_fn.mesh.axis import Axis, chunk
from olmo_fn.mesh.collectives import all_gather, all_to_all, reduce_scatter
from olmo_fn.nn.context import Context
from olmo_fn.nn.linear import Weight, merged


def embedding(ctx: Context, table: Weight, vocab_size: int, d_model: int) -> Tensor:
    """Rows of ``table`` (V, D) for the batch's ids (B, T): (B, T, D) in the compute dtype.

    On an axis ``tp``, where each rank has some rows of the vocabulary, this rank's part of the sequence. A table with fewer
    columns than ``d_model`` is this rank's part over ``fsdp``: each rank looks up its columns for the ids of all, and what it
    finds goes to the rank that asked (`olmo_fn.mesh.placement.Rules.exchanged`).
    """
    weight, dtype, axes = merged(table), ctx.backend.dtype, ctx.backend.axes
    fsdp = axes.fsdp if weight.shape[1] < d_model else Axis()
    ids = ctx.input_ids if fsdp.size == 1 else all_gather(ctx.input_ids.int(), 0, fsdp).long()  # (n B, T)
    rows, inside = local_rows(ids, vocab_size, axes.tp)

    def look_up(weight: Tensor) -> Tensor:
        return _to_askers(_look_up(weight, rows, inside, axes.tp, dtype or weight.dtype), d_model, fsdp)

    if not ctx.backend.primitive:
        return look_up(weight)

    def vjp(weights: Sequence[Tensor], _: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        def pullback(cotangent: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            def gradient() -> Tensor:
                columns = all_gather(_to_owners(cotangent, weight.shape[1], fsdp), 1, axes.tp)
                columns = columns if fsdp.size == 1 else wide(columns)  # as a sum over ranks is
                return add_rows(columns, rows, inside, weight.shape[0])

            return (gradient,), ()

        return look_up(weights[0]), pullback

    return ctx.backend.primitive(vjp, [weight], [], ctx.backend.weight_grads)


def local_rows(ids: Tensor, vocab_size: int, tp: Axis) -> tuple[Tensor, Tensor | None]:
    """Row numbers of ``ids`` in this rank's part of the vocabulary, 0 outside it; and a mask that says which are inside.

    >>> local_rows(torch.tensor([3, 4, 5, 6]), 8, Axis("tp", size=2, index=1))
    (tensor([0, 0, 1, 2]), tensor([False,  True,  True,  True]))
    """
    if tp.size == 1:
        return ids, None
    first, length = chunk(vocab_size, tp.index, tp.size)
    rows = ids - first
    inside = (rows >= 0) & (rows < length)
    return rows.where(inside, 0), inside


def _look_up(weight: Tensor, rows: Tensor, inside: Tensor | None, tp: Axis, dtype: torch.dtype) -> Tensor:
    values = F.embedding(rows, weight).to(dtype)
    return values if inside is None else reduce_scatter(values * inside[..., None].to(dtype), 1, tp)


def _to_askers(columns: Tensor, d_model: int, fsdp: Axis) -> Tensor:
    """Each rank's columns (n B, T, ~D/n) of the rows for all become all columns (B, T, D) of this rank's rows."""
    if fsdp.size == 1:
        return columns
    width = -(-d_model // fsdp.size)  # of all parts but the last ones
    return all_to_all(_widened(columns, width), 0, -1, fsdp)[..., :d_model]


def _to_owners(rows: Tensor, columns: int, fsdp: Axis) -> Tensor:
    """The way back: all columns (B, T, D) of this rank's rows become its ``columns`` of the rows for all, (n B, T, columns)."""
    if fsdp.size == 1:
        return rows
    even = rows.shape[-1] + -rows.shape[-1] % fsdp.size
    return all_to_all(_widened(rows, even), -1, 0, fsdp)[..., :columns]


def _widened(x: Tensor, width: int) -> Tensor:
    return x if x.shape[-1] == width else F.pad(x, (0, width - x.shape[-1]))


def add_rows(cotangent: Tensor, rows: Tensor, inside: Tensor | None, V: int) -> Tensor:
    """The gradient (V, D) of a table, from the cotangent (B, T, D) of its ``rows`` (B, T), in the cotangent's dtype.

    Rows are added in the order of the ids, so that the sum is the same every time, in at least fp32, and rounded once.

    >>> add_rows(torch.ones(1, 2, 1), torch.tensor([[1, 1]]), None, 3).flatten()
    tensor([0., 2., 0.])
    """
    values = wide(cotangent)
    values = values if inside is None else values * inside[..., None].to(values.dtype)
    if values.device.type != "cpu":  # where adding by index is in no order
        return torch.ops.aten.embedding_dense_backward(values, rows, V, -1, False).to(cotangent.dtype)
    used, at = rows.unique(return_inverse=True)
    sums = values.new_zeros(len(used), values.shape[-1]).index_add_(0, at.flatten(), values.flatten(0, 1))
    return new_large(cotangent, V, values.shape[-1]).zero_().index_copy_(0, used, sums.to(cotangent.dtype))
