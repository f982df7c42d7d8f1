"""The gated feed-forward network (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from olmo_fn.core.chain import Kernel, identity
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import all_gather, reduce_scatter
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree


def feed_forward_specs(d_model: int, hidden: int, *, std: float, std_up: float, std_down: float) -> Tree:
    """``w_gate`` (D, F), ``w_up`` (D, F), ``w_down`` (F, D); OLMo-core's w1, w3, w2, transposed."""
    return {
        "w_gate": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std)),
        "w_up": Spec((d_model, hidden), ("embed", "mlp"), Init("trunc_normal", std_up)),
        "w_down": Spec((hidden, d_model), ("mlp", "embed"), Init("trunc_normal", std_down)),
    }


def feed_forward(p: Tree, x: Tensor, tp: Axis = Axis()) -> Tensor:  # noqa: B008
    """``(silu(x w_gate) · (x w_up)) w_down``; (B, T, D) to (B, T, D).

    On an axis ``tp`` a rank has some of the hidden features, and its part of the sequence, gathered for the projections.

    >>> eye = torch.eye(2)
    >>> feed_forward({"w_gate": eye, "w_up": eye, "w_down": eye}, torch.tensor([[1.0, 0.0]]))
    tensor([[0.7311, 0.0000]])
    """
    h = all_gather(x, 1, tp)
    return reduce_scatter((F.silu(h @ p["w_gate"]) * (h @ p["w_up"])) @ p["w_down"], 1, tp)


def feed_forward_vjp(
    p: Tree,
    x: Tensor,
    tp: Axis = Axis(),  # noqa: B008
    kernel: Kernel = identity,
) -> tuple[Tensor, Callable[[Tensor, Tensor | None], tuple[Callable[[], Tree], Tensor]]]:
    """`feed_forward` with its pullback: from the result's cotangent, and one of ``x`` to add to, to those of ``p`` (computed
    when called) and of ``x``.

    Keeps what the two projections gave, not their product, which the backward kernel makes again on its way.
    """
    batch = x.shape[0]
    h = all_gather(x, 1, tp).flatten(0, 1)  # (N, D)
    gate, up = h @ p["w_gate"], h @ p["w_up"]
    out = reduce_scatter((kernel(_gated)(gate, up) @ p["w_down"]).unflatten(0, (batch, -1)), 1, tp)

    def pullback(cotangent: Tensor, d_x: Tensor | None) -> tuple[Callable[[], Tree], Tensor]:
        d_out = all_gather(cotangent, 1, tp).flatten(0, 1)
        hidden, d_gate, d_up = kernel(_gated_gradient)(gate, up, d_out @ p["w_down"].T)
        own = d_x if tp.size == 1 else None
        d_h = d_gate @ p["w_gate"].T if own is None else torch.addmm(own.flatten(0, 1), d_gate, p["w_gate"].T)
        d_h = reduce_scatter(d_h.addmm_(d_up, p["w_up"].T).unflatten(0, (batch, -1)), 1, tp)

        def later() -> Tree:
            return {"w_gate": h.T @ d_gate, "w_up": h.T @ d_up, "w_down": hidden.T @ d_out}

        return later, d_h if d_x is None or own is not None else d_h + d_x

    return out, pullback


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _gated_gradient(gate: Tensor, up: Tensor, d_hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """silu(gate) · up, and the cotangents of ``gate`` and ``up``."""
    s = torch.sigmoid(gate.to(torch.promote_types(gate.dtype, torch.float32)))
    silu = gate * s
    d_gate = d_hidden * up * (s + silu * (1 - s))
    return (silu * up).to(gate.dtype), d_gate.to(gate.dtype), (d_hidden * silu).to(gate.dtype)
