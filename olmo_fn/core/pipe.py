"""The training step, composed: ``pipe(loss, grad(), clip(1.0), adamw(...), skip_spikes(), compile())``.

Three kinds flow through a pipe, and each transform says which it takes and gives:

    Loss   (params, batch) -> (sum of losses, metrics)
    Grads  (params, batch) -> (gradients, metrics)
    Step   (state, batch) -> (state, metrics)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import (
    Batch,
    Chain,
    Engine,
    Execution,
    Function,
    Grads,
    LossFunction,
    Metrics,
    func_gradients,
    loss_tokens,
)
from olmo_fn.core.order import FROZEN_TOO, LAWFUL_ORDER, PARTS_CLIPPED, SHARED_SLOT, check_order
from olmo_fn.core.step import Leaf, Scalars, Slots, State, Step
from olmo_fn.core.tape import tape_gradients
from olmo_fn.tree import Tree


class Loss(NamedTuple):
    """The first kind: ``(params, batch) -> (sum of losses, metrics)``. A `Chain` or a plain function becomes one."""

    fn: LossFunction


class Transform(NamedTuple):
    """One element of a `pipe`: what it is called, which kind it takes, which it gives, and what it does.

    ``not_after``: transforms, by the word before the bracket in their names, that it must not follow in a pipe, and why;
    ``needs``: one that has to be before it.
    """

    name: str
    takes: type
    gives: type
    apply: Callable[[Any], Any]
    not_after: Mapping[str, str] = {}
    needs: str = ""

    def __call__(self, x: Any) -> Any:
        if self.takes is Loss and callable(x) and not isinstance(x, (Loss, Grads, Step)):
            x = Loss(x)
        if not isinstance(x, self.takes):
            raise ValueError(
                f"{self.name} takes a {self.takes.__name__}, not a {type(x).__name__}; the order is {LAWFUL_ORDER}"
            )
        return self.apply(x)

    @property
    def word(self) -> str:
        """The name without its arguments."""
        return self.name.split("(")[0]


def pipe(loss: LossFunction, *transforms: Transform) -> Any:
    """Apply the transforms to the loss one after the other; a wrong order is refused here, before anything runs.

    >>> from olmo_fn.optim.sgd import sgd
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch["labels"]) ** 2).sum(), {}
    >>> step = pipe(loss, grad(engine="func"), clip(1.0), sgd(lr=0.25))
    >>> state = step.init({"w": torch.zeros(2)})
    >>> state, metrics = step(state, {"labels": torch.tensor([3, 4])})
    >>> state.params["w"]
    tensor([0.1500, 0.2000])
    >>> pipe(loss, clip(1.0))
    Traceback (most recent call last):
    ValueError: clip(1.0) takes a Grads, but it follows the loss, which is a Loss; put grad() before it ...
    >>> pipe(loss, grad(engine="func"), sgd(lr=0.25), clip(1.0))
    Traceback (most recent call last):
    ValueError: clip(1.0) takes a Grads, but it follows sgd(...), which is a Step; put it before sgd(...) ...
    """
    value: Any = loss if isinstance(loss, Loss) else Loss(loss)
    for i, transform in enumerate(transforms):
        check_order(transform, type(value).__name__, transforms[:i])
        value = transform.apply(value)
    return value


# --- Loss -> Grads ----------------------------------------------------------------------------------------------------


def grad(engine: Engine = "tape", remat: str = "none", dtype: torch.dtype = torch.float32) -> Transform:
    """Differentiate the loss; the gradient is of the mean over all loss tokens of the batch.

    ``tape`` sweeps a `Chain` stage by stage (`olmo_fn.core.tape`), with ``remat`` none, full, feed_forward or every-n; ``func``
    is ``torch.func.grad_and_value`` of any loss. ``dtype``: that of matrices and activations in the computation;
    parameters keep their own, and gradients are in at least fp32 (see `Grads`).
    """

    def apply(loss: Loss) -> Grads:
        if engine == "func":
            if remat != "none":
                raise ValueError(f"engine func keeps every activation; use engine tape for remat {remat!r}")
            return Grads(func_gradients(loss.fn, dtype))
        if not isinstance(loss.fn, Chain):
            raise ValueError("engine tape sweeps a Chain of stages, and this loss is a plain function; use grad(engine='func')")
        return Grads(tape_gradients(loss.fn, remat, dtype), loss.fn)

    return Transform(f"grad({engine!r})", Loss, Grads, apply)


# --- Grads -> Grads ---------------------------------------------------------------------------------------------------


def accumulate(n: int) -> Transform:
    """Split the batch in ``n`` parts along its first dim and add their gradients. Invisible, also with uneven masks."""

    if n < 1:
        raise ValueError(f"accumulate({n}): there must be at least one part")

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
            parts = split_batch(batch, n)
            total, metrics = inner(params, parts[0], execution)
            for part in parts[1:]:
                grads, more = inner(params, part, execution)
                total = tree.map(torch.add if execution.differentiable else Tensor.add_, total, grads)
                metrics = {name: value + more[name] for name, value in metrics.items()}
            return total, metrics

        return replace(inner, fn=gradients)

    return Transform(f"accumulate({n})", Grads, Grads, apply if n > 1 else lambda inner: inner, PARTS_CLIPPED)


def split_batch(batch: Batch, n: int) -> list[Batch]:
    """``n`` equal parts, each of which divides its loss by the tokens of the whole batch.

    >>> [part["loss_tokens"].item() for part in split_batch({"labels": torch.tensor([[1, 2], [3, -100]])}, 2)]
    [3, 3]
    """
    rows = len(batch["labels"])
    if rows % n:
        raise ValueError(f"accumulate({n}) cannot split a batch of {rows} sequences in equal parts")
    tokens = loss_tokens(batch)
    chunks = {name: value.chunk(n) for name, value in batch.items() if value.ndim}
    return [{**{k: v[i] for k, v in chunks.items()}, "loss_tokens": tokens} for i in range(n)]


def clip(max_norm: float) -> Transform:
    """Scale the gradient so that its global norm is at most ``max_norm``; reports ``grad_norm`` from before.

    The factor is left to the update that follows, which reads the gradients anyway.
    """
    if not max_norm > 0:
        raise ValueError(f"clip({max_norm}): the largest norm must be positive; leave clip out to clip nothing")

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
            grads, metrics = inner.fn(params, batch, execution)
            before = metrics.get("grad_scale", 1.0)
            norm = execution.layout.norm(grads) * before
            scale = (max_norm / norm).clamp(max=1.0) * before
            return grads, {**metrics, "grad_norm": norm, "grad_scale": scale}

        return replace(inner, fn=gradients)

    return Transform(f"clip({max_norm})", Grads, Grads, apply)


# --- Step -> Step: these change the numbers ---------------------------------------------------------------------------


def skip_spikes(sigma: float = 6.0, window: int = 128) -> Transform:
    """Skip the update when loss or gradient norm is more than ``sigma`` standard deviations above its recent mean.

    OLMo-core's rule: mean and unbiased deviation of the last ``window`` steps, one-sided, active from half a window on.
    Unlike there, the history is part of the state, and values that are not finite never enter it.
    """
    if not sigma > 0 or window < 2:
        raise ValueError(f"skip_spikes({sigma}, window={window}): sigma must be positive, and the window at least 2 steps")
    name = "skip_spikes"

    def apply(inner: Step) -> Step:
        def init_control() -> Tree:
            history = torch.zeros(2, window, dtype=torch.float64)
            return {**inner.init_control(), name: {"history": history, "count": torch.zeros((), dtype=torch.int64)}}

        def control(state: State, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            history, count = state.slots[name]["history"], state.slots[name]["count"]
            now = torch.stack([metrics.get("ce", metrics["loss"]), metrics["grad_norm"]]).to(history)
            known = torch.arange(window, device=history.device) >= window - count  # newest last
            n = count.clamp(min=1)
            mean = (history * known).sum(1) / n
            variance = ((history - mean[:, None]).square() * known).sum(1) / (n - 1).clamp(min=1)
            spike = ((now - mean > sigma * variance.sqrt()).any()) & (count + 1 >= max(3, window // 2))
            finite = now.isfinite().all()
            pushed = torch.cat((history[:, 1:], now[:, None]), dim=1)
            slot = {
                "history": torch.where(finite, pushed, history),
                "count": torch.where(finite, (count + 1).clamp(max=window), count),
            }
            control, scalars, metrics = inner.control(state, {**metrics, "skip": metrics.get("skip", False) | spike})
            return {**control, name: slot}, scalars, metrics

        return replace(inner, init_control=init_control, control=control)

    return Transform(f"skip_spikes({sigma}, window={window})", Step, Step, apply, {name: SHARED_SLOT})


def ema(decay: float) -> Transform:
    """Keep ``ema = decay · ema + (1 - decay) · params`` in the slot ``ema``; it starts at the initial parameters."""
    if not 0 <= decay <= 1:
        raise ValueError(f"ema({decay}): the decay must be from 0 to 1")

    def apply(inner: Step) -> Step:
        @cache
        def averaged(leaf_update: Function) -> Function:
            def update(p: Tensor, g: Tensor, slots: Slots, scalars: Scalars) -> tuple[Tensor, Slots]:
                average = slots["ema"]
                new_p, new = leaf_update(p, g, {k: v for k, v in slots.items() if k != "ema"}, scalars)
                return new_p, {**new, "ema": average + (1 - decay) * (new_p - average)}

            return update

        def leaf(path: str) -> Leaf:
            plain = inner.leaf(path)
            init = lambda p: {**plain.init(p), "ema": p.clone()}  # noqa: E731
            return plain._replace(init=init, update=averaged(plain.update))

        return replace(inner, leaf=leaf)

    return Transform(f"ema({decay})", Step, Step, apply, {**FROZEN_TOO, "ema": SHARED_SLOT})


# --- Step -> Step: these are invisible in the numbers -----------------------------------------------------------------


def donate() -> Transform:
    """Let each step write into the memory of the state that it replaces: the old state must not be used again."""
    return Transform("donate()", Step, Step, partial(_execute, donate=True))


def differentiable() -> Transform:
    """Let derivatives flow through the step, from the next state to the state before it: nothing is overwritten or detached.

    For ``torch.func.grad`` through steps (`olmo_fn.research.hypergradient`); engine func only.
    """
    return Transform("differentiable()", Step, Step, partial(_execute, differentiable=True))


def _execute(step: Step, **changes: Any) -> Step:
    execution = replace(step.execution, **changes)
    if execution.donate and execution.differentiable:
        raise ValueError("donate() overwrites what differentiable() must keep; leave one of them out")
    return replace(step, execution=execution)
