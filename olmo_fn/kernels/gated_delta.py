"""The gated delta rule (Yang et al. 2024, arXiv 2412.06464, eq. 10): a state that decays, and in which each key has its value
replaced; step by step, which is the definition, and by chunks.

    S_t = a_t S_(t-1) + b_t k_t (v_t - k_tᵀ a_t S_(t-1))ᵀ,   o_t = S_tᵀ q_t / √K,   a_t = exp(g_t)

B batch, T positions, N key heads, H value heads of which H / N have the same key head, K and V widths of their heads, C
positions of a chunk. ``q``, ``k`` (B, N, T, K), ``v`` (B, H, T, V), ``g`` ≤ 0 and ``beta`` (B, H, T), a state (B, H, K, V);
everything is computed in fp32, or in fp64 where ``v`` is. ``age`` (B, T): how many tokens of its document stand before a
position; the state begins anew, with zeros, where it is 0.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.kernels.recurrence_cp import states_before
from olmo_fn.mesh.axis import Axis

Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""q, k, v, g and beta."""
CHUNK = 64
"""Positions that are computed at once, by measurement (docs/hybrids.md)."""


def recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, age: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The rule as it is written above, a position after the other, from ``state`` on: (B, H, T, V), and the last state.

    >>> x, one = torch.ones(1, 1, 2, 1), torch.ones(1, 1, 2)
    >>> recurrent(x, x, torch.tensor([3.0, 5.0]).view(1, 1, 2, 1), -0 * one, one, torch.zeros(1, 1, 1, 1))[0].flatten()
    tensor([3., 5.])
    """
    group, wide = v.shape[1] // k.shape[1], state.dtype
    q, k = (x.to(wide).repeat_interleave(group, 1) for x in (q * k.shape[-1] ** -0.5, k))
    v, g, beta = v.to(wide), g.to(wide), beta.to(wide)
    out = []
    for t in range(v.shape[2]):
        decay = g[:, :, t].exp()
        if age is not None:
            decay = decay.where(age[:, None, t] > 0, 0)
        state = state * decay[..., None, None]
        error = v[:, :, t] - (k[:, :, t, None] @ state)[..., 0, :]
        state = state + k[:, :, t, :, None] * (beta[:, :, t, None] * error)[..., None, :]
        out.append((q[:, :, t, None] @ state)[..., 0, :])
    return torch.stack(out, 2), state


class Chunks(NamedTuple):
    """What of a sequence in chunks does not depend on the states before them. Lead dims are (B, N, H / N, n) of n chunks.

    With the state S before a chunk, its positions write ``values - keys S`` (C, V), and the state behind it is ``through · S``
    plus ``writeᵀ`` of that. They read ``read S + scores`` of that.
    """

    values: Tensor
    keys: Tensor
    write: Tensor
    through: Tensor
    read: Tensor
    scores: Tensor


def chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, age: Tensor | None = None, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The same as `recurrent` in products of matrices, ``chunk`` positions at once; T may be any length.

    >>> torch.manual_seed(0)  # doctest: +ELLIPSIS
    <...>
    >>> q, k, v = torch.rand(3, 1, 2, 10, 4).unbind()
    >>> g, beta, state = -torch.rand(1, 2, 10), torch.rand(1, 2, 10), torch.rand(1, 2, 4, 4)
    >>> ours, definition = (rule(q, k, v, g, beta, state)[0] for rule in (chunked, recurrent))
    >>> torch.allclose(ours, definition, atol=1e-5)
    True
    """
    parts = chunks(q, k, v, g, beta, age, chunk, state.dtype)
    written, states = scan(parts, state.unflatten(1, (k.shape[1], -1)))
    return outputs(parts, written, states)[:, :, : v.shape[2]], states[..., -1, :, :].flatten(1, 2)


def chunks(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None, chunk: int, wide: torch.dtype
) -> Chunks:
    """`Chunks` of a sequence: within one, positions write what is left of their values when what those before it wrote is read.

    That is a unit lower triangular system (section 3.3 of the paper), which is solved.
    """
    N, T = k.shape[1], k.shape[2]
    C = min(chunk, T)
    n = -(-T // C)

    def cut(x: Tensor, dim: int) -> Tensor:
        """Positions in chunks, filled up with zeros, which write nothing."""
        if n * C > T:
            x = torch.cat((x, x.new_zeros(*x.shape[:dim], n * C - T, *x.shape[dim + 1 :])), dim)
        return x.unflatten(dim, (n, C))

    q, k = (cut(x.to(wide), 2)[:, :, None] for x in (q, k))  # (B, N, 1, n, C, K)
    v, g, beta = (cut(x.to(wide), 2).unflatten(1, (N, -1)) for x in (v, g, beta))
    sums = g.double().cumsum(-1)  # differences of large ones are taken
    between = (sums[..., :, None] - sums[..., None, :]).to(wide)
    sight = torch.ones(C, C, dtype=torch.bool, device=v.device).tril()
    from_start = sums.to(wide).exp()
    if age is not None:
        index = torch.arange(C, device=v.device)
        starts = index - cut_ages(age, n, C)  # of the document of each position, in its chunk; below 0: before it
        sight = (sight & (index >= starts[..., None]))[:, None, None]
        from_start = from_start.where((starts < 0)[:, None, None], 0)
    decay = between.masked_fill(~sight, -torch.inf).exp()
    system = decay * (beta[..., None] * (k @ k.mT))
    right = torch.cat((beta[..., None] * v, (beta * from_start)[..., None] * k), -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    values, keys = solved.split((v.shape[-1], k.shape[-1]), -1)
    q = q * k.shape[-1] ** -0.5
    to_end = decay[..., -1, :]
    return Chunks(values, keys, to_end[..., None] * k, from_start[..., -1], from_start[..., None] * q, decay * (q @ k.mT))


def cut_ages(age: Tensor, n: int, C: int) -> Tensor:
    """Ages (B, T) in n chunks of C positions; what they are filled up with is of the last document."""
    more = n * C - age.shape[1]
    if more:
        age = torch.cat((age, age[:, -1:] + torch.arange(1, more + 1, device=age.device)), 1)
    return age.unflatten(1, (n, C))


def scan(parts: Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """What the positions of all chunks write (…, n, C, V), and the states (…, n + 1, K, V) before, between and behind them.

    ``state`` (…, K, V) is the first.
    """
    written, states = [], [state]
    for values, keys, write, through in zip(*(x.unbind(3) for x in parts[:4]), strict=True):
        written.append(values - keys @ state)
        state = through[..., None, None] * state + write.mT @ written[-1]
        states.append(state)
    return torch.stack(written, 3), torch.stack(states, 3)


def outputs(parts: Chunks, written: Tensor, states: Tensor) -> Tensor:
    """What all positions read, (B, H, n C, V)."""
    out = parts.read @ states[:, :, :, :-1] + parts.scores @ written
    return out.flatten(3, 4).flatten(1, 2)


def chunked_over(
    cp: Axis, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, age: Tensor | None = None, chunk: int = CHUNK
) -> Tensor:
    """`chunked` from the beginning of the sequence, (B, H, T, V) in the dtype of ``v``; on ranks of ``cp``, each of which has
    two pieces of it behind each other (`olmo_fn.kernels.recurrence_cp`).

    A rank's pieces are computed as if they were sequences of their own, but for the states that they begin with.
    """
    wide, pieces = torch.promote_types(v.dtype, torch.float32), 1 if cp.size == 1 else 2
    q, k, v, g, beta = (torch.cat(x.chunk(pieces, 2)) for x in (q, k, v, g, beta))
    age = age if age is None else torch.cat(age.chunk(pieces, 1))
    parts = chunks(q, k, v, g, beta, age, chunk, wide)
    (BP, N, T, K), V = k.shape, v.shape[-1]
    state = torch.zeros(BP, N, v.shape[1] // N, K, V, dtype=wide, device=v.device)
    if cp.size > 1:
        A, b = (x.unflatten(0, (2, -1)) for x in affine(parts))
        state = states_before(A, b, cp).flatten(0, 1)
    out = outputs(parts, *scan(parts, state))[:, :, :T].to(v.dtype)
    return torch.cat(out.chunk(pieces), 2)


def affine(parts: Chunks) -> tuple[Tensor, Tensor]:
    """A (B, N, H / N, K, K) and b (…, K, V), by which all chunks together make a state S into A S + b."""
    *lead, _, _, K = parts.keys.shape
    V = parts.values.shape[-1]
    both = parts._replace(values=torch.cat((torch.zeros_like(parts.keys), parts.values), -1))
    start = torch.cat((torch.eye(K), torch.zeros(K, V)), -1).to(parts.keys).expand(*lead, K, K + V)
    A, b = scan(both, start)[1][..., -1, :, :].split((K, V), -1)
    return A, b
