"""Feed-forward networks: gated ones (Shazeer 2020) with the primitive that computes them, and the plain one of GPT-2.

B batch, T positions, N all of them, D model width, F hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import pi
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.primitive import VJP
from olmo_fn.kernels import Function, Kernel
from olmo_fn.kernels.float8 import Float8, tensors_of
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, reduce_scatter
from olmo_fn.nn import async_tp
from olmo_fn.nn.context import Context
from olmo_fn.nn.linear import Adapted, Weight, add_bias, alike, linear, matmul, times, transposed_times
from olmo_fn.nn.sublayer import Names, Result, Sublayer
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

Activation: TypeAlias = Literal["silu", "gelu-tanh", "gelu"]


@dataclass(frozen=True, kw_only=True)
class GatedForm:
    """A layer's gated feed-forward network in numbers."""

    d_model: int
    hidden: int
    std: float
    std_up: float
    std_down: float
    activation: Activation = "silu"
    bias: bool = False
    scales: bool = False
    """Hidden features have learned scales before the activation (nGPT)."""


def gated_sublayer(form: GatedForm) -> Sublayer:
    """``(act(x w_gate) · (x w_up)) w_down``: ``w_gate`` (D, F), ``w_up`` (D, F), ``w_down`` (F, D)."""
    D, hidden = form.d_model, form.hidden
    biases = {"gate_bias": (hidden, "mlp"), "up_bias": (hidden, "mlp"), "down_bias": (D, "embed")} if form.bias else {}
    scales = ("s_gate", "s_up") if form.scales else ()

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        if not form.bias and not form.scales:
            return gated(ctx, x, p["w_gate"], p["w_up"], p["w_down"], form.activation)
        gate, up = ctx.column_linear(x, p["w_gate"], p["w_up"])
        if form.scales:
            gate, up = ctx.fuse(scaled, D**0.5)(gate, up, p["s_gate"], p["s_up"])
        if form.bias:
            gate, up = ctx.fuse(biased)(gate, up, p["gate_bias"], p["up_bias"])
        y = ctx.row_linear(ctx.fuse(ACTIVATIONS[form.activation].gated)(gate, up), p["w_down"])
        return ctx.fuse(add_bias, ctx.backend.axes.tp)(y, p["down_bias"]) if form.bias else y

    return Sublayer(
        "feed_forward",
        specs={
            "w_gate": Spec((D, hidden), ("embed", "mlp"), Init("trunc_normal", form.std)),
            "w_up": Spec((D, hidden), ("embed", "mlp"), Init("trunc_normal", form.std_up)),
            "w_down": Spec((hidden, D), ("mlp", "embed"), Init("trunc_normal", form.std_down)),
            **{name: Spec((width,), (axis,), Init("zeros")) for name, (width, axis) in biases.items()},
            **{name: Spec((hidden,), ("mlp",), Init("ones")) for name in scales},
        },
        apply=apply,
        flops=lambda length: 2 * length * 3 * D * hidden,
        divided=("tp", "cp"),
        names=GATED_NAMES,
    )


GATED_NAMES = {
    "w_gate": Names("mlp.gate_proj.weight", "feed_forward.w1.weight"),
    "w_up": Names("mlp.up_proj.weight", "feed_forward.w3.weight"),
    "w_down": Names("mlp.down_proj.weight", "feed_forward.w2.weight"),
    "gate_bias": Names("mlp.gate_proj.bias", "feed_forward.w1.bias"),
    "up_bias": Names("mlp.up_proj.bias", "feed_forward.w3.bias"),
    "down_bias": Names("mlp.down_proj.bias", "feed_forward.w2.bias"),
    "s_gate": Names("mlp.s_gate", "feed_forward.sw1"),
    "s_up": Names("mlp.s_up", "feed_forward.sw3"),
}


def plain_sublayer(d_model: int, hidden: int, *, activation: Activation, bias: bool, std: float, std_down: float) -> Sublayer:
    """``act(x w_up + up_bias) w_down + down_bias``, as in GPT-2; the biases only with ``bias``."""
    biases = {"up_bias": (hidden, "mlp"), "down_bias": (d_model, "embed")} if bias else {}

    def apply(p: Tree, x: Tensor, ctx: Context) -> Result:
        (up,) = ctx.column_linear(x, p["w_up"])
        y = ctx.row_linear(ctx.fuse(activated, activation)(up, *([p["up_bias"]] if bias else [])), p["w_down"])
        return ctx.fuse(add_bias, ctx.backend.axes.tp)(y, p["down_bias"]) if bias else y

    return Sublayer(
        "feed_forward",
        specs={
            "w_up": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std)),
            "w_down": Spec((hidden, d_model), ("mlp", "embed"), Init("trunc_normal", std_down)),
            **{name: Spec((width,), (axis,), Init("zeros")) for name, (width, axis) in biases.items()},
        },
        apply=apply,
        flops=lambda length: 2 * length * 2 * d_model * hidden,
        divided=("tp", "cp"),
        names={name: GATED_NAMES[name] for name in ("w_up", "w_down", "up_bias", "down_bias")},
    )


def activated(activation: Activation, up: Tensor, bias: Tensor | None = None) -> Tensor:
    """The activation of ``up + bias``."""
    return ACTIVATIONS[activation].act(up if bias is None else (up + bias).to(up.dtype))


def biased(gate: Tensor, up: Tensor, gate_bias: Tensor, up_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Both with their biases."""
    return (gate + gate_bias).to(gate.dtype), (up + up_bias).to(up.dtype)


def scaled(factor: float, gate: Tensor, up: Tensor, s_gate: Tensor, s_up: Tensor) -> tuple[Tensor, Tensor]:
    """Both times their scales, and the gate times ``factor`` (nGPT, section 2.4)."""
    return (gate * (factor * s_gate)).to(gate.dtype), (up * s_up).to(up.dtype)


def gated(ctx: Context, x: Tensor, w_gate: Weight, w_up: Weight, w_down: Weight, activation: Activation = "silu") -> Tensor:
    """``(act(x w_gate) · (x w_up)) w_down``; (B, T, D) to (B, T, D).

    On an axis ``tp`` a rank has some of the hidden features, and its part of the sequence, gathered for the projections.
    """
    backend, tp, fns = ctx.backend, ctx.backend.axes.tp, ACTIVATIONS[activation]
    weights = w_gate, w_up, w_down
    if any(isinstance(w, Adapted) for w in weights) or not alike(weights[:2]):
        gate, up = linear(backend, x, [w_gate, w_up], gather=tp)
        return linear(backend, backend.fuse(fns.gated)(gate, up), [w_down], scatter=tp)[0]
    if backend.primitive:
        vjp = _gated_vjp(tp, backend.kernel, fns, weights)
        if tp.overlapped and not isinstance(w_gate, Float8):
            vjp = async_tp.gated_vjp(tp, backend.kernel, fns.gated, fns.gradient)
        return backend.primitive(vjp, tensors_of(weights), [x], backend.weight_grads)
    h = all_gather(x, 1, tp)
    return reduce_scatter(matmul(fns.gated(matmul(h, w_gate), matmul(h, w_up)), w_down), 1, tp)


def _gated_vjp(tp: Axis, kernel: Kernel, fns: ActivationFunctions, weights: Sequence[Weight]) -> VJP:
    """Keeps what the two projections gave, not their product, which the backward kernel makes again on its way."""

    def vjp(tensors: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Callable[..., Any]]:
        (x,), read, w_down = inputs, weights[:2], weights[2:]
        B = x.shape[0]
        h = all_gather(x, 1, tp).flatten(0, 1)  # (N, D)
        gate, up = times(kernel, h, read)
        (y,) = times(kernel, kernel(fns.gated)(gate, up), w_down)
        out = reduce_scatter(y.unflatten(0, (B, -1)), 1, tp)

        def pullback(cotangent: Tensor) -> tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor]]:
            d_out = all_gather(cotangent, 1, tp).flatten(0, 1)
            hidden, d_gate, d_up = kernel(fns.gradient)(gate, up, transposed_times(kernel, [d_out], w_down))
            d_h = transposed_times(kernel, [d_gate, d_up], read)
            d_weights = (lambda: h.T @ d_gate, lambda: h.T @ d_up, lambda: hidden.T @ d_out)
            return d_weights, (reduce_scatter(d_h.unflatten(0, (B, -1)), 1, tp),)

        return out, pullback

    return vjp


class ActivationFunctions(NamedTuple):
    """An activation, ``act(gate) · up``, and from the cotangent of that the product again and the cotangents of both."""

    act: Function
    gated: Function
    gradient: Function


def gated_silu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return F.silu(gate) * up


def _gated_silu_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    s = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    silu = gate * s
    d_gate = d_hidden * up * (s + silu * (1 - s))
    return (silu * up).to(gate.dtype), d_gate.to(gate.dtype), (d_hidden * silu).to(gate.dtype)


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh (Hendrycks & Gimpel 2016)."""
    return F.gelu(x, approximate="tanh")


def gated_gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """gelu_tanh(gate) · up."""
    return gelu_tanh(gate) * up


def _gated_gelu_tanh_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    inner, c = (2 / pi) ** 0.5, 0.044715
    t = torch.tanh(inner * (x + c * x * x * x))
    gelu, slope = 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner * (1 + 3 * c * x * x)
    return (gelu * up).to(gate.dtype), (d_hidden * up * slope).to(gate.dtype), (d_hidden * gelu).to(gate.dtype)


def gated_gelu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) · up."""
    return F.gelu(gate) * up


def _gated_gelu_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x = gate.to(torch.promote_types(gate.dtype, torch.float32))
    normal = 0.5 * (1 + torch.erf(x * 0.5**0.5))
    gelu, slope = x * normal, normal + x * torch.exp(-0.5 * x * x) * (2 * pi) ** -0.5
    return (gelu * up).to(gate.dtype), (d_hidden * up * slope).to(gate.dtype), (d_hidden * gelu).to(gate.dtype)


ACTIVATIONS: dict[Activation, ActivationFunctions] = {
    "silu": ActivationFunctions(F.silu, gated_silu, _gated_silu_gradient),
    "gelu-tanh": ActivationFunctions(gelu_tanh, gated_gelu_tanh, _gated_gelu_tanh_gradient),
    "gelu": ActivationFunctions(F.gelu, gated_gelu, _gated_gelu_gradient),
}
