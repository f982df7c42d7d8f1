"""Products with weight matrices: the primitive that holds tensor parallelism, late weight gradients, and LoRA.

B batch, T positions, D in, N out; R the rank of an adapter. Weights are (in, out).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.core.chain import Backend
from olmo_fn.core.primitive import VJP
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, enter, reduce_scatter
from olmo_fn.nn import async_tp

SINGLE = Axis()


class Adapted(NamedTuple):
    """A matrix with a low-rank change: w + scale · b a, with w (D, N), a (R, N), b (D, R) (Hu et al. 2021)."""

    w: Tensor
    a: Tensor
    b: Tensor
    scale: float

    @property
    def merged(self) -> Tensor:
        """The sum, in the dtype of ``w``: for what is no product."""
        wide = torch.promote_types(self.w.dtype, torch.float32)
        return (self.w.to(wide) + self.scale * (self.b.to(wide) @ self.a.to(wide))).to(self.w.dtype)


Weight: TypeAlias = Tensor | Adapted


def merged(weight: Weight) -> Tensor:
    """The matrix itself, or the sum of an adapted one."""
    return weight.merged if isinstance(weight, Adapted) else weight


def linear(
    backend: Backend, x: Tensor, weights: Sequence[Weight], gather: Axis = SINGLE, scatter: Axis = SINGLE
) -> tuple[Tensor, ...]:
    """The products of ``x`` (B, T, D) with each of ``weights`` (D, N), a tuple of (B, T, N).

    On an axis ``gather``, ``x`` is a rank's part of the sequence, and the products are those of all of it (column parallel:
    weights have a rank's columns). On an axis ``scatter`` the products are summed over the ranks, each of which keeps its part
    of the sequence (row parallel: weights have a rank's rows). Megatron-LM (Shoeybi et al. 2019), with sequence parallelism
    (Korthikanti et al. 2022).

    >>> import torch
    >>> linear(Backend(), torch.ones(1, 1, 2), [torch.eye(2), 3 * torch.eye(2)])
    (tensor([[[1., 1.]]]), tensor([[[3., 3.]]]))
    """
    if any(isinstance(w, Adapted) for w in weights):
        return tuple(_adapted(backend, x, w, gather, scatter) for w in weights)
    if backend.primitive:
        make = async_tp.linear_vjp if gather.overlapped or scatter.overlapped else _linear_vjp
        return backend.primitive(make(gather, scatter), weights, [x], backend.weight_grads)
    h = all_gather(x, 1, gather)
    return tuple(reduce_scatter(h @ w, 1, scatter) for w in weights)  # type: ignore[operator]


def _adapted(backend: Backend, x: Tensor, weight: Weight, gather: Axis, scatter: Axis) -> Tensor:
    """Two more products. On a mesh with ``tp`` adapters are refused (`olmo_fn.transforms.lora`)."""
    if not isinstance(weight, Adapted):
        return linear(backend, x, [weight], gather, scatter)[0]
    (y,) = linear(backend, x, [weight.w], gather, scatter)
    (low,) = linear(backend, x, [weight.b])
    (change,) = linear(backend, low, [weight.a])
    return y + weight.scale * change


def _linear_vjp(gather: Axis, scatter: Axis) -> VJP:
    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        (x,) = inputs
        B = x.shape[0]
        h = all_gather(x, 1, gather).flatten(0, 1)
        out = tuple(reduce_scatter((h @ w).unflatten(0, (B, -1)), 1, scatter) for w in weights)

        def pullback(*cotangents: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out = [all_gather(c, 1, scatter).flatten(0, 1) for c in cotangents]
            d_h = d_out[0] @ weights[0].T
            for d, w in zip(d_out[1:], weights[1:], strict=True):
                d_h.addmm_(d, w.T)
            return [lambda d=d: h.T @ d for d in d_out], [reduce_scatter(d_h.unflatten(0, (B, -1)), 1, gather)]

        return out, pullback

    return vjp


def add_bias(tp: Axis, y: Tensor, bias: Tensor) -> Tensor:
    """``y + bias`` in the dtype of y (B, T, N), of which a rank of ``tp`` has some positions: gradients of the bias (N,) are
    summed.
    """
    return (y + enter(bias, tp)).to(y.dtype)
