"""Attention over the ranks of a context-parallel axis, each of which has some positions of every sequence.

Positions are dealt in zig-zag: of 2n pieces rank i has pieces i and 2n - 1 - i, so that causal attention is the same work
for all. Three methods, equal in the numbers: ``gather``: all keys and values on every rank (Llama 3, section 3.3.2);
``ulysses``: heads are exchanged for positions (Jacobs et al. 2023); ``ring``: keys and values go round, and partial results
are merged by their log-sum-exp (Liu et al. 2023), so that no rank ever holds all of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from olmo_fn.kernels import Kernel, identity
from olmo_fn.kernels.attention import attend
from olmo_fn.kernels.attention_backend import AttentionBackend, Pullback, Scores, need_of, row_products
from olmo_fn.kernels.attention_sight import Sight
from olmo_fn.kernels.attention_table import attend_vjp, choose_auto
from olmo_fn.kernels.packing import Packing
from olmo_fn.kernels.sinks import add_sinks, sinks_cotangent
from olmo_fn.mesh.axis import Axis, CPMethod
from olmo_fn.mesh.collectives import all_gather, all_to_all, reduce_scatter, ring_shift


class AttendVJP(Protocol):
    """A way to compute attention: `olmo_fn.kernels.attention_table.attend_vjp`, or another with the same arguments.

    Two more, ``sinks: Tensor | None = None`` and ``cap: float | None = None``, are for models that have these, and are not
    given otherwise: `check_attend` refuses a way that does not take them.
    """

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        documents: Tensor | None = None,
        offset: int = 0,
        kernel: Kernel = identity,
    ) -> tuple[Tensor, Pullback]:
        """The result (B, H, R, K), and its pullback."""


def check_attend(attend: Callable[..., Any], *names: str) -> None:
    """ValueError if a way to compute attention does not take arguments of these names, ``sinks`` or ``cap``.

    >>> check_attend(attend_vjp, "sinks", "cap")
    >>> check_attend(lambda q, k, v, *, window=None: None, "cap")
    Traceback (most recent call last):
    ValueError: the attention <lambda> takes no cap=; choose --model.mixer.name attention, or give it that argument
    """
    taken = inspect.signature(attend).parameters if names else {}
    if missing := [f"{name}=" for name in names if name not in taken]:
        name = getattr(attend, "__name__", repr(attend))
        raise ValueError(
            f"the attention {name} takes no {' and no '.join(missing)}; "
            "choose --model.mixer.name attention, or give it that argument"
        )


def positions_of(T: int, cp: Axis, device: torch.device | str = "cpu") -> Tensor:
    """The positions of a sequence of ``T`` that this rank has, in its order.

    >>> positions_of(8, Axis("cp", size=2, index=1)).tolist()
    [2, 3, 4, 5]
    """
    if cp.size == 1:
        return torch.arange(T, device=device)
    if T % (2 * cp.size):
        raise ValueError(f"{cp.size} context-parallel ranks need sequences of a multiple of {2 * cp.size}, not of {T}")
    pieces = torch.arange(T, device=device).view(2 * cp.size, -1)
    return torch.cat((pieces[cp.index], pieces[-1 - cp.index]))


def attend_over(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: Axis,
    method: CPMethod = "gather",
    window: int | None = None,
    documents: Tensor | None = None,
    sinks: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """`olmo_fn.kernels.attention.attend` for this rank's positions, in plain differentiable operations.

    ``q`` (B, H, R, K), ``k``, ``v`` (B, N, R, K) of this rank's R = T / n positions; ``documents`` (B, T) of all; ``sinks``
    (H,), the same on all ranks, whose gradient is that of this rank's positions, or with ulysses of its heads.
    """
    if cp.size > 1 and method == "ulysses":
        q, k, v = (_in_order(all_to_all(x, 1, 2, cp), cp, 2) for x in (q, k, v))
        out = attend(q, k, v, window=window, documents=documents, sinks=_own_heads(sinks, cp), cap=cap)
        return all_to_all(_as_dealt(out, cp, 2), 2, 1, cp)
    one = partial(attend, window=window, documents=documents, sinks=sinks, cap=cap)
    if cp.size == 1:
        return one(q, k, v)
    keys, values = (_in_order(all_gather(x, 2, cp), cp, 2) for x in (k, v))  # of a ring, too: the same numbers
    pieces = zip(q.chunk(2, 2), _offsets(q.shape[2], cp.index, cp.size), strict=True)
    return torch.cat([one(piece, keys, values, offset=offset) for piece, offset in pieces], 2)


def attend_over_vjp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cp: Axis,
    method: CPMethod = "gather",
    window: int | None = None,
    documents: Tensor | None = None,
    kernel: Kernel = identity,
    attend: AttendVJP = attend_vjp,
    sinks: Tensor | None = None,
    cap: float | None = None,
    packing: Packing | None = None,
) -> tuple[Tensor, Pullback]:
    """`attend_over` with its pullback; a rank attends by ``attend``, in a ring by a backend, whose partial results are merged.

    ``packing``: the documents once more, as `AttentionBackend` may want them. ValueError, before anything is computed, if
    ``attend`` does not take ``sinks`` or ``cap`` and they are given.
    """
    more: dict[str, Any] = {name: value for name, value in (("sinks", sinks), ("cap", cap)) if value is not None}
    check_attend(attend, *more)
    if packing is not None and isinstance(attend, AttentionBackend):
        more["packing"] = packing
    if cp.size == 1:
        return attend(q, k, v, window=window, documents=documents, kernel=kernel, **more)
    if method == "ring":
        if attend is attend_vjp:
            attend = choose_auto(need_of(q, k, window=window, documents=documents, cap=cap)._replace(part="ring"))
        if not isinstance(attend, AttentionBackend):
            raise ValueError("--mesh.cp-method ring merges parts of its own; with another attention use gather or ulysses")
        scores = Scores(Sight(window, documents, packing=packing), cap, kernel)
        return _ring_vjp(q, k, v, cp, attend, scores, sinks)
    run = {"gather": _gather_vjp, "ulysses": _ulysses_vjp}[method]
    return run(q, k, v, cp, partial(attend, window=window, documents=documents, kernel=kernel), **more)


def _gather_vjp(q: Tensor, k: Tensor, v: Tensor, cp: Axis, attend: Callable[..., Any], **more: Any) -> tuple[Tensor, Pullback]:
    keys, values = (_in_order(all_gather(x, 2, cp), cp, 2) for x in (k, v))
    halves = [
        attend(piece, keys, values, offset=offset, **more)
        for piece, offset in zip(q.chunk(2, 2), _offsets(q.shape[2], cp.index, cp.size), strict=True)
    ]

    pullbacks = [half[1] for half in halves]

    def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        parts = zip(pullbacks, out.chunk(2, 2), cotangent.chunk(2, 2), strict=True)
        (d_q, *found), (more_d_q, *others) = (back(some, d_some) for back, some, d_some in parts)
        d_k, d_v, *d_sinks = (one + other for one, other in zip(found, others, strict=True))
        d_k, d_v = (reduce_scatter(_as_dealt(d, cp, 2), 2, cp) for d in (d_k, d_v))
        return _joined(d_q, more_d_q), d_k, d_v, *d_sinks

    return _joined(*(half[0] for half in halves)), pullback


def _joined(*parts: Tensor) -> Tensor:
    """(B, H, ·, K) along the positions, in the memory order that the parts have."""
    if parts[0].is_contiguous():
        return torch.cat(parts, 2)
    return torch.cat([x.transpose(1, 2) for x in parts], 1).transpose(1, 2)


def _ulysses_vjp(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, attend: Callable[..., Any], sinks: Tensor | None = None, **more: Any
) -> tuple[Tensor, Pullback]:
    def to_heads(x: Tensor) -> Tensor:
        return _in_order(all_to_all(x, 1, 2, cp), cp, 2).contiguous()

    def to_positions(x: Tensor) -> Tensor:
        return all_to_all(_as_dealt(x, cp, 2), 2, 1, cp)

    if sinks is not None:
        more["sinks"] = _own_heads(sinks, cp)
    out, inner = attend(*(to_heads(x) for x in (q, k, v)), **more)

    def pullback(_: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        d_q, d_k, d_v, *d_sinks = inner(out, to_heads(cotangent))
        return to_positions(d_q), to_positions(d_k), to_positions(d_v), *(_of_all_heads(d, cp) for d in d_sinks)

    return to_positions(out), pullback


def _own_heads(sinks: Tensor | None, cp: Axis) -> Tensor | None:
    """The sinks of the heads that ulysses gives this rank."""
    return None if sinks is None else sinks.chunk(cp.size)[cp.index]


def _of_all_heads(d_sinks: Tensor, cp: Axis) -> Tensor:
    """Their cotangent, 0 for the heads that other ranks have."""
    whole = d_sinks.new_zeros(cp.size, len(d_sinks))
    whole[cp.index] = d_sinks
    return whole.flatten()


def _ring_vjp(
    q: Tensor, k: Tensor, v: Tensor, cp: Axis, backend: AttentionBackend, scores: Scores, sinks: Tensor | None
) -> tuple[Tensor, Pullback]:
    wide = torch.promote_types(q.dtype, torch.float32)
    half, window = q.shape[2] // 2, scores.sight.window
    own = Tensor.contiguous if backend.by_head else Tensor.detach  # what a slice is handed over as

    def pairs(source: int) -> Iterator[tuple[slice, slice, Scores]]:
        """The pieces of this rank's queries and of ``source``'s keys that see each other."""
        for i, a in enumerate(_offsets(q.shape[2], cp.index, cp.size)):
            for j, b in enumerate(_offsets(q.shape[2], source, cp.size)):
                if b <= a and (window is None or b + half > a - window + 1):
                    part = scores._replace(sight=scores.sight._replace(offset=a, key_offset=b))
                    yield slice(i * half, (i + 1) * half), slice(j * half, (j + 1) * half), part

    kept: list[Any] = []
    out, lse = torch.zeros_like(q, dtype=wide), q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    keys, values = k, v
    for hop in range(cp.size):
        if hop:
            keys, values = ring_shift(torch.stack((keys, values)), cp).unbind()
        for rows, columns, part in pairs((cp.index - hop) % cp.size):
            parts = (q[:, :, rows], keys[:, :, columns], values[:, :, columns])
            more, more_lse, rest = backend.forward(part, *map(own, parts))
            kept.append(rest)
            total = torch.logaddexp(lse[:, :, rows], more_lse)
            old, new = (x.sub(total).exp()[..., None] for x in (lse[:, :, rows], more_lse))
            out[:, :, rows] = out[:, :, rows] * old + more * new
            lse[:, :, rows] = total
    if sinks is not None:
        out, lse = add_sinks(out, lse, sinks)
    result = out.to(q.dtype)
    del out, keys, values

    def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
        delta, rest = row_products(cotangent, out), iter(kept)
        d_q = torch.zeros_like(q, dtype=wide)
        d_keys, d_values = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        keys, values = k, v
        for hop in range(cp.size):
            if hop:  # the gradients travel with what they are of
                keys, values = ring_shift(torch.stack((keys, values)), cp).unbind()
                d_keys, d_values = ring_shift(torch.stack((d_keys, d_values)), cp).unbind()
            for rows, columns, part in pairs((cp.index - hop) % cp.size):
                of_rows = (cotangent[:, :, rows], out[:, :, rows], lse[:, :, rows])
                parts = map(own, (q[:, :, rows], keys[:, :, columns], values[:, :, columns], *of_rows))
                found = backend.backward(part, *parts, next(rest), own(delta[:, :, rows]))
                for total, some, more in zip((d_q, d_keys, d_values), (rows, columns, columns), found, strict=True):
                    total[:, :, some].add_(more)
        d_keys, d_values = ring_shift(torch.stack((d_keys, d_values)), cp).unbind()
        found = d_q.to(q.dtype), d_keys.to(k.dtype), d_values.to(v.dtype)
        return found if sinks is None else (*found, sinks_cotangent(sinks, lse, delta))

    return result, pullback


def _offsets(R: int, index: int, n: int) -> tuple[int, int]:
    """Where the two pieces of rank ``index`` begin, each R / 2 long."""
    return index * (R // 2), (2 * n - 1 - index) * (R // 2)


def _dealt(cp: Axis) -> list[int]:
    """The pieces of a sequence in the order in which the ranks have them."""
    return [piece for i in range(cp.size) for piece in (i, 2 * cp.size - 1 - i)]


def _in_order(x: Tensor, cp: Axis, dim: int) -> Tensor:
    """The ranks' positions, one rank after the other along ``dim``, in the order of the sequence."""
    pieces = x.chunk(2 * cp.size, dim)
    order = _dealt(cp)
    return torch.cat([pieces[order.index(i)] for i in range(len(order))], dim)


def _as_dealt(x: Tensor, cp: Axis, dim: int) -> Tensor:
    """The inverse of `_in_order`."""
    pieces = x.chunk(2 * cp.size, dim)
    return torch.cat([pieces[i] for i in _dealt(cp)], dim)
