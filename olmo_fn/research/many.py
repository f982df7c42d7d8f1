"""Several runs at once: one `torch.func.vmap` over the whole step, loss, gradient, clipping, update and skipping included.

Small runs cost mostly the calls to small operations; K of them in one program make the same calls once, on tensors with a
leading dim of size K. Whatever is in the state may differ between the runs: initial weights, and the learning rate
with `olmo_fn.research.lr_scale`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metrics, bind
from olmo_fn.core.step import State, Step, check_state, spend

T = TypeVar("T")
StepFunction = Callable[[State, Batch], tuple[State, Metrics]]


def stack(runs: Sequence[T]) -> T:
    """K states (or batches, or trees) of the same shapes as one, each leaf with a new first dim of size K.

    >>> stack([{"w": torch.zeros(2)}, {"w": torch.ones(2)}])
    {'w': tensor([[0., 0.],
            [1., 1.]])}
    """
    if isinstance(runs[0], State):
        return State(*(stack(parts) for parts in zip(*runs, strict=True)))  # type: ignore[return-value]
    return tree.map(lambda *leaves: torch.stack(leaves), *runs)


def unstack(many: T) -> list[T]:
    """The inverse of `stack`; the leaves are views of the stacked ones.

    >>> unstack({"w": torch.tensor([[0.0], [1.0]])})
    [{'w': tensor([0.])}, {'w': tensor([1.])}]
    """
    if isinstance(many, State):
        return [State(*parts) for parts in zip(*(unstack(part) for part in many), strict=True)]  # type: ignore[misc]
    leaf = next(leaf for _, leaf in tree.items(many))
    return [tree.map(lambda x, i=i: x[i], many) for i in range(len(leaf))]


def many(step: Step, batch_per_run: bool = False) -> StepFunction:
    """``step`` over stacked states: ``(state, batch) -> (state, metrics)``, all with a first dim of size K.

    The runs share one batch; with ``batch_per_run`` each leaf of the batch has a first dim of size K, too. The step must be
    built with ``grad(engine="func")`` and without ``compile()``; `compiled` compiles all of it. With ``donate()`` the
    stacked state is overwritten in place.
    """
    if step.execution.fuse is not bind:
        raise ValueError("compile() cannot be inside vmap; leave it out of the pipe, and use olmo_fn.research.compiled")
    at_once = torch.func.vmap(step, in_dims=(0, 0 if batch_per_run else None))

    def run(state: State, batch: Batch) -> tuple[State, Metrics]:
        check_state(state)
        after = at_once(state, batch)
        if step.execution.donate:
            spend(state)
        return after

    return run


def compiled(step: StepFunction, state: State, batch: Batch) -> StepFunction:
    """``step``, such as a `many`, as one compiled program for the shapes of ``state`` and ``batch``.

    The step is traced first and its graph compiled after, since `torch.compile` of a derivative drops the custom backward of
    an ``autograd.Function`` (pytorch issue 193279). Compiling takes about a minute a layer.
    Not bitwise the same as the eager step, and on more than one thread the embedding's gradient may differ between two runs.
    """
    leaves, inputs = pytree.tree_flatten((state, batch))
    outputs: list[Any] = []

    def flat(*args: Tensor) -> list[Tensor]:
        out, spec = pytree.tree_flatten(step(*pytree.tree_unflatten(args, inputs)))
        outputs.append(spec)
        return out

    graph = torch.compile(make_fx(flat)(*pytree.tree_map(torch.clone, leaves)), fullgraph=True)

    def run(state: State, batch: Batch) -> tuple[State, Metrics]:
        given, spec = pytree.tree_flatten((state, batch))
        if [x.shape for x in given] != [x.shape for x in leaves] or spec != inputs:
            raise ValueError("the step was compiled for other shapes or names; compile it again with this state and batch")
        return pytree.tree_unflatten(graph(*given), outputs[0])

    return run


def train_many(
    step: Step, states: Sequence[State], batches: Iterable[Batch], batch_per_run: bool = False
) -> tuple[list[State], Metrics]:
    """Train from K ``states`` at once through ``batches``, one batch a step for all of them.

    Returns the K last states, and the metrics of all steps, each (steps, K). Equal to K runs one after the other but for
    the rounding of batched matrix products.

    >>> from olmo_fn.optim import sgd
    >>> from olmo_fn.core.pipe import grad, pipe
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch["labels"]) ** 2).sum(), {}
    >>> step = pipe(loss, grad("func"), sgd(0.25))
    >>> starts = [step.init({"w": torch.tensor([w])}) for w in (0.0, 1.0, 3.0)]
    >>> states, metrics = train_many(step, starts, [{"labels": torch.tensor([2])}] * 2)
    >>> [state.params["w"].item() for state in states]
    [1.5, 1.75, 2.25]
    >>> metrics["loss"]
    tensor([[4.0000, 1.0000, 1.0000],
            [1.0000, 0.2500, 0.2500]])
    """
    state, run = stack(states), many(step, batch_per_run)
    lines: list[Metrics] = []
    for batch in batches:
        state, metrics = run(state, batch)
        lines.append(metrics)
    return unstack(state), stack(lines) if lines else {}
