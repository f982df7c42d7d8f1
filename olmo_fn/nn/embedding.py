"""Rows of an embedding, and where their gradients go."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.layout import wide
from olmo_fn.kernels.huge_pages import new_large
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, reduce_scatter
from olmo_fn.nn.vocabulary import own_rows


def embed(weight: Tensor, ids: Tensor, tp: Axis = Axis(), first: int = 0) -> Tensor:  # noqa: B008
    """Rows of ``weight`` (V, D) for the ids (B, T): (B, T, D); on an axis ``tp``, where each rank has some rows, those from
    ``first`` on, this rank's part of the sequence.

    >>> embed(torch.tensor([[1.0], [2.0]]), torch.tensor([[1, 0, 1]])).flatten()
    tensor([2., 1., 2.])
    """
    return _rows(weight, *_owned(ids, weight, tp, first), tp)


def embed_vjp(weight: Tensor, ids: Tensor, tp: Axis, first: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """`embed` with its pullback, from the cotangent of the rows (B, T, D) to that of ``weight``, in the same dtype.

    Rows are added in the order of the ids, so that the sum is the same every time, in at least fp32, and rounded once.

    >>> rows, pullback = embed_vjp(torch.zeros(3, 1), torch.tensor([[1, 1]]), Axis(), 0)
    >>> pullback(torch.ones(1, 2, 1)).flatten()
    tensor([0., 2., 0.])
    """
    own, here = _owned(ids, weight, tp, first)

    def pullback(cotangent: Tensor) -> Tensor:
        rows = wide(all_gather(cotangent, 1, tp))
        rows = rows if here is None else rows * here[..., None].to(rows.dtype)
        if weight.device.type != "cpu":  # where adding by index is in no order
            return torch.ops.aten.embedding_dense_backward(rows, own, weight.shape[0], -1, False).to(cotangent.dtype)
        used, place = own.unique(return_inverse=True)
        sums = rows.new_zeros(len(used), rows.shape[-1]).index_add_(0, place.flatten(), rows.flatten(0, 1))
        return new_large(cotangent, *weight.shape).zero_().index_copy_(0, used, sums.to(cotangent.dtype))

    return _rows(weight, own, here, tp), pullback


def _owned(ids: Tensor, weight: Tensor, tp: Axis, first: int) -> tuple[Tensor, Tensor | None]:
    return (ids, None) if tp.size == 1 else own_rows(ids, first, weight.shape[0])


def _rows(weight: Tensor, own: Tensor, here: Tensor | None, tp: Axis) -> Tensor:
    rows = F.embedding(own, weight)
    return rows if here is None else reduce_scatter(rows * here[..., None].to(weight.dtype), 1, tp)
