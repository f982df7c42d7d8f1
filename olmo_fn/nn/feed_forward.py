"""The gated feed-forward network (Shazeer 2020, SwiGLU), and the primitive that computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels import Kernel
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, reduce_scatter
from olmo_fn.nn.context import Context
from olmo_fn.nn.linear import Adapted, Weight, linear
from olmo_fn.nn.sublayer import Names, Result, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


def swiglu_sublayer(d_model: int, hidden: int, *, std: float, std_up: float, std_down: float) -> Sublayer:
    """SwiGLU as a sublayer: ``w_gate`` (D, F), ``w_up`` (D, F), ``w_down`` (F, D); OLMo-core's w1, w3, w2, transposed."""

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        return swiglu(ctx, x, p["w_gate"], p["w_up"], p["w_down"])

    return Sublayer(
        "feed_forward",
        specs={
            "w_gate": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std)),
            "w_up": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std_up)),
            "w_down": Spec((hidden, d_model), ("mlp", "embed"), Init("trunc_normal", std_down)),
        },
        apply=apply,
        flops=lambda length: 2 * length * 3 * d_model * hidden,
        divided=("tp", "cp"),
        names=NAMES,
    )


NAMES = {
    "w_gate": Names("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "w_up": Names("mlp.up_proj.weight", "feed_forward.w3.weight"),
    "w_down": Names("mlp.down_proj.weight", "feed_forward.w2.weight"),
}


def swiglu(ctx: Context, x: Tensor, w_gate: Weight, w_up: Weight, w_down: Weight) -> Tensor:
    """``(silu(x w_gate) · (x w_up)) w_down``; (B, T, D) to (B, T, D).

    On an axis ``tp`` a rank has some of the hidden features, and its part of the sequence, gathered for the projections.
    """
    backend, tp = ctx.backend, ctx.backend.axes.tp
    weights = w_gate, w_up, w_down
    if any(isinstance(w, Adapted) for w in weights):
        gate, up = linear(backend, x, [w_gate, w_up], gather=tp)
        return linear(backend, backend.fuse(gated)(gate, up), [w_down], scatter=tp)[0]
    if backend.primitive:
        return backend.primitive(_swiglu_vjp(tp, backend.kernel), weights, [x], backend.weight_grads)
    h = all_gather(x, 1, tp)
    return reduce_scatter(gated(h @ w_gate, h @ w_up) @ w_down, 1, tp)  # type: ignore[operator]


def _swiglu_vjp(tp: Axis, kernel: Kernel) -> VJP:
    """Keeps what the two projections gave, not their product, which the backward kernel makes again on its way."""

    def vjp(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        (w_gate, w_up, w_down), (x,) = weights, inputs
        B = x.shape[0]
        h = all_gather(x, 1, tp).flatten(0, 1)  # (N, D)
        gate, up = h @ w_gate, h @ w_up
        out = reduce_scatter((kernel(gated)(gate, up) @ w_down).unflatten(0, (B, -1)), 1, tp)

        def pullback(cotangent: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out = all_gather(cotangent, 1, tp).flatten(0, 1)
            hidden, d_gate, d_up = kernel(_gated_gradient)(gate, up, d_out @ w_down.T)
            d_h = (d_gate @ w_gate.T).addmm_(d_up, w_up.T)
            d_weights = (lambda: h.T @ d_gate, lambda: h.T @ d_up, lambda: hidden.T @ d_out)
            return d_weights, (reduce_scatter(d_h.unflatten(0, (B, -1)), 1, tp),)

        return out, pullback

    return vjp


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def _gated_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) · up, and the cotangents of ``gate`` and ``up``."""
    s = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    silu = gate * s
    d_gate = d_hidden * up * (s + silu * (1 - s))
    return (silu * up).to(gate.dtype), d_gate.to(gate.dtype), (d_hidden * silu).to(gate.dtype)
