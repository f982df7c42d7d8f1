"""From a loss to its gradients: a loss as a chain of stages, and the two engines that differentiate it.

Losses are *sums* over tokens. A gradient is divided once, by ``batch["loss_tokens"]`` or else by the number of labels in
the batch, so that splitting a batch in any way (accumulation, data parallelism) gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.layout import SINGLE, wide
from olmo_fn.mesh.axis import Axes
from olmo_fn.tree import Tree

IGNORE = -100  # the label of a position that has no loss
Batch: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
Context: TypeAlias = dict[str, Tensor]
Function: TypeAlias = Callable[..., Any]
Carry: TypeAlias = Any  # None before the first stage, a tensor or a tuple of them between two, (sum, metrics) after the last
Kernel: TypeAlias = Callable[[Function], Function]  # compiles an elementwise function of tensors of any shape
Pullback: TypeAlias = Callable[[Any], tuple[Any, Any]]


def loss_tokens(batch: Batch) -> Tensor:
    """What the summed loss is divided by: the batch's ``loss_tokens``, or its labels that are not `IGNORE`. 0-d.

    >>> loss_tokens({"labels": torch.tensor([[5, 7, -100]])})
    tensor(2)
    """
    given = batch.get("loss_tokens")
    return (batch["labels"] != IGNORE).sum() if given is None else given


class Stage(NamedTuple):
    """One pure function of a chain: ``fn(*subtrees, carry, context) -> carry``.

    ``params`` are the paths of the subtrees that it uses. Stages with the same ``fn`` object are compiled once. The last
    stage of a chain returns ``(sum of losses, metrics)``, the others a tensor or a tuple of tensors. ``vjp``, if given, is a
    faster way to the same thing, ``(*subtrees, carry, context, kernel) -> (carry, pullback)``, where the pullback takes
    the carry's cotangent to the subtrees', or to a function that computes them later, and the incoming carry's, and ``kernel``
    compiles an elementwise function of any shape; that it agrees with the derivative of ``fn`` is a law. During a sweep the
    context's ``cotangent`` is that of the chain's sum, for a last stage that forms gradients on its way forward.
    """

    name: str
    params: tuple[str, ...]
    fn: Function
    vjp: Function | None = None
    block: int | None = None  # the block of the model that it is part of
    compiled: bool = True  # False: leave it eager under `compile()`
    rowwise: bool = False  # a sum over positions, of which it may be given a few at a time
    stored: bool = False  # its weights may come as they are stored: it casts what it uses, or its output is cast


@dataclass(frozen=True)
class Chain:
    """A loss that is a chain of stages; call it as ``(params, batch) -> (sum of losses, metrics)``.

    Called, it is an ordinary pure function for ``torch.func`` and notebooks. The tape engine walks its stages instead.
    """

    context: Callable[[Batch], Context]
    stages: tuple[Stage, ...]
    on: Callable[[Axes], Chain] | None = None
    """The same chain as one rank of a mesh computes it; None: data-parallel only."""
    carry: Callable[[Context, torch.dtype], Tensor] | None = None
    """An empty tensor like what goes from block to block; None: it cannot be a pipeline."""
    sums: tuple[str, ...] = ()
    """Names of the metrics that come with the loss, for ranks of a pipeline that do not compute it."""

    def changed(self, change: Callable[[Stage], Stage]) -> Chain:
        """The chain with every stage changed, on a mesh too."""
        there = self.on
        on = None if there is None else lambda axes: there(axes).changed(change)
        return replace(self, stages=tuple(map(change, self.stages)), on=on)

    def __call__(self, params: Tree, batch: Batch) -> tuple[Tensor, Metrics]:
        context, carry = self.context(batch), None
        for stage in self.stages:
            carry = stage.fn(*subtrees(params, stage), carry, context)
        return carry  # type: ignore[return-value]


LossFunction: TypeAlias = Callable[[Tree, Batch], tuple[Tensor, Metrics]]


def subtrees(params: Tree, stage: Stage) -> tuple[Tree, ...]:
    """The parts of ``params`` that a stage uses, in its order."""
    return tuple(tree.at(params, path) for path in stage.params)


def identity(fn: Function) -> Function:
    """The function itself."""
    return fn


def everything(path: str) -> bool:
    """Yes."""
    return True


@dataclass(frozen=True)
class Execution:
    """How a step is carried out, never what it computes.

    ``wrap`` goes around every stage function, and ``wrap_leaf`` around every parameter update and other kernels that see
    tensors of many shapes (compilation); ``donate`` lets an update write into the memory of the state it replaces;
    ``layout`` is where parameters live (`olmo_fn.core.layout`), ``dtype`` that of matrices and activations. ``wants`` says of a
    path whether its gradient is asked for; the tree of gradients has no others. ``differentiable`` keeps what a derivative
    of the whole step needs.
    """

    wrap: Callable[[Function], Function] = identity
    wrap_leaf: Callable[[Function], Function] = identity
    donate: bool = False
    layout: Any = SINGLE
    dtype: torch.dtype = torch.float32
    wants: Callable[[str], bool] = everything
    differentiable: bool = False


EAGER = Execution()
GradFunction: TypeAlias = Callable[[Tree, Batch, Execution], tuple[Tree, Metrics]]


class Sweep(NamedTuple):
    """The ways of one rank through its part of a chain.

    ``gradients(chain, remat, params, batch, execution)``: there and back; gradients of the mean loss by path, as the layout
    keeps them, and the sums of this rank's tokens. ``sums(chain, params, batch, execution)``: there only, for these sums.
    """

    gradients: Callable[[Chain, str, Tree, Batch, Execution], tuple[dict[str, Tensor], Metrics]]
    sums: Callable[[Chain, Tree, Batch, Execution], Metrics]


@dataclass(frozen=True)
class Grads:
    """A gradient function: ``(params, batch) -> (gradients in at least fp32, metrics)``.

    ``fn`` may leave two things undone: gradients in the dtype of the computation, and a metric ``grad_scale``, a factor of
    all of them. Called, a Grads does both; a Step takes ``fn`` as it is, since its updates do both on their way.
    """

    fn: GradFunction = field(repr=False)
    chain: Chain | None = field(default=None, repr=False)
    """The loss, if it is a chain: a pipeline cuts it."""

    def __call__(self, params: Tree, batch: Batch, execution: Execution = EAGER) -> tuple[Tree, Metrics]:
        grads, metrics = self.fn(params, batch, execution)
        grads = tree.map(wide, grads)
        if "grad_scale" in metrics:
            metrics = dict(metrics)
            scale, scaled = metrics.pop("grad_scale"), torch.mul if execution.differentiable else Tensor.mul_
            grads = tree.map(lambda g: scaled(g, scale), grads)
        return grads, metrics


# --- torch.func: the reference for the other engine -------------------------------------------------------------------


def func_gradients(loss: LossFunction, dtype: torch.dtype) -> GradFunction:
    """``torch.func.grad_and_value`` of the whole loss: short, and the reference for the other engine."""

    def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
        layout, tokens = execution.layout, loss_tokens(batch)
        fn = layout.chain(loss)

        def scaled(wanted: Tree, frozen: Tree, part: Batch) -> tuple[Tensor, Metrics]:
            total, metrics = fn(tree.combine(wanted, frozen) if frozen else wanted, part)
            return total / tokens, {"loss": total, **metrics}

        wanted, frozen = tree.split(layout.fetch(params, tuple(params), dtype).ready(), execution.wants)
        grads, (_, sums) = torch.func.grad_and_value(scaled, has_aux=True)(wanted, frozen, layout.part(batch))
        flat = layout.finish(layout.reduce(tree.flatten(grads))())
        found = tree.unflatten((path, flat[path]) for path, _ in tree.items(params) if path in flat)
        return found, per_token(layout.total(sums), tokens)

    return gradients


def per_token(metrics: Metrics, tokens: Tensor) -> Metrics:
    """Sums over tokens become means over all tokens that count; parts of a batch then add up."""
    return {name: (value / tokens).detach() for name, value in metrics.items()}


Engine: TypeAlias = Literal["tape", "func"]
