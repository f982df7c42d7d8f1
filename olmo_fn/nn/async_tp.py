"""Async tensor parallelism: products that multiply what has arrived of a gather, and send what is done of a scatter.

They are torch's, over symmetric memory (NVLink): a product with a gather before it, or a reduce-scatter behind it, cut into as
many parts as there are ranks (Wang et al. 2023, ASPLOS, "Overlap communication with dependent computation via decomposition").
Here they stand in for the pairs of a collective and a product in `olmo_fn.nn.linear` and `olmo_fn.nn.feed_forward`.

B batch, T positions, n ranks, N = B T, D and F widths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed._symmetric_memory
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels import Function, Kernel
from olmo_fn.mesh.axis import Axis


def gather_products(x: Tensor, weights: Sequence[Tensor], tp: Axis) -> tuple[Tensor, list[Tensor]]:
    """All ranks' ``x`` (B, T/n, D) along the positions, as (N, D), and its products (N, F) with weights (D, F)."""
    h, products = torch.ops.symm_mem.fused_all_gather_matmul(x, list(weights), 1, tp.group)
    return h.flatten(0, 1), [y.flatten(0, 1) for y in products]


def products_scatter(xs: Sequence[Tensor], weights: Sequence[Tensor], B: int, tp: Axis) -> Tensor:
    """This rank's positions (B, T/n, D) of the sum, over ranks and pairs, of products of xs (N, F) and weights (F, D)."""
    x, w = (xs[0], weights[0]) if len(xs) == 1 else (torch.cat([*xs], 1), torch.cat([*weights]))
    return torch.ops.symm_mem.fused_matmul_reduce_scatter(x.unflatten(0, (B, -1)), w, "sum", 1, tp.group)


def linear_vjp(gather: Axis, scatter: Axis) -> VJP:
    """`olmo_fn.nn.linear.linear` of weights that have some columns (``gather``) or some rows (``scatter``) on each rank."""
    return _columns(gather) if gather.size > 1 else _rows(scatter)


def _columns(tp: Axis) -> VJP:
    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        (x,) = inputs
        B = x.shape[0]
        h, out = gather_products(x, weights, tp)

        def pullback(*cotangents: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out = [c.flatten(0, 1) for c in cotangents]
            return [lambda d=d: h.T @ d for d in d_out], [products_scatter(d_out, [w.T for w in weights], B, tp)]

        return tuple(y.unflatten(0, (B, -1)) for y in out), pullback

    return vjp


def _rows(tp: Axis) -> VJP:
    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], Callable[..., Any]]:
        B, h = inputs[0].shape[0], inputs[0].flatten(0, 1)

        def pullback(*cotangents: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            pairs = [gather_products(c, [w.T], tp) for c, w in zip(cotangents, weights, strict=True)]
            d_h = sum((d_x for _, (d_x,) in pairs[1:]), pairs[0][1][0])
            return [lambda d=d: h.T @ d for d, _ in pairs], [d_h.unflatten(0, (B, -1))]

        return tuple(products_scatter([h], [w], B, tp) for w in weights), pullback

    return vjp


def gated_vjp(tp: Axis, kernel: Kernel, product: Function, gradient: Function) -> VJP:
    """`olmo_fn.nn.feed_forward.gated`: ``product(gate, up)``, and ``gradient`` gives that again and both cotangents."""

    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        (w_gate, w_up, w_down), (x,) = weights, inputs
        B = x.shape[0]
        h, (gate, up) = gather_products(x, [w_gate, w_up], tp)

        def pullback(cotangent: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out, (d_hidden,) = gather_products(cotangent, [w_down.T], tp)
            hidden, d_gate, d_up = kernel(gradient)(gate, up, d_hidden)
            d_x = products_scatter([d_gate, d_up], [w_gate.T, w_up.T], B, tp)
            return (lambda: h.T @ d_gate, lambda: h.T @ d_up, lambda: hidden.T @ d_out), (d_x,)

        return products_scatter([kernel(product)(gate, up)], [w_down], B, tp), pullback

    return vjp
