"""A vocabulary whose rows lie on the ranks of an axis: which of them are here."""

from __future__ import annotations

from torch import Tensor


def own_rows(ids: Tensor, first: int, V: int) -> tuple[Tensor, Tensor]:
    """Ids as rows of a part of the vocabulary, the ``V`` rows from ``first``; 0 where they are not of it. And where they are.

    >>> import torch
    >>> own_rows(torch.tensor([3, 4, 5, 6]), first=4, V=2)
    (tensor([0, 0, 1, 0]), tensor([False,  True,  True, False]))
    """
    own = ids - first
    here = (own >= 0) & (own < V)
    return own.where(here, 0), here
