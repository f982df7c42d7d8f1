"""Recurrences over the ranks of a context-parallel axis, to which the pieces of every sequence are dealt in zig-zag
(`olmo_fn.kernels.attention_cp.positions_of`).

A piece turns the state before it into ``A · state + b``, whatever that state is. So each rank computes A and b of its two
pieces, all of them are gathered, and from those before a piece follows its state. What travels is as large as states are; it
does not grow with the sequence. Tensors have a dim of pieces first: (2, …) a rank has, (2 n, …) there are on n ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather


def all_pieces(x: Tensor, cp: Axis) -> Tensor:
    """What the ranks have of their pieces, (2, …), of all of them in the order of the sequence, (2 n, …)."""
    dealt = [piece for i in range(cp.size) for piece in own_pieces(cp.size, i)]
    return all_gather(x, 0, cp)[[dealt.index(piece) for piece in range(2 * cp.size)]]


def own_pieces(n: int, index: int) -> list[int]:
    """The pieces of rank ``index`` of n.

    >>> [own_pieces(2, i) for i in range(2)]
    [[0, 3], [1, 2]]
    """
    return [index, 2 * n - 1 - index]


def states_before(A: Tensor, b: Tensor, cp: Axis) -> Tensor:
    """The states (2, …, K, V) before this rank's pieces, 0 before the first, of ``A`` (2, …, K, K) and ``b`` (2, …, K, V)."""
    K = A.shape[-1]
    both = all_pieces(torch.cat((A, b), -1), cp)
    state, found = torch.zeros_like(both[0, ..., K:]), []
    for piece in both:
        found.append(state)
        state = piece[..., :K] @ state + piece[..., K:]
    return torch.stack([found[piece] for piece in own_pieces(cp.size, cp.index)])


def columns_before(x: Tensor, count: int, cp: Axis) -> Tensor:
    """The ``count`` positions (2, B, count, D) before this rank's pieces x (2, B, L, D); zeros before the first position.

    From each piece go its last ones, and all of it where it is shorter than ``count``.
    """
    last = min(count, x.shape[2])
    tails = all_pieces(x[:, :, x.shape[2] - last :], cp)
    tails = torch.cat((tails.new_zeros(-(-count // last), *tails.shape[1:]), tails)) if last else tails
    wanted = -(-count // last) if last else 0
    found = [tails[piece : piece + wanted].transpose(0, 1).flatten(1, 2) for piece in own_pieces(cp.size, cp.index)]
    return torch.stack([columns[:, columns.shape[1] - count :] for columns in found])
