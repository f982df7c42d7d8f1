"""How a sublayer's output is added to the stream: times a factor, and while training with some of its entries dropped.

B batch, R positions of a rank, D model width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from olmo_fn.core.random import of_entries
from olmo_fn.nn.norm import Norm
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.nn.context import Context


class Residual(NamedTuple):
    """``x + factor · dropout(y)``.

    An entry is dropped with the probability ``rate``, and the others divided by ``1 - rate``; which ones is a function of the
    batch's ``rows``, the position, the channel and ``place``, the residual's number in the model, so that it is the same in
    every layout and when a step is computed again. A batch without ``rows``, as evaluation and decoding have, drops nothing.
    """

    factor: float = 1.0
    rate: float = 0.0
    place: int = 0

    def add(self, ctx: Context, x: Tensor, y: Tensor) -> Tensor:
        """The sum."""
        y = self.dropped(ctx, y)
        return x + (y if self.factor == 1 else self.factor * y)

    def add_normed(self, ctx: Context, norm: Norm, p: Tree | Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The sum with the norm of ``y``, in one pass if nothing is dropped."""
        if self.rate and ctx.rows is not None:
            return self.add(ctx, x, norm(ctx, p, y))
        return norm.add(ctx, p, x, y, self.factor)

    def dropped(self, ctx: Context, y: Tensor) -> Tensor:
        """``y`` (B, R, D) with some entries 0."""
        if not self.rate or ctx.rows is None:
            return y
        assert ctx.columns is not None
        tp = ctx.backend.axes.tp
        columns = ctx.columns.chunk(tp.size)[tp.index]
        return drop(y, self.rate, ctx.rows, columns, self.place)


def drop(y: Tensor, rate: float, rows: Tensor, columns: Tensor, place: int) -> Tensor:
    """``y`` (B, R, D) with entries dropped by their numbers: ``rows`` (B,), ``columns`` (R,) and the channel.

    >>> import torch
    >>> y = drop(torch.ones(1, 1, 1000), 0.25, torch.tensor([7]), torch.tensor([0]), 0)
    >>> sorted(set(y.flatten().tolist())), 230 < (y == 0).sum() < 270
    ([0.0, 1.3333333730697632], tensor(True))
    """
    keep = of_entries(rows, columns, y.shape[-1], (place, 0x0D50)) >= int(rate * 2**32)
    return y * (keep / (1 - rate)).to(y.dtype)
