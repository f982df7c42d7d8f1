"""The learning rate as part of the state: what `vmap` may batch and a derivative may reach."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from olmo_fn.core.chain import Metrics
from olmo_fn.core.gradients import Signals
from olmo_fn.core.pipe import Transform, slot
from olmo_fn.core.step import Scalars, State, Step
from olmo_fn.tree import Tree

SLOT = "lr_scale"


def lr_scale() -> Transform[Step, Step]:
    """Multiply the scheduled learning rate by the slot ``lr_scale`` () fp64, which starts at 1 and which no step changes.

        lr(step) = state.slots["lr_scale"]["scale"] · schedule(step)

    With a schedule that peaks at 1, the scale is the peak learning rate. Set it with `with_lr_scale`.

    >>> from olmo_fn.optim.schedules import warmup_linear
    >>> from olmo_fn.optim import sgd
    >>> from olmo_fn.core.pipe import grad, pipe
    >>> def loss(params, batch):
    ...     return (params["w"] * batch["labels"]).sum(), {}
    >>> step = pipe(loss, grad("func"), sgd(warmup_linear(1.0, 2, 10)), lr_scale())
    >>> state = with_lr_scale(step.init({"w": torch.zeros(1)}), 0.5)
    >>> step(state, {"labels": torch.tensor([1])})[1]["lr"]
    tensor(0.2500, dtype=torch.float64)
    """

    def apply(inner: Step) -> Step:
        def init_control() -> Tree:
            return {**inner.init_control(), SLOT: {"scale": torch.ones((), dtype=torch.float64)}}

        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            slots, scalars, metrics = inner.control(state, signals._replace(lr_scale=state.slots[SLOT]["scale"]), metrics)
            return {**slots, SLOT: state.slots[SLOT]}, scalars, metrics

        return replace(inner, init_control=init_control, control=control)

    return Transform("lr_scale()", Step, Step, apply, **slot(SLOT))


def with_lr_scale(state: State, scale: float | Tensor) -> State:
    """The state with another learning-rate scale; everything else is shared."""
    if SLOT not in state.slots:
        raise ValueError("the state has no slot lr_scale; add lr_scale() to the pipe, after the optimizer")
    value = torch.as_tensor(scale, dtype=torch.float64, device=state.step.device)
    return state._replace(slots={**state.slots, SLOT: {"scale": value}})
