"""Differentiating through training steps: how the loss after k steps depends on the learning rate, or on any of the state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.func import grad_and_value
from torch.overrides import TorchFunctionMode

from olmo_fn import tree
from olmo_fn.core.chain import Batch, identity
from olmo_fn.core.step import State, Step
from olmo_fn.tree import Tree


def unroll(step: Step, state: State, batches: Iterable[Batch]) -> State:
    """The state after one step a batch."""
    for batch in batches:
        state, _ = step(state, batch)
    return state


def hypergradient(
    step: Step,
    state: State,
    batches: Iterable[Batch],
    objective: Callable[[Tree], Tensor],
    wrt: str = "slots.lr_scale.scale",
) -> tuple[Tensor, Tensor | Tree]:
    """``objective`` of the parameters after ``batches``, and its derivative with respect to the part ``wrt`` of ``state``.

        d objective(params_k) / d wrt,     state_{i+1} = step(state_i, batch_i)

    by reverse-mode differentiation through the steps, second derivatives of the loss included (Maclaurin et al. 2015,
    arXiv 1502.03492). ``wrt`` is a path in the state: the learning rate's scale (`olmo_fn.research.lr_scale`), or
    ``params``, the weights to start from. Keeps the activations of all k steps. The step needs ``grad(engine="func")`` and
    ``differentiable()``.

    >>> from olmo_fn.optim.sgd import sgd
    >>> from olmo_fn.research.lr_scale import lr_scale
    >>> from olmo_fn.core.pipe import differentiable, grad, pipe
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch["labels"]) ** 2).sum(), {}
    >>> step = pipe(loss, grad("func"), sgd(0.25), lr_scale(), differentiable())
    >>> batch = {"labels": torch.tensor([2])}
    >>> hypergradient(step, step.init({"w": torch.zeros(1)}), [batch], lambda params: loss(params, batch)[0])
    (tensor(1.), tensor(-2., dtype=torch.float64))
    """
    if not step.execution.differentiable:
        raise ValueError("no derivative flows through this step; add differentiable() at the end of its pipe")
    if step.execution.wrap_leaf is not identity:
        raise ValueError("no derivative flows through compiled updates; leave compile() out of the pipe")
    whole = {"step": state.step, "params": state.params, "slots": state.slots}
    batches = list(batches)

    def after(value: Tensor | Tree) -> Tensor:
        start = tree.replace(whole, wrt, value)
        with _Roots():
            return objective(unroll(step, State(start["step"], start["params"], start["slots"]), batches).params)

    derivative, value = grad_and_value(after)(tree.at(whole, wrt))
    for path, x in tree.items(derivative, wrt):
        if not bool(x.isfinite().all()):
            raise ValueError(
                f"the derivative with respect to {path} is not finite; take fewer steps, or a smaller learning rate"
            )
    return value, derivative


class _Roots(TorchFunctionMode):
    """Inside, √0 has the derivative 0 and not ∞.

    Adam divides by √v, and v = (1 - β₂) g² is 0 in rows of an embedding that no batch has used. There √v is a multiple
    of |g|, whose subgradient at 0 is 0; the chain rule by way of v gives 0 · ∞ instead.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.sqrt, Tensor.sqrt) and not kwargs:
            (x,) = args
            return torch.where(x == 0, x, torch.where(x == 0, 1.0, x).sqrt())
        return func(*args, **(kwargs or {}))
