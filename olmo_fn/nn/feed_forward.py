"""The gated feed-forward network (Shazeer 2020, SwiGLU)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

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

    >>> import torch
    >>> eye = torch.eye(2)
    >>> feed_forward({"w_gate": eye, "w_up": eye, "w_down": eye}, torch.tensor([[1.0, 0.0]]))
    tensor([[0.7311, 0.0000]])
    """
    return (F.silu(x @ p["w_gate"]) * (x @ p["w_up"])) @ p["w_down"]
