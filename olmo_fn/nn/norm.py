"""Norms: root-mean-square and layer normalisation, and the norm of a model's stream as one value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import enter, psum
from olmo_fn.spec import Init, Spec
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.nn.context import Context


def rms_norm_spec(size: int, axis: str = "embed", zero_centred: bool = False) -> Spec:
    """The gain of `rms_norm`: ones at the start, or what is added to one, zeros."""
    return Spec((size,), (axis,), Init("zeros" if zero_centred else "ones"))


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


def layer_norm(weight: Tensor, x: Tensor, eps: float = 1e-6, bias: Tensor | None = None) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) · weight + bias`` over the last dim (Ba et al. 2016), computed in fp32.

    >>> layer_norm(torch.ones(2), torch.tensor([[3.0, 5.0]]), eps=0.0)
    tensor([[-1.,  1.]])
    """
    x32 = x if x.dtype == torch.float64 else x.float()
    x32 = x32 - x32.mean(-1, keepdim=True)
    y = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps) * weight
    return (y if bias is None else y + bias).to(x.dtype)


class Norm(NamedTuple):
    """The norm of a model's stream: call it as ``norm(ctx, p, x)``, x (B, T, D).

    Its parameters ``p``, `specs`, are a gain (D,), or with a bias a tree of that, ``norm``, and ``bias``.
    """

    eps: float = 1e-6
    kind: Literal["rms", "layer"] = "rms"
    bias: bool = False
    zero_centred: bool = False
    """The gain is what is added to one (Gemma), so that weight decay draws it to one."""
    factor: float = 1.0
    """What the result is multiplied by (layer-norm scaling)."""

    def specs(self, size: int) -> Tree | Spec:
        """Its parameters, for a width of ``size``."""
        gain = rms_norm_spec(size, zero_centred=self.zero_centred)
        return {"norm": gain, "bias": Spec((size,), ("embed",), Init("zeros"))} if self.bias else gain

    def __call__(self, ctx: Context, p: Tree | Tensor, x: Tensor) -> Tensor:
        return ctx.fuse(norm_stream, self, ctx.backend.axes.tp)(x, *self.weights(p))

    def add(self, ctx: Context, p: Tree | Tensor, x: Tensor, y: Tensor, factor: float = 1.0) -> Tensor:
        """``x`` plus ``factor`` times the norm of ``y``, in one pass."""
        return ctx.fuse(add_normed, self, ctx.backend.axes.tp, factor)(x, y, *self.weights(p))

    def once(self, ctx: Context, p: Tree | Tensor, x: Tensor) -> Tensor:
        """The same, for what a step does once: on a CPU not compiled, which is not worth the seconds."""
        return self(ctx, p, x) if x.is_cuda else norm_stream(self, ctx.backend.axes.tp, x, *self.weights(p))

    def weights(self, p: Tree | Tensor) -> tuple[Tensor, ...]:
        """Its parameters in their order."""
        return (p["norm"], p["bias"]) if self.bias else (p,)  # type: ignore[index,return-value]


def norm_stream(norm: Norm, tp: Axis, x: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """A norm of the stream x (B, T, D), of which a rank of ``tp`` has some positions: gradients of the gain are summed."""
    gain = enter(gain, tp)
    gain = 1 + gain if norm.zero_centred else gain
    gain = gain if norm.factor == 1 else norm.factor * gain
    if norm.kind == "rms":
        return rms_norm(gain, x, norm.eps)
    bias = bias if bias is None else norm.factor * enter(bias, tp)
    return layer_norm(gain, x, norm.eps, bias)


def add_normed(norm: Norm, tp: Axis, factor: float, x: Tensor, y: Tensor, gain: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x`` plus `norm_stream` of ``y``: one kernel for a norm on a sublayer's output and the residual."""
    normed = norm_stream(norm, tp, y, gain, bias)
    return x + (normed if factor == 1 else factor * normed)


def unit_norm(x: Tensor, axis: Axis = Axis()) -> Tensor:  # noqa: B008
    """``x / |x|`` over the last dim, computed in fp32 (nGPT, Loshchilov et al. 2024); with an ``axis`` as in `rms_norm`.

    >>> unit_norm(torch.tensor([[3.0, 4.0]]))
    tensor([[0.6000, 0.8000]])
    """
    x32 = x if x.dtype == torch.float64 else x.float()
    square = enter(psum(x32.square().sum(-1, keepdim=True), axis), axis)
    return (x32 * torch.rsqrt(square.clamp_min(1e-24))).to(x.dtype)
