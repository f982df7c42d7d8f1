"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import enter, psum
from olmo_fn.spec import Init, Spec


def rms_norm_spec(size: int, axis: str = "embed") -> Spec:
    """The gain of `rms_norm`, ones at the start."""
    return Spec((size,), (axis,), Init("ones"))


def rms_norm(weight: Tensor, x: Tensor, eps: float = 1e-6, axis: Axis = Axis()) -> Tensor:  # noqa: B008
    """``x / sqrt(mean(x², last dim) + eps) · weight`` (Zhang & Sennrich 2019, eq. 4), computed in fp32.

    ``weight`` (D,), ``x`` (..., D) of any float dtype; the result has ``x``'s dtype. With an ``axis``, the ranks have equal
    parts of the last dim, and the mean is over all of it.

    >>> rms_norm(torch.ones(2), torch.tensor([[3.0, 4.0]]), eps=0.0)
    tensor([[0.8485, 1.1314]])
    """
    x32 = x if x.dtype == torch.float64 else x.float()
    mean = x32.square().mean(-1, keepdim=True)
    mean = enter(psum(mean / axis.size, axis), axis)  # every rank goes on with its own part of x: gradients are summed too
    scale = torch.rsqrt(mean + eps)
    return (x32 * scale * weight).to(x.dtype)


def norm_stream(eps: float, tp: Axis, gain: Tensor, x: Tensor) -> Tensor:
    """`rms_norm` of the stream x (B, T, D), of which a rank of ``tp`` has some positions: gradients of the gain are summed."""
    return rms_norm(enter(gain, tp), x, eps)


def add_normed(eps: float, tp: Axis, gain: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """``x`` plus `norm_stream` of ``y``: one kernel for a norm on a sublayer's output and the residual."""
    return x + norm_stream(eps, tp, gain, y)
