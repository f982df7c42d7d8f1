"""How an optimizer's own mathematics becomes a transform; what all optimizers share is here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn.core.chain import Metrics
from olmo_fn.core.gradients import Grads, Signals
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Leaf, Scalars, Slots, State, Step
from olmo_fn.optim.schedules import Schedule
from olmo_fn.optim.schedules.base import in_fp64
from olmo_fn.tree import Tree, matches

NO_DECAY = ("embed", "*norm", "*bias")
"""Patterns of embeddings, norms and biases."""
OLMO_CORE_NO_DECAY = ("embed",)
"""OLMo-core's rule: all is decayed but the embedding."""


class Decay(NamedTuple):
    """Decoupled weight decay: ``p = p - lr · weight · p``, beside the step and not through the gradient.

    Parameters whose path matches ``no_decay`` are left alone; `OLMO_CORE_NO_DECAY` is OLMo-core's rule. ``cautious`` decays
    only the entries that the step does not move away from zero itself: those with ``step · p >= 0`` (Chen et al. 2025).
    """

    weight: float = 0.1
    no_decay: tuple[str, ...] = NO_DECAY
    cautious: bool = False


class Rule(NamedTuple):
    """What makes an optimizer this one and no other, for one parameter.

    ``init(path, param) -> slots``; ``update(param, grad, slots, scalars) -> (step, slots)``: ``param - step`` is the new
    parameter. Both see fp32 at least, whatever is stored. ``scalars`` makes, once a step and in fp64, the scalars that the
    update needs besides ``lr`` and ``count``, such as bias corrections. ``memory`` are numbers that it keeps from one step
    to the next: it gets their values, and those that it returns by the same name are kept. ``point`` is a `Leaf`'s.
    ``decays``: the update itself applies the scalar ``weight_decay``. ``unlike``: the slots that are not shaped like the
    parameter.
    """

    init: Callable[[str, Tensor], Slots]
    update: Callable[[Tensor, Tensor, Slots, Scalars], tuple[Tensor, Slots]]
    scalars: Callable[[Scalars], Scalars] = lambda s: {}
    memory: Mapping[str, float] = {}
    elementwise: bool = True
    point: Callable[[Tensor, Slots], Tensor] | None = None
    decays: bool = False
    unlike: tuple[str, ...] = ()


def optimizer(name: str, rule: Rule, lr: Schedule | float, weight_decay: Decay | float = 0.0) -> Transform[Grads, Step]:
    """A transform from gradients to a Step that updates each parameter by ``rule``, with decoupled weight decay.

    ``p = p - lr · weight_decay · p - step``. As in PyTorch and OLMo-core, the decay is multiplied by the learning rate; a
    number stands for ``Decay(number)``.

    Every update gets the scalars ``lr``, ``count`` (updates done, this one included) and ``skip`` (0-d tensors), and those
    of the rule. A step whose loss or gradient norm is not finite is skipped: parameters and slots stay as they are, bit for
    bit. The metrics gain ``lr`` and ``skipped``. The slot ``name`` holds ``count`` and the rule's memory.
    """
    schedule = in_fp64(lr)
    decay = weight_decay if isinstance(weight_decay, Decay) else Decay(weight_decay)

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        p = _widen(p)
        step, slots = rule.update(p, g.to(p.dtype), {k: _widen(v) for k, v in slots.items()}, s)
        if rule.decays:
            return p - step, slots
        rate = s["lr"] * s["weight_decay"]
        kept = 1 - rate * (step.sign() * p.sign() >= 0) if decay.cautious else 1 - rate
        return p * kept - step, slots

    def leaf(path: str) -> Leaf:
        weight = 0.0 if matches(path, decay.no_decay) else decay.weight
        init = lambda p: rule.init(path, p)  # noqa: E731
        return Leaf(init, update, rule.elementwise, {"weight_decay": weight}, point=rule.point, unlike=rule.unlike)

    def init_control() -> Tree:
        memory = {k: torch.tensor(v, dtype=torch.float64) for k, v in rule.memory.items()}
        return {name: {"count": torch.zeros((), dtype=torch.int64), **memory}}

    def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
        finite = metrics["loss"].isfinite() & metrics["grad_norm"].isfinite()
        skip = ~finite if signals.skip is None else ~finite | signals.skip
        before = state.slots[name]
        rate = schedule(state.step + 1) * (1.0 if signals.lr_scale is None else signals.lr_scale)
        scalars = {**before, "count": before["count"] + 1, "lr": rate, "skip": skip}
        scalars |= rule.scalars(scalars)
        slot = {name: {k: torch.where(skip, old, scalars[k]) for k, old in before.items()}}
        return slot, scalars, {**metrics, "lr": scalars["lr"], "skipped": skip.float()}

    return Transform(f"{name}(...)", Grads, Step, lambda grads: Step(grads, init_control, control, leaf))


def check_betas(name: str, *betas: float) -> None:
    """ValueError unless all are decays, from 0 to below 1.

    >>> check_betas("adamw", 0.9, 1.0)
    Traceback (most recent call last):
    ValueError: adamw: 1.0 is no decay; it must be at least 0 and below 1
    """
    for beta in betas:
        if not 0 <= beta < 1:
            raise ValueError(f"{name}: {beta} is no decay; it must be at least 0 and below 1")


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
