"""FlashAttention 2, ATen's own (Dao 2023), and 3 in its place (Shah et al. 2024): windows, grouped heads, documents, any part.

What is written here is how rows and keys are handed over. ``causal`` and windows are counted from the last row and the last
key, which these kernels align. So rows and keys that see nothing of each other are left out first, and then a position's window
is some numbers ``left`` and ``right`` of the aligned one.

B batch, H query heads, N key/value heads, R rows of queries, T keys, K head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.kernels.attention_backend import AttentionBackend, Need, Scores, lacks_on_gpu
from olmo_fn.kernels.attention_sight import FAR, Sight
from olmo_fn.kernels.packing import Packing

_aten = torch.ops.aten


class Lengths(NamedTuple):
    """Cumulative lengths (n + 1,) int32 of the pieces that queries and keys are made of, and the largest lengths."""

    queries: Tensor
    keys: Tensor
    longest_queries: int
    longest_keys: int


class Window(NamedTuple):
    """With the last of q rows aligned to the last of k keys, row i sees keys from i + k - q - left to i + k - q + right, where
    -1 is no limit.
    """

    left: int
    right: int

    @property
    def causal(self) -> bool:
        """Nobody sees what is ahead."""
        return self.right == 0


class FlashKernels(NamedTuple):
    """The two kernels of an implementation, of contiguous heads: (B, R, H, K), or (rows of all, H, K) with lengths.

    ``forward(q, k, v, lengths, window, cap) -> (out, lse)``, lse (B, H, R) or (H, rows of all) in fp32; ``backward(d_out, q, k,
    v, out, lse, lengths, window, cap)`` gives three cotangents.
    """

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]


class Part(NamedTuple):
    """The rows and keys that see something of each other, and how: rows from the first on, keys of a range."""

    rows: int
    keys: slice
    window: Window


def seen_part(sight: Sight, R: int, T: int) -> Part:
    """The part of ``R`` rows and ``T`` keys that `Sight` leaves, documents aside. No key's row is before the first one.

    >>> seen_part(Sight(window=3), 8, 8)  # all of it
    Part(rows=8, keys=slice(0, 8, None), window=Window(left=2, right=0))
    >>> seen_part(Sight(window=3, offset=4), 2, 8)  # of a sequence's keys those that rows 4 and 5 see
    Part(rows=2, keys=slice(2, 6, None), window=Window(left=2, right=0))
    >>> seen_part(Sight(window=3, offset=4), 4, 4)  # the last key but one is seen by row 4, the last one also by row 5
    Part(rows=2, keys=slice(2, 4, None), window=Window(left=0, right=-1))
    """
    w, shift = sight.window, sight.offset - sight.key_offset
    assert shift >= 0, "rows before all keys"
    start, stop = 0 if w is None else max(0, shift - w + 1), min(T, R + shift)
    keys, ahead = stop - start, shift - start  # row 0 is as many keys ahead of the first
    rows = R if w is None else min(R, keys + w - 1 - ahead)
    assert min(rows, keys) > 0, "nothing is seen"
    right = ahead - (keys - rows)
    left = keys if w is None else w - 1 - right
    assert min(left, right) >= 0
    window = Window(-1 if left >= keys - 1 else left, -1 if right and right >= rows - 1 else right)
    return Part(rows, slice(start, stop), window)


def flash_backend(name: str, lacks: Callable[[Need], str], kernels: FlashKernels) -> AttentionBackend:
    """A backend of an implementation's two kernels."""

    def forward(scores: Scores, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Any]:
        if scores.sight.documents is not None:
            return _packed_forward(kernels, scores, q, k, v)
        R, (rows, keys, window) = q.shape[2], seen_part(scores.sight, q.shape[2], k.shape[2])
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = kernels.forward(q[:, :rows], k[:, keys], v[:, keys], None, window, scores.cap)
        if rows < R:
            out, lse = _among(out, slice(0, rows), R), F.pad(lse, (0, R - rows), value=-FAR)
        return out.transpose(1, 2), lse, None

    def backward(
        scores: Scores, q: Tensor, k: Tensor, v: Tensor, d_out: Tensor, out: Tensor, lse: Tensor, kept: Any, delta: Any
    ) -> tuple[Tensor, ...]:
        if scores.sight.documents is not None:
            return _packed_backward(kernels, scores, q, k, v, d_out, out, lse, kept)
        R, T, (rows, keys, window) = q.shape[2], k.shape[2], seen_part(scores.sight, q.shape[2], k.shape[2])
        q, k, v, d_out, out = (x.transpose(1, 2) for x in (q, k, v, d_out, out))
        some = q[:, :rows], k[:, keys], v[:, keys], out[:, :rows], lse[:, :, :rows].contiguous()
        d_q, d_k, d_v = kernels.backward(d_out[:, :rows], *some, None, window, scores.cap)
        found = _among(d_q, slice(0, rows), R), _among(d_k, keys, T), _among(d_v, keys, T)
        return tuple(x.transpose(1, 2) for x in found)

    return AttentionBackend(name, lacks, forward, backward)  # type: ignore[arg-type]


def _among(x: Tensor, at: slice, size: int) -> Tensor:
    """``x`` (B, t, H, K) at some of ``size`` positions, and 0 at the others."""
    return x if x.shape[1] == size else F.pad(x, (0, 0, 0, 0, at.start, size - at.stop))


# --- documents --------------------------------------------------------------------------------------------------------


def _packed_forward(
    kernels: FlashKernels, scores: Scores, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, tuple[Lengths, int, Window]]:
    """One piece for each document, of its rows and its keys: within it rows see as they do in a sequence."""
    B, _, R, _ = q.shape
    lengths, stop, window = kept = _pieces(scores.sight, R, k.shape[2])
    parts = (x.transpose(1, 2).flatten(0, 1) for x in (q, k[:, :, :stop], v[:, :, :stop]))
    out, lse = kernels.forward(*parts, lengths, window, scores.cap)
    if not window.causal:  # rows of a document that has no keys here have an infinite log-sum-exp, of either sign
        lse = lse.masked_fill(lse.isinf(), -FAR)
    return out.unflatten(0, (B, R)).transpose(1, 2), lse.unflatten(1, (B, R)).transpose(0, 1), kept


def _packed_backward(
    kernels: FlashKernels,
    scores: Scores,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    d_out: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Lengths, int, Window],
) -> tuple[Tensor, ...]:
    (lengths, stop, window), (B, _, T, _) = kept, k.shape
    d_out, q, keys, values, out = (x.transpose(1, 2).flatten(0, 1) for x in (d_out, q, k[:, :, :stop], v[:, :, :stop], out))
    lse = lse.transpose(0, 1).flatten(1).contiguous()
    d_q, d_k, d_v = (
        x.unflatten(0, (B, -1)) for x in kernels.backward(d_out, q, keys, values, out, lse, lengths, window, scores.cap)
    )
    found = d_q, *(_among(x, slice(0, stop), T) for x in (d_k, d_v))
    return tuple(x.transpose(1, 2) for x in found)


def _pieces(sight: Sight, R: int, T: int) -> tuple[Lengths, int, Window]:
    """The documents' parts among rows and keys, how many keys there are to look at, and what a row sees of its document.

    The last row of each document has to be at its last key, or else to see all of them.
    """
    assert sight.documents is not None
    packing = sight.packing or _packing_of(sight.documents, sight.documents._version)
    shift = sight.offset - sight.key_offset
    stop = min(T, R + shift)
    window = Window(-1 if sight.window is None else sight.window - 1, 0)
    if stop < R + shift:  # the keys end before the rows do
        assert stop <= shift, "some of the keys before some of the rows"
        assert sight.window is None, "a ring with documents and windows"
        window = Window(-1, -1)
    queries = packing.cumulative(sight.offset, R)
    keys = queries if (shift, stop) == (0, R) else packing.cumulative(sight.key_offset, stop)
    return Lengths(queries, keys, min(packing.longest, R), min(packing.longest, stop)), stop, window


@lru_cache(4)
def _packing_of(documents: Tensor, version: int) -> Packing:
    """Where nobody has told: once for all layers, since it waits for the device, as long as the numbers are not overwritten."""
    return Packing.of(documents)


# --- ATen's kernels ---------------------------------------------------------------------------------------------------


def _aten_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Lengths | None, window: Window, cap: float | None
) -> tuple[Tensor, Tensor]:
    cumulative, longest = _lengths(q, k, lengths)
    args = (q, k, v, *cumulative, *longest, 0.0, window.causal, False)
    out, lse, *_ = _aten._flash_attention_forward(*args, window_size_left=window.left, window_size_right=window.right)
    return out, lse


def _aten_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Lengths | None,
    window: Window,
    cap: float | None,
) -> tuple[Tensor, ...]:
    cumulative, longest = _lengths(q, k, lengths)
    state = q.new_empty(2, dtype=torch.uint64), q.new_empty((), dtype=torch.uint64)  # of dropout, which there is none of
    args = (d_out, q, k, v, out, lse, *cumulative, *longest, 0.0, window.causal, *state)
    return tuple(_aten._flash_attention_backward(*args, window_size_left=window.left, window_size_right=window.right))


def _lengths(q: Tensor, k: Tensor, lengths: Lengths | None) -> tuple[tuple[Tensor | None, ...], tuple[int, int]]:
    if lengths is None:
        return (None, None), (q.shape[1], k.shape[1])
    return (lengths.queries, lengths.keys), (lengths.longest_queries, lengths.longest_keys)


def flash_lacks(need: Need) -> str:
    """What FlashAttention 2 cannot do of ``need``, but for soft-caps."""
    if lacks := lacks_on_gpu(need, 256):
        return lacks
    if need.head_dim > 192 and need.capability in ((8, 6), (8, 9), (12, 0), (12, 1)):
        return f"has no backward pass for heads of {need.head_dim} dims on this GPU"
    if need.part == "ring" and need.documents and need.window:
        return "has no windows together with documents in a ring (--mesh.cp-method gather has)"
    return ""


def _lacks(need: Need) -> str:
    return flash_lacks(need) or ("has no soft-capped scores" if need.cap else "")


ATEN = FlashKernels(_aten_forward, _aten_backward)
FLASH = flash_backend("flash", _lacks, ATEN)


# --- FlashAttention 3, which takes the place of ATen's ----------------------------------------------------------------


@cache
def _register_fa3() -> None:
    """From here on ATen's two operations are FlashAttention 3, in this process."""
    from torch.nn.attention._fa3 import register_flash_attention_fa3

    register_flash_attention_fa3()


def _fa3_forward(*args: Any) -> tuple[Tensor, Tensor]:
    _register_fa3()
    return _aten_forward(*args)


def _fa3_lacks(need: Need) -> str:
    if importlib.util.find_spec("flash_attn_interface") is None:
        return "is not installed (version 3 has no package index: build its hopper folder, which gives flash_attn_interface)"
    return _lacks(need) or ("3 needs an H100 or its like" if need.capability != (9, 0) else "")


FLASH_3 = flash_backend("flash-attn", _fa3_lacks, FlashKernels(_fa3_forward, _aten_backward))
