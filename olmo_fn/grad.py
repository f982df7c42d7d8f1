"""From a loss to its gradients: a loss as a chain of stages, and the two engines that differentiate it.

Losses are *sums* over tokens. A gradient is divided once, by ``batch["loss_tokens"]`` or else by the number of labels in
the batch, so that splitting a batch in any way (accumulation, data parallelism) gives the same gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.tree import Tree

IGNORE = -100  # the label of a position that has no loss
Batch: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
Context: TypeAlias = dict[str, Tensor]
Function: TypeAlias = Callable[..., Any]
Pullback: TypeAlias = Callable[[Tensor], tuple[tuple[Any, ...], Tensor | None]]


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
    stage of a chain returns ``(sum of losses, metrics)``. ``vjp``, if given, is a faster way to the same thing,
    ``(*subtrees, carry, context) -> (carry, pullback)``, where the pullback takes the carry's cotangent to the
    subtrees' and the incoming carry's; that it agrees with the derivative of ``fn`` is a law.
    """

    name: str
    params: tuple[str, ...]
    fn: Function
    block: int | None = None  # the block of the model that it is part of
    vjp: Function | None = None
    compiled: bool = True  # False: leave it eager under `compile()`


@dataclass(frozen=True)
class Chain:
    """A loss that is a chain of stages; call it as ``(params, batch) -> (sum of losses, metrics)``.

    Called, it is an ordinary pure function for ``torch.func`` and notebooks. The tape engine walks its stages instead.
    """

    context: Callable[[Batch], Context]
    stages: tuple[Stage, ...]

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


@dataclass(frozen=True)
class Execution:
    """How a step is carried out, never what it computes.

    ``wrap`` goes around every stage function and ``wrap_leaf`` around every parameter update (compilation);
    ``donate`` lets an update write into the memory of the state it replaces; ``differentiable`` keeps what a derivative
    of the whole step needs.
    """

    wrap: Callable[[Function], Function] = identity
    wrap_leaf: Callable[[Function], Function] = identity
    donate: bool = False
    differentiable: bool = False


EAGER = Execution()
GradFunction: TypeAlias = Callable[[Tree, Batch, Execution], tuple[Tree, Metrics]]


@dataclass(frozen=True)
class Grads:
    """A gradient function: ``(params, batch) -> (gradients in fp32, metrics)``."""

    fn: GradFunction = field(repr=False)

    def __call__(self, params: Tree, batch: Batch, execution: Execution = EAGER) -> tuple[Tree, Metrics]:
        return self.fn(params, batch, execution)


# --- rematerialisation ------------------------------------------------------------------------------------------------


def remat_policy(remat: str) -> Callable[[Stage], bool]:
    """Which stages keep only their input and run forward again in the backward sweep.

    ``none``; ``full``: every block; ``every-n``: every n-th block, such as ``every-2``; ``feed_forward``: the
    feed-forward half of every block. Stages outside the blocks (embedding, head) are never rerun.

    >>> remat_policy("every-2")(Stage("attention", ("blocks.2",), print, block=2))
    True
    """
    if remat == "none":
        return lambda stage: False
    if remat == "full":
        return lambda stage: stage.block is not None
    if remat == "feed_forward":
        return lambda stage: stage.name == "feed_forward"
    kind, _, n = remat.partition("-")
    if kind == "every" and n.isdecimal() and int(n) > 0:
        return lambda stage: stage.block is not None and stage.block % int(n) == 0
    raise ValueError(f"remat {remat!r} is unknown; use none, full, feed_forward, or every-2, every-3, …")


def fuse(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Join neighbouring stages of the same block into one: fewer calls, more for a compiler to fuse."""
    fused: list[Stage] = []
    for stage in stages:
        last = fused[-1] if fused else None
        if last is not None and last.block is not None and last.block == stage.block:
            both = _compose(last.fn, len(last.params), stage.fn)
            fused[-1] = last._replace(name="block", params=last.params + stage.params, fn=both)
        else:
            fused.append(stage)
    return tuple(fused)


@cache
def _compose(first: Function, n: int, second: Function) -> Function:
    """``second`` after ``first``, which takes the first ``n`` subtrees; cached, so that alike blocks share one function."""

    def both(*args: Any) -> Any:
        *params, carry, context = args
        return second(*params[n:], first(*params[:n], carry, context), context)

    return both


# --- engines ----------------------------------------------------------------------------------------------------------


def func_gradients(loss: LossFunction, dtype: torch.dtype) -> GradFunction:
    """``torch.func.grad_and_value`` of the whole loss: short, and the reference for the other engine."""

    def scaled(params: Tree, batch: Batch) -> tuple[Tensor, Metrics]:
        total, metrics = loss(tree.map(lambda p: compute_copy(p, dtype), params), batch)
        return total / loss_tokens(batch), {"loss": total, **metrics}

    def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
        grads, (_, metrics) = torch.func.grad_and_value(scaled, has_aux=True)(params, batch)
        return grads, _per_token(metrics, loss_tokens(batch))

    return gradients


def tape_gradients(chain: Chain, remat: str, dtype: torch.dtype) -> GradFunction:
    """Sweep the chain: forward keeps one pullback a stage, backward walks them in reverse.

    Uses autograd on detached leaves inside each stage, which is what compiles right on torch 2.13.
    """
    again = remat_policy(remat)
    stages = chain.stages if remat == "feed_forward" else fuse(chain.stages)

    def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
        if execution.differentiable or torch._C._are_functorch_transforms_active():
            raise ValueError("engine tape cannot be inside vmap, jvp or another derivative; use grad(engine='func')")
        tokens = loss_tokens(batch)
        context = chain.context(batch)
        carry: Any = None
        pullbacks: list[Pullback] = []
        for stage in stages:
            carry, pullback = pull(stage, subtrees(params, stage), carry, context, again(stage), dtype, execution)
            pullbacks.append(pullback)
        total, metrics = carry
        metrics = {"loss": total.detach(), **metrics}
        cotangent: Tensor | None = 1.0 / tokens.to(total.dtype)
        flat: dict[str, Tensor] = {}
        for stage in reversed(stages):
            assert cotangent is not None
            grads, cotangent = pullbacks.pop()(cotangent)
            for path, subtree in zip(stage.params, grads, strict=True):
                for name, g in tree.items(subtree, path):
                    flat[name] = flat[name] + g if name in flat else g  # shared by two stages: tied weights
        return tree.map_with_path(lambda path, _: flat[path], params), _per_token(metrics, tokens)

    return gradients


def pull(
    stage: Stage,
    params: tuple[Tree, ...],
    carry: Any,
    context: Context,
    again: bool,
    dtype: torch.dtype,
    execution: Execution,
) -> tuple[Any, Pullback]:
    """Run one stage and return its carry with its pullback. ``again``: keep only the input, run forward twice."""
    if stage.vjp is not None:
        with torch.no_grad():
            carry, pullback = stage.vjp(*_compute_copies(params, dtype), carry, context)
        return carry, lambda cotangent: _to_fp32(*pullback(cotangent))
    fn = execution.wrap(stage.fn) if stage.compiled else stage.fn

    def forward() -> tuple[Any, list[Tensor], tuple[Tree, ...], Any]:
        leaves: list[Tensor] = []

        def leaf(p: Tensor) -> Tensor:
            leaves.append(compute_copy(p.detach(), dtype).requires_grad_())
            return leaves[-1]

        with torch.enable_grad():
            inputs = tuple(tree.map(leaf, p) for p in params)
            x = None if carry is None else carry.detach().requires_grad_()
            return fn(*inputs, x, context), leaves, inputs, x

    def backward(out: Any, leaves: list[Tensor], inputs: tuple[Tree, ...], x: Any, cotangent: Tensor) -> Any:
        root = out[0] if isinstance(out, tuple) else out
        with torch.enable_grad():
            found = torch.autograd.grad(root, leaves if x is None else [*leaves, x], cotangent.to(root.dtype))
        values = iter(found)
        grads = tuple(tree.map(lambda _: next(values), p) for p in inputs)
        return _to_fp32(grads, next(values, None))

    if again:
        with torch.no_grad():
            out = forward()[0]
        return _detach(out), lambda cotangent: backward(*forward(), cotangent)
    out, leaves, inputs, x = forward()
    return _detach(out), lambda cotangent: backward(out, leaves, inputs, x, cotangent)


def compute_copy(p: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices in the compute dtype; vectors (the gains of norms) stay in fp32. A no-op when nothing changes."""
    return p.to(dtype) if p.ndim > 1 else p


def _compute_copies(params: tuple[Tree, ...], dtype: torch.dtype) -> tuple[Tree, ...]:
    return tuple(tree.map(lambda p: compute_copy(p, dtype), p) for p in params)


def _to_fp32(grads: tuple[Tree, ...], carry: Tensor | None) -> tuple[tuple[Tree, ...], Tensor | None]:
    return tuple(tree.map(lambda g: g if g.dtype == torch.float64 else g.float(), g) for g in grads), carry


def _detach(out: Any) -> Any:
    return (out[0].detach(), out[1]) if isinstance(out, tuple) else out.detach()


def _per_token(metrics: Metrics, tokens: Tensor) -> Metrics:
    """Sums over tokens become means over all tokens that count; parts of a batch then add up."""
    return {name: (value / tokens).detach() for name, value in metrics.items()}


Engine: TypeAlias = Literal["tape", "func"]
