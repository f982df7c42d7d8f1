"""The gated feed-forward network (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.grad import Kernel, identity
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


def feed_forward_specs(d_model: int, hidden: int, *, std: float, std_up: float, std_down: float) -> Tree:
    """``w_gate`` (D, F), ``w_up`` (D, F), ``w_down`` (F, D); OLMo-core's w1, w3, w2, transposed."""
    return {
        "w_gate": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std)),
        "w_up": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std_up)),
        "w_down": Spec((hidden, d_model), ("mlp", "embed"), Init("trunc_normal", std_down)),
    }


def feed_forward(p: Tree, x: Tensor) -> Tensor:
    """``(silu(x w_gate) · (x w_up)) w_down``; (B, T, D) to (B, T, D).

    >>> eye = torch.eye(2)
    >>> feed_forward({"w_gate": eye, "w_up": eye, "w_down": eye}, torch.tensor([[1.0, 0.0]]))
    tensor([[0.7311, 0.0000]])
    """
    return (F.silu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"]


def feed_forward_vjp(p: Tree, x: Tensor, kernel: Kernel = identity) -> tuple[Tensor, Callable[[Tensor], tuple[Tree, Tensor]]]:
    """`feed_forward` with its pullback, which takes the result's cotangent to those of ``p`` and ``x``.

    Keeps what the two projections gave, not their product, which the backward kernel makes again on its way.
    """
    h = x.flatten(0, -2)  # (N, D)
    gate, up = h @ p["w_gate"], h @ p["w_up"]
    out = kernel(_gated)(gate, up) @ p["w_down"]

    def pullback(cotangent: Tensor) -> tuple[Tree, Tensor]:
        d_out = cotangent.flatten(0, -2)
        hidden, d_gate, d_up = kernel(_gated_gradient)(gate, up, d_out @ p["w_down"].T)
        d_p = {"w_gate": h.T @ d_gate, "w_up": h.T @ d_up, "w_down": hidden.T @ d_out}
        return d_p, torch.addmm(d_gate @ p["w_gate"].T, d_up, p["w_up"].T).view_as(x)

    return out.view_as(x), pullback


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) · up, and the cotangents of ``gate`` and ``up``."""
    s = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    silu = gate * s
    d_gate = d_hidden * up * (s + silu * (1 - s))
    return (silu * up).to(gate.dtype), d_gate.to(gate.dtype), (d_hidden * silu).to(gate.dtype)
