"""A mistake, to reproduce what was trained with it."""

from __future__ import annotations

from dataclasses import replace

import torch

from olmo_fn.core.chain import Metrics
from olmo_fn.core.gradients import Grads, Signals
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, State, Step
from olmo_fn.tree import Tree


def first_step_bias(optimizer: Transform[Grads, Step]) -> Transform[Grads, Step]:
    """``optimizer``, with its bias corrections for ever those of the first step: ``first_step_bias(adamw(...))``.

    OLMo-core's ``step_increment_bugfix=False``, with which OLMo 2 32B was trained: each update sees a count of 1, so for betas
    (0.9, 0.95) the later steps are √(1 - β₂) / (1 - β₁) = 2.24 times as long. The slot still counts the updates.
    """

    def apply(grads: Grads) -> Step:
        inner = optimizer.apply(grads)
        (name,) = inner.init_control()

        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            count = state.slots[name]["count"]
            first = {**state.slots, name: {**state.slots[name], "count": torch.zeros_like(count)}}
            slots, scalars, report = inner.control(state._replace(slots=first), signals, metrics)
            slots = {**slots, name: {**slots[name], "count": count + slots[name]["count"]}}
            return slots, scalars, report

        return replace(inner, control=control)

    return Transform(f"first_step_bias({optimizer.name})", optimizer.takes, optimizer.gives, apply)
