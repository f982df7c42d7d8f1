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
from olmo_fn.kernels import Kernel
from olmo_fn.kernels.float8 import Float8, products, straight_through, tensors_of, transposed_products
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


Weight: TypeAlias = Tensor | Adapted | Float8


def merged(weight: Weight) -> Tensor:
    """The matrix itself, or the sum of an adapted one."""
    assert not isinstance(weight, Float8), "only weights of products are quantised"
    return weight.merged if isinstance(weight, Adapted) else weight


def times(kernel: Kernel, x: Tensor, weights: Sequence[Weight]) -> list[Tensor]:
    """The products of ``x`` (M, D) with each of ``weights`` (D, N), which are all quantised, or none of them."""
    if isinstance(weights[0], Float8):
        return products(kernel, x, weights)  # type: ignore[arg-type]
    return [x @ w for w in weights]  # type: ignore[operator]


def transposed_times(kernel: Kernel, d_out: Sequence[Tensor], weights: Sequence[Weight]) -> Tensor:
    """The cotangent of x (M, D) in `times`, of those of the products."""
    if isinstance(weights[0], Float8):
        return transposed_products(kernel, d_out, weights)  # type: ignore[arg-type]
    d_x = d_out[0] @ weights[0].T  # type: ignore[union-attr]
    for d, w in zip(d_out[1:], weights[1:], strict=True):
        d_x.addmm_(d, w.T)  # type: ignore[union-attr]
    return d_x


def matmul(x: Tensor, weight: Weight) -> Tensor:
    """``x`` (..., D) times a weight (D, N), differentiable any number of times: the definition of `linear`."""
    if isinstance(weight, Float8):
        return straight_through(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return x @ weight  # type: ignore[operator]


def alike(weights: Sequence[Weight]) -> bool:
    """Whether all are quantised by one form, or none."""
    return len({w.form if isinstance(w, Float8) else None for w in weights}) == 1


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
    if not alike(weights):
        return tuple(linear(backend, x, [w], gather, scatter)[0] for w in weights)
    if backend.primitive:
        vjp = _linear_vjp(gather, scatter, backend.kernel, weights)
        if (gather.overlapped or scatter.overlapped) and not isinstance(weights[0], Float8):
            vjp = async_tp.linear_vjp(gather, scatter)
        return backend.primitive(vjp, tensors_of(weights), [x], backend.weight_grads)
    h = all_gather(x, 1, gather)
    return tuple(reduce_scatter(matmul(h, w), 1, scatter) for w in weights)


def _adapted(backend: Backend, x: Tensor, weight: Weight, gather: Axis, scatter: Axis) -> Tensor:
    """Two more products. On a mesh with ``tp`` adapters are refused (`olmo_fn.transforms.lora`)."""
    if not isinstance(weight, Adapted):
        return linear(backend, x, [weight], gather, scatter)[0]
    (y,) = linear(backend, x, [weight.w], gather, scatter)
    (low,) = linear(backend, x, [weight.b])
    (change,) = linear(backend, low, [weight.a])
    return y + weight.scale * change


def _linear_vjp(gather: Axis, scatter: Axis, kernel: Kernel, weights: Sequence[Weight]) -> VJP:
    """Gradients of quantised weights are those of whole ones: products of what is not quantised."""

    def vjp(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        (x,) = inputs
        B = x.shape[0]
        h = all_gather(x, 1, gather).flatten(0, 1)
        # plain products stand here and not in `times` alone: one function less from a step to its first product
        quantised = isinstance(weights[0], Float8)
        y = times(kernel, h, weights) if quantised else [h @ w for w in weights]  # type: ignore[operator]
        out = tuple(reduce_scatter(part.unflatten(0, (B, -1)), 1, scatter) for part in y)

        def pullback(*cotangents: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out = [all_gather(c, 1, scatter).flatten(0, 1) for c in cotangents]
            d_h = transposed_times(kernel, d_out, weights)
            return [lambda d=d: h.T @ d for d in d_out], [reduce_scatter(d_h.unflatten(0, (B, -1)), 1, gather)]

        return out, pullback

    return vjp


def add_bias(tp: Axis, y: Tensor, bias: Tensor) -> Tensor:
    """``y + bias`` in the dtype of y (B, T, N), of which a rank of ``tp`` has some positions: gradients of the bias (N,) are
    summed.
    """
    return (y + enter(bias, tp)).to(y.dtype)
