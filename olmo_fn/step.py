"""The training step, composed: ``pipe(loss, grad(), clip(1.0), adamw(...), skip_spikes(), compile())``.

Three kinds flow through a pipe, and each transform says which it takes and gives:

    Loss   (params, batch) -> (sum of losses, metrics)
    Grads  (params, batch) -> (gradients, metrics)
    Step   (state, batch) -> (state, metrics)

A Step is one pure function, kept in three parts so that transforms can work on any of them: ``grads``; ``control``, which turns
metrics into the scalars of this step (learning rate, whether to skip); and ``leaf``, the update of one parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.grad import (
    EAGER,
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
from olmo_fn.order import FROZEN_TOO, LAWFUL_ORDER, PARTS_CLIPPED, SHARED_SLOT, check_order
from olmo_fn.tape import tape_gradients
from olmo_fn.tree import Tree

Scalars: TypeAlias = dict[str, Tensor]
Slots: TypeAlias = dict[str, Tensor]


class State(NamedTuple):
    """Everything that training remembers; nothing else exists.

    ``step`` () int64, counted from 0; ``params``; ``slots``: by name, either a tree with the parameters' paths, or some of
    them (``adamw_m``, ``muon_momentum``, ``ema``), or a small tree of its own (``skip_spikes``).
    """

    step: Tensor
    params: Tree
    slots: Tree


class Leaf(NamedTuple):
    """An optimizer of one parameter: a pair of pure functions.

    ``init(param) -> slots``; ``update(param, grad, slots, scalars) -> (param, slots)``. ``elementwise`` updates may
    see the parameter flattened, and have slots of its shape; all others see whole matrices, and their slots have any shape.
    ``scalars`` are this leaf's own, on top of the step's; of those it sees the ones without a group, and its ``group``'s.
    ``point(param, slots)`` is where the gradient is taken, if not at the parameter.
    """

    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Tensor, Slots, Scalars], tuple[Tensor, Slots]]
    elementwise: bool = True
    scalars: Mapping[str, float] = {}
    group: str = ""
    point: Callable[[Tensor, Slots], Tensor] | None = None


Control: TypeAlias = Callable[[State, Metrics], tuple[Tree, Scalars, Metrics]]


@dataclass(frozen=True)
class Step:
    """How training starts, ``init(params) -> state``, and how it moves, ``(state, batch) -> (state, metrics)``."""

    grads: Grads
    init_control: Callable[[], Tree] = field(repr=False)
    control: Control = field(repr=False)
    leaf: Callable[[str], Leaf] = field(repr=False)
    execution: Execution = EAGER

    def init(self, params: Tree) -> State:
        """The state before the first step. Its parameters are the ones given, not a copy, if they are contiguous and whole.

        Under `shard` whole parameters are cut; ``Sharded.init`` makes them in parts.
        """
        layout = self.execution.layout
        params = layout.adopt(params)
        slots: dict[str, dict[str, Tensor]] = {}
        for path, p in tree.items(layout.enter(params)):
            leaf = self.leaf(path)
            whole = p if leaf.elementwise else layout.whole(path, p)
            for name, value in leaf.init(whole).items():
                if value.shape == whole.shape:
                    value = layout.place(path, value if leaf.elementwise else layout.own(path, value))
                slots.setdefault(name, {})[path] = value
        control = self.init_control()
        if clash := slots.keys() & control.keys():
            raise ValueError(f"{min(clash)!r} is a slot of parameters and one of its own; rename one, such as {min(clash)}_m")
        shaped = {name: tree.unflatten(values) for name, values in slots.items()}
        device = next(p.device for _, p in tree.items(params))
        own = tree.map(lambda value: value.to(device), {"step": torch.tensor(0), "slots": control})
        return State(own["step"], params, {**own["slots"], **shaped})

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        layout = self.execution.layout
        inside = State(state.step, layout.enter(state.params), layout.enter(state.slots))
        grads, metrics = self.grads(self.point(inside), batch, self.execution)
        new, metrics = self.update(inside, grads, metrics)
        return State(new.step, layout.leave(new.params, state.params), layout.leave(new.slots, state.slots)), metrics

    @torch.no_grad()
    def point(self, state: State) -> Tree:
        """Where the gradient is taken: at the parameters, but for optimizers that say otherwise (schedule-free)."""
        leaves = {path: self.leaf(path) for path, _ in tree.items(state.params)}
        if all(leaf.point is None for leaf in leaves.values()):
            return state.params
        slots = {name: tree.flatten(slot) for name, slot in state.slots.items()}

        def at(path: str, p: Tensor) -> Tensor:
            find = leaves[path].point
            return p if find is None else find(p, {name: values[path] for name, values in slots.items() if path in values})

        return tree.map_with_path(at, state.params)

    def update(self, state: State, grads: Tree, metrics: Metrics) -> tuple[State, Metrics]:
        """The second half of a step: from gradients to the next state. Consumes ``grads``."""
        with torch.set_grad_enabled(self.execution.differentiable):
            return self._update(state, grads, metrics)

    def _update(self, state: State, grads: Tree, metrics: Metrics) -> tuple[State, Metrics]:
        if "grad_norm" not in metrics:
            metrics = {**metrics, "grad_norm": self.execution.layout.norm(grads)}
        control, scalars, metrics = self.control(state, metrics)
        before = {name: tree.flatten(slot) for name, slot in state.slots.items() if name not in control}
        params, flat = tree.flatten(state.params), tree.flatten(grads)
        grads.clear()  # so that each gradient is freed as soon as it is used
        packed: dict[Any, tuple[tuple[str, ...], Tensor]] = {}  # the leaves' scalars, by what they depend on
        waiting: dict[Any, list[Work]] = {}  # for as many alike as are updated in one call
        after: dict[str, dict[str, Tensor]] = {name: dict.fromkeys(values) for name, values in before.items()}  # type: ignore[misc]

        def finish(works: list[Work]) -> None:
            for work, (p, slots) in zip(works, self._update_leaves(works), strict=True):
                params[work.path] = p
                for name, value in slots.items():
                    after[name][work.path] = value

        for path, p in tree.items(state.params):
            if path not in flat:  # frozen
                continue
            leaf = self.leaf(path)
            key = leaf.group, *leaf.scalars.items(), p.dtype
            if key not in packed:
                packed[key] = pack_scalars(leaf, scalars, p.dtype)
            slots = {name: values[path] for name, values in before.items() if path in values}
            works = waiting.setdefault((leaf.update, key, p.numel()) if leaf.elementwise else path, [])
            works.append(Work(path, leaf, p, flat.pop(path), slots, *packed[key]))
            if len(works) == TOGETHER:
                finish(works)
                works.clear()
        for works in waiting.values():
            for work in works:
                finish([work])
        shaped = {name: tree.unflatten(values) for name, values in after.items()}
        return State(state.step + 1, tree.unflatten(params), {**control, **shaped}), metrics

    def _update_leaves(self, works: list[Work]) -> list[tuple[Tensor, Slots]]:
        """The new parameters and slots of leaves with one update, in one call."""
        first = works[0]
        run = self.execution.wrap_leaf(_guarded(first.leaf.update, self.execution.donate, first.names))
        if not first.leaf.elementwise:
            return [self._update_whole(first, run)]
        # flattened, so that one compiled function serves all shapes, and parts of them
        leaves = [(w.p.view(-1), w.g.reshape(-1), {k: v.view(-1) for k, v in w.slots.items()}) for w in works]
        return [
            (p.view(w.p.shape), {k: v.view(w.p.shape) for k, v in slots.items()})
            for w, (p, slots) in zip(works, run(leaves, first.numbers), strict=True)
        ]

    def _update_whole(self, work: Work, run: Function) -> tuple[Tensor, Slots]:
        """The update of a leaf that has to see all of it, on every rank that has a part."""
        layout, path = self.execution.layout, work.path
        whole = layout.whole(path, work.p)
        # what lies in parts is what was made in the whole's shape; a slot that never was cut may have a part's shape
        parts = {k for k, v in work.leaf.init(torch.empty_like(whole, device="meta")).items() if v.shape == whole.shape}
        slots = {k: layout.whole(path, v) if k in parts else v for k, v in work.slots.items()}
        ((p, new),) = run([(whole, layout.whole(path, work.g), slots)], work.numbers)
        return layout.own(path, p), {k: layout.own(path, v) if k in parts else v for k, v in new.items()}


TOGETHER = 8
"""Elementwise updates of equal size that share one call: as fast as memory, where single calls lose a tenth between them."""


class Work(NamedTuple):
    """The update of one leaf: what goes in."""

    path: str
    leaf: Leaf
    p: Tensor
    g: Tensor
    slots: Slots
    names: tuple[str, ...]
    numbers: Tensor


def pack_scalars(leaf: Leaf, scalars: Scalars, dtype: torch.dtype) -> tuple[tuple[str, ...], Tensor]:
    """Names and values of what the update of ``leaf`` sees, in the dtype that a parameter of ``dtype`` is computed in.

    One vector and not in fp64, so that calling a compiled update costs little, and converts nothing for every few entries.
    """
    wide, device = torch.promote_types(dtype, torch.float32), scalars["skip"].device
    own = {k: torch.tensor(v, dtype=wide, device=device) for k, v in leaf.scalars.items()}
    found = {**of_group(scalars, leaf.group), **own}
    return tuple(found), torch.stack([value.to(wide) for value in found.values()])


def of_group(scalars: Scalars, group: str) -> Scalars:
    """The scalars without a group, and those of ``group``, without its name.

    >>> of_group({"skip": 0, "matrix/lr": 1, "default/lr": 2}, "matrix")
    {'skip': 0, 'lr': 1}
    """
    shared = {name: value for name, value in scalars.items() if "/" not in name}
    own = {name.removeprefix(f"{group}/"): value for name, value in scalars.items() if name.startswith(f"{group}/")}
    return {**shared, **{name: value for name, value in own.items() if "/" not in name}}


@cache
def _guarded(update: Function, donate: bool, names: tuple[str, ...]) -> Function:
    """The updates of leaves, with what holds for every one; their scalars are given as one vector.

    A skipped step changes nothing, dtypes stay what they are, donation writes in place.
    """

    def guarded(p: Tensor, g: Tensor, slots: Slots, scalars: Scalars) -> tuple[Tensor, Slots]:
        new_p, new_slots = update(p, g, slots, scalars)
        new_p = torch.where(scalars["skip"], p, new_p.to(p.dtype))
        new_slots = {k: torch.where(scalars["skip"], slots[k], v.to(slots[k].dtype)) for k, v in new_slots.items()}
        if not donate:
            return new_p, new_slots
        return p.copy_(new_p), {k: slots[k].copy_(v) for k, v in new_slots.items()}

    def all_guarded(leaves: list[tuple[Tensor, Tensor, Slots]], numbers: Tensor) -> list[tuple[Tensor, Slots]]:
        scalars = dict(zip(names, numbers.unbind(), strict=True))
        scalars["skip"] = scalars["skip"] > 0
        return [guarded(*leaf, scalars) for leaf in leaves]

    return all_guarded


# --- pipe -------------------------------------------------------------------------------------------------------------


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

    >>> from olmo_fn.optim import sgd
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

    ``tape`` sweeps a `Chain` stage by stage (see `olmo_fn.grad`), with ``remat`` none, full, feed_forward or every-n; ``func``
    is ``torch.func.grad_and_value`` of any loss. ``dtype``: that of matrices and activations in the computation;
    parameters and gradients keep their own.
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
    """Scale the gradient so that its global norm is at most ``max_norm``; reports ``grad_norm`` from before."""

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
            grads, metrics = inner(params, batch, execution)
            norm = execution.layout.norm(grads)
            scale = (max_norm / norm).clamp(max=1.0)
            scaled = torch.mul if execution.differentiable else Tensor.mul_
            return tree.map(lambda g: scaled(g, scale), grads), {**metrics, "grad_norm": norm}

        return replace(inner, fn=gradients)

    return Transform(f"clip({max_norm})", Grads, Grads, apply)


# --- Step -> Step: these change the numbers ---------------------------------------------------------------------------


def skip_spikes(sigma: float = 6.0, window: int = 128) -> Transform:
    """Skip the update when loss or gradient norm is more than ``sigma`` standard deviations above its recent mean.

    OLMo-core's rule: mean and unbiased deviation of the last ``window`` steps, one-sided, active from half a window on.
    Unlike there, the history is part of the state, and values that are not finite never enter it.
    """
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
