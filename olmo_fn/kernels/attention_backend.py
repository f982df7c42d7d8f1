"""What a backend of attention is: what it can do, its forward and backward pass, and how heads lie in its memory.

A forward pass gives the result and each row's log-sum-exp, a backward pass takes both. So all that is around softmax(q kᵀ) v is
written once, for all backends: sinks, which change the log-sum-exp, and a ring of ranks, whose parts it merges.

B batch, H query heads, N key/value heads, R rows of queries, T keys, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.kernels import Kernel, identity
from olmo_fn.kernels.attention_sight import Sight
from olmo_fn.kernels.packing import Packing
from olmo_fn.kernels.sinks import add_sinks, sinks_cotangent

Pullback: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From the result (B, H, R, K), which the caller keeps, and its cotangent, to the cotangents of queries, keys and values, and
of the sinks (H,) if there are any."""

HALF = (torch.bfloat16, torch.float16)


class Need(NamedTuple):
    """What attention is asked to do: what decides which backends can."""

    device: str
    """Its kind: cpu, cuda, meta."""
    dtype: torch.dtype
    head_dim: int
    grouped: bool = False
    """There are fewer key/value heads than query heads."""
    window: bool = False
    """Positions see fewer than all those before them."""
    documents: bool = False
    cap: bool = False
    part: Literal["whole", "rows", "ring"] = "whole"
    """Queries of all positions of the keys; of the last ones only; or, in a ring of ranks, of others than the keys."""
    capability: tuple[int, int] = (0, 0)
    """Of a GPU: (9, 0) is an H100."""
    deterministic: bool = False
    """Asked for by ``torch.use_deterministic_algorithms``."""


class Scores(NamedTuple):
    """Which scores there are, their soft cap, and what compiles the tiles' elementwise functions."""

    sight: Sight
    cap: float | None = None
    kernel: Kernel = identity


class AttentionBackend(NamedTuple):
    """A way to compute softmax attention; called, it gives the result and its pullback (`attend_vjp`).

    ``lacks(need)`` says what it cannot do of it, as the end of a sentence, or nothing. ``forward(scores, q, k, v)`` gives the
    result (B, H, R, K), the log-sum-exp (B, H, R) in at least fp32, and what else its backward wants. A row that sees nothing
    has 0, and a very negative log-sum-exp. ``backward(scores, q, k, v, d_out, out, lse, kept, delta)`` gives the cotangents of
    ``q``, ``k`` and ``v``, where ``out`` and ``lse`` may be those of a softmax over more than these keys; ``delta`` is their
    `row_products`, or None where nobody has computed them.

    ``by_head``: it is fastest if each head's positions lie side by side in memory. The others take (B, H, R, K) as a view of
    (B, R, H, K), which is how projections leave them.
    """

    name: str
    lacks: Callable[[Need], str]
    forward: Callable[[Scores, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Any]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    by_head: bool = False

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
        sinks: Tensor | None = None,
        cap: float | None = None,
        packing: Packing | None = None,
    ) -> tuple[Tensor, Pullback]:
        scores = Scores(Sight(window, documents, offset, packing=packing), cap, kernel)
        out, lse, kept = self.forward(scores, q, k, v)
        if sinks is not None:
            out, lse = add_sinks(out, lse, sinks)

        def pullback(out: Tensor, cotangent: Tensor) -> tuple[Tensor, ...]:
            delta = None if sinks is None else row_products(cotangent, out)
            found = self.backward(scores, q, k, v, cotangent, out, lse, kept, delta)
            return found if sinks is None or delta is None else (*found, sinks_cotangent(sinks, lse, delta))

        return out, pullback


def row_products(d_out: Tensor, out: Tensor) -> Tensor:
    """Σ d_out · out over the last dim (B, H, R), in at least fp32: what a softmax's backward subtracts (delta)."""
    return (d_out.to(torch.promote_types(out.dtype, torch.float32)) * out).sum(-1)


def lacks_on_gpu(need: Need, most_dims: int) -> str:
    """What kernels in half precision for GPUs since the A100 cannot do of ``need``, with heads of up to ``most_dims``.

    >>> lacks_on_gpu(Need("cuda", torch.bfloat16, 96, capability=(9, 0)), 128)
    ''
    >>> lacks_on_gpu(Need("cuda", torch.float32, 96, capability=(9, 0)), 128)
    'computes in bfloat16 or float16, not in float32'
    """
    if need.device != "cuda":
        return "needs a GPU"
    if need.capability < (8, 0):
        return f"needs a GPU of compute capability 8.0, and this one has {'.'.join(map(str, need.capability))}"
    if need.dtype not in HALF:
        return f"computes in bfloat16 or float16, not in {str(need.dtype).removeprefix('torch.')}"
    if need.head_dim % 8 or need.head_dim > most_dims:
        return f"takes heads of a multiple of 8 up to {most_dims} dims, not of {need.head_dim}"
    return ""


def need_of(
    q: Tensor,
    k: Tensor,
    *,
    window: int | None = None,
    documents: Tensor | None = None,
    offset: int = 0,
    cap: float | None = None,
) -> Need:
    """What attention of ``q`` (B, H, R, K) to ``k`` (B, N, T, K) needs.

    >>> q = torch.zeros(1, 2, 8, 4)
    >>> need_of(q, q, window=8).window, need_of(q[:, :, 5:], q, window=7, offset=5).part
    (False, 'rows')
    """
    return Need(
        q.device.type,
        q.dtype,
        q.shape[-1],
        q.shape[1] != k.shape[1],
        window is not None and window < k.shape[2],
        documents is not None,
        cap is not None,
        "whole" if offset == 0 and q.shape[2] == k.shape[2] else "rows",
        capability(q.device),
        torch.are_deterministic_algorithms_enabled(),
    )


@lru_cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a GPU; (0, 0) elsewhere.

    >>> capability(torch.device("cpu"))
    (0, 0)
    """
    if device.type != "cuda":
        return 0, 0
    try:
        return torch.cuda.get_device_capability(device)
    except (AssertionError, RuntimeError):  # there is none, so its tensors are fake: an H100's
        return 9, 0
