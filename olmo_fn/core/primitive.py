"""Primitives: operations with a backward of their own, written once, as a function that returns its result and its pullback.

    def double_vjp(weights, inputs):                   # y = w x
        (w,), (x,) = weights, inputs
        def pullback(d_y):                             # to functions that compute the weights' gradients, and the inputs'
        gradients
            return (lambda: d_y * x,), (d_y * w,)
        return w * x, pullback

    y = primitive(double_vjp, [w], [x], ctx.backend.weight_grads)

What the pullback closes over is what is kept for backward. Gradients of weights are functions because a pipeline may want them
later (zero bubble), and a frozen weight not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Pullback: TypeAlias = Callable[..., tuple[Sequence[Callable[[], Tensor]], Sequence[Tensor | None]]]
VJP: TypeAlias = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Any, Pullback]]
WeightGrads: TypeAlias = Callable[[Tensor, Callable[[], Tensor]], bool]


def primitive(
    vjp: VJP,
    weights: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weight_grads: WeightGrads | None = None,
    *,
    costly: bool = False,
) -> Any:
    """The result of ``vjp`` (a tensor or a tuple of them), with its pullback as its backward; differentiable once.

    Gradients of weights go to ``weight_grads`` if that takes them, past autograd, or else through autograd. ``costly`` says of
    one with a single result that it takes long for that one's memory; a segment that runs twice may then run it `Once`.

    >>> import torch
    >>> x, w = torch.tensor(3.0, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    >>> def double_vjp(weights, inputs):
    ...     (w,), (x,) = weights, inputs
    ...     return w * x, lambda d_y: ((lambda: d_y * x,), (d_y * w,))
    >>> torch.autograd.grad(primitive(double_vjp, [w], [x]), [w, x])
    (tensor(3.), tensor(2.))
    """
    return _Primitive.apply(vjp, weight_grads, len(weights), *weights, *inputs)


class Once:
    """The costly primitives of a segment that runs twice: they run in the `first` run, and the `second` is given their results.

    Kept are what they gave and what their pullbacks close over, but for their inputs, which the second run computes again and
    fills in. (What a pullback made of an input by itself, such as a view, is kept.)
    """

    def __init__(self, primitive: Callable[..., Any]) -> None:
        self.primitive = primitive
        self.kept: list[tuple[list[Tensor], Tensor, Pullback]] = []

    def first(self, vjp: VJP, *args: Any, costly: bool = False) -> Any:
        """`primitive`, whose result, a tensor, is kept if it is ``costly``."""

        @wraps(vjp)
        def run(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
            own = [x.detach() for x in inputs]
            out, pullback = vjp(weights, own)
            for x in own:
                empty(x)
            self.kept.append((own, out, pullback))
            return out, pullback

        return self.primitive(run if costly else vjp, *args, costly=costly)

    def take(self) -> list[Tensor]:
        """The results, to be kept by somebody else until they are `given`: what the pullbacks close over is left empty."""
        taken = [out.detach() for _, out, _ in self.kept]
        for _, out, _ in self.kept:
            empty(out)
        return taken

    def given(self, results: Sequence[Tensor]) -> None:
        """The inverse of `take`."""
        for (_, out, _), result in zip(self.kept, results, strict=True):
            out.data = result

    def second(self, vjp: VJP, *args: Any, costly: bool = False) -> Any:
        """`primitive`, which, if it is ``costly``, gives what it gave in the first run, and is costly no more."""

        @wraps(vjp)
        def run(weights: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, Pullback]:
            own, out, pullback = self.kept.pop(0)
            for x, again in zip(own, inputs, strict=True):
                x.data = again
            return out, pullback

        return self.primitive(run if costly else vjp, *args)


def empty(x: Tensor) -> None:
    """Let a tensor go from its memory, which others may have too."""
    x.data = x.new_empty(0)


class _Primitive(Function):
    @staticmethod
    def forward(ctx: Any, vjp: VJP, weight_grads: WeightGrads | None, n: int, *tensors: Tensor) -> Any:
        ctx.weights, ctx.weight_grads = tensors[:n], weight_grads
        out, ctx.pullback = vjp(tensors[:n], tensors[n:])
        # The pullback may close over the result. What leaves is another tensor on the same memory: autograd points from it to
        # this node, and a circle would keep both until Python looks for circles.
        return tuple(x.detach() for x in out) if isinstance(out, tuple) else out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        weights, pullback = ctx.weights, ctx.pullback
        del ctx.weights, ctx.pullback
        weight_gradients, input_gradients = pullback(*cotangents)
        del pullback
        through_autograd = []
        for weight, gradient, needed in zip(weights, weight_gradients, ctx.needs_input_grad[3:], strict=False):
            taken = needed and ctx.weight_grads is not None and ctx.weight_grads(weight, gradient)
            through_autograd.append(gradient() if needed and not taken else None)
        return None, None, None, *through_autograd, *input_gradients
