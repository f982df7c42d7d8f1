"""The training step, composed: ``pipe(loss, grad(), clip(1.0), adamw(...), skip_spikes(), compile())``.

Three kinds flow through a pipe, and each transform says which it takes and gives:

    Loss   (params, batch) -> (sum of losses, metrics)
    Grads  (params, batch) -> (gradients, metrics)
    Step   (state, batch) -> (state, metrics)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Generic, TypeVar, overload

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Chain, LossFunction, Metrics, add_metrics, loss_tokens
from olmo_fn.core.gradients import ENGINES, Engine, Execution, Gradients, Grads, Signals, func_gradients
from olmo_fn.core.offload import HostStash
from olmo_fn.core.step import Leaf, Scalars, Slots, State, Step
from olmo_fn.core.tape import tape_gradients
from olmo_fn.kernels import Function
from olmo_fn.tree import Tree


@dataclass(frozen=True)
class Loss:
    """The first kind: ``(params, batch) -> (sum of losses, metrics)``. A `Chain` or a plain function becomes one."""

    fn: LossFunction
    names: tuple[str, ...] = ()


A = TypeVar("A", Loss, Grads, Step)
B = TypeVar("B", Loss, Grads, Step)
C = TypeVar("C", Loss, Grads, Step)
D = TypeVar("D", Loss, Grads, Step)
E = TypeVar("E", Loss, Grads, Step)
F = TypeVar("F", Loss, Grads, Step)


@dataclass(frozen=True)
class Transform(Generic[A, B]):
    """One element of a `pipe`: what it is called, which kind it takes, which it gives, and what it does.

    ``tags`` say what it does that matters to others; ``not_after``: the tags of transforms that it must not follow, and why;
    ``needs``: a tag that one before it must have.
    """

    name: str
    takes: type[A]
    gives: type[B]
    apply: Callable[[A], B]
    tags: frozenset[str] = frozenset()
    not_after: Mapping[str, str] | None = None
    needs: str = ""

    def __call__(self, x: Any) -> B:
        if self.takes is Loss and callable(x) and not isinstance(x, (Loss, Grads, Step)):
            x = Loss(x)
        if not isinstance(x, self.takes):
            raise ValueError(
                f"{self.name} takes a {self.takes.__name__}, not a {type(x).__name__}; the order is {LAWFUL_ORDER}"
            )
        return replace(self.apply(x), names=(*x.names, self.name))


def slot(name: str) -> dict[str, Any]:
    """Tag and rule of a transform that keeps something in the slot ``name``: no other may."""
    return {"tags": frozenset({f"slot {name}"}), "not_after": {f"slot {name}": "would share its slot"}}


@overload
def pipe(loss: LossFunction, a: Transform[Loss, A], /) -> A: ...
@overload
def pipe(loss: LossFunction, a: Transform[Loss, A], b: Transform[A, B], /) -> B: ...
@overload
def pipe(loss: LossFunction, a: Transform[Loss, A], b: Transform[A, B], c: Transform[B, C], /) -> C: ...
@overload
def pipe(loss: LossFunction, a: Transform[Loss, A], b: Transform[A, B], c: Transform[B, C], d: Transform[C, D], /) -> D: ...
@overload
def pipe(
    loss: LossFunction, a: Transform[Loss, A], b: Transform[A, B], c: Transform[B, C], d: Transform[C, D], e: Transform[D, E], /
) -> E: ...
@overload
def pipe(
    loss: LossFunction,
    a: Transform[Loss, A],
    b: Transform[A, B],
    c: Transform[B, C],
    d: Transform[C, D],
    e: Transform[D, E],
    f: Transform[E, F],
    /,
    *more: Transform[F, F],
) -> F: ...
def pipe(loss: LossFunction, *transforms: Transform[Any, Any]) -> Any:
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
    if (not callable(loss) and not isinstance(loss, Loss)) or isinstance(loss, (Transform, Grads, Step)):
        what = loss.name if isinstance(loss, Transform) else f"a {type(loss).__name__}"
        raise ValueError(
            f"the first argument of a pipe is the loss, (params, batch) -> (sum, metrics), and this one is {what}; "
            "begin with a loss such as transformer.loss(model)"
        )
    value: Any = loss if isinstance(loss, Loss) else Loss(loss)
    for i, transform in enumerate(transforms):
        if not isinstance(transform, Transform):
            name = getattr(transform, "__name__", None)
            raise ValueError(f"{name or transform!r} is no transform" + (f"; call it: {name}(...)" if name else ""))
        kind = next(kind.__name__ for kind in (Loss, Grads, Step) if isinstance(value, kind))
        check_order(transform, kind, transforms[:i])
        value = transform(value)
    return value


# --- what may follow what ---------------------------------------------------------------------------------------------

LAWFUL_ORDER = "a loss, then grad(), then accumulate and clip, then an optimizer, then everything else"
KINDS = ("Loss", "Grads", "Step")
MISSING = {"Grads": "grad()", "Step": "an optimizer such as adamw(1e-3)"}
"""What gives each kind."""
CLIPS, NOISES, FREEZES, AVERAGES, QUANTISES = "clips", "noises", "freezes", "averages", "quantises"
"""Tags: scales gradients down; adds noise to them; leaves parameters as they are; keeps a mean of weights; quantises them."""


def check_order(transform: Transform[Any, Any], kind: str, before: Sequence[Transform[Any, Any]]) -> None:
    """ValueError with the fix if ``transform`` must not follow those ``before`` it, which give a ``kind``."""
    name, takes = transform.name, transform.takes.__name__
    if kind != takes:
        last = before[-1].name if before else "the loss"
        raise ValueError(
            f"{name} takes a {takes}, but it follows {last}, which is a {kind}; {_fix(transform, kind, before)} "
            f"(the order is {LAWFUL_ORDER})"
        )
    if transform.needs and not any(transform.needs in other.tags for other in before):
        raise ValueError(f"{name} needs {transform.needs}, which is nowhere before it in the pipe; add it")
    for other in before:
        for tag, why in (transform.not_after or {}).items():
            if tag in other.tags:
                fix = "leave out one of them" if tag in transform.tags else f"put {name} before {other.name}"
                raise ValueError(f"{name} after {other.name} {why}; {fix}")


def _fix(transform: Transform[Any, Any], kind: str, before: Sequence[Transform[Any, Any]]) -> str:
    """How to bring a transform to where the kind is that it takes."""
    at, wanted = KINDS.index(kind), KINDS.index(transform.takes.__name__)
    if at < wanted:
        return f"put {' and '.join(MISSING[kind] for kind in KINDS[at + 1 : wanted + 1])} before it"
    first = next(other for other in before if KINDS.index(other.gives.__name__) > wanted)
    if transform.gives is not first.gives:
        return f"put it before {first.name}"
    return "leave out one of the two" + (", or join them with partition" if transform.gives.__name__ == "Step" else "")


# --- Loss -> Grads ----------------------------------------------------------------------------------------------------


DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def grad(engine: Engine = "tape", remat: str = "none", dtype: torch.dtype = torch.float32) -> Transform[Loss, Grads]:
    """Differentiate the loss; the gradient is of the mean over all loss tokens of the batch.

    ``tape`` sweeps a `Chain` stage by stage (`olmo_fn.core.tape`), with ``remat`` none, selective, feed_forward, full or
    every-n (`olmo_fn.core.tape.remat_policy`); ``func`` is ``torch.func.grad_and_value`` of any loss. ``dtype``: that of
    matrices and activations in the computation; parameters keep their own, and gradients are in at least fp32 (see `Grads`).
    """

    if engine not in ENGINES:
        raise ValueError(f"grad({engine!r}): engines are {' and '.join(ENGINES)}")
    if dtype not in DTYPES:
        why = "gradients underflow in float16 without a scaler of the loss" if dtype == torch.float16 else "no such step"
        raise ValueError(f"grad(dtype={dtype}): {why}; use {', '.join(map(str, DTYPES))}")

    def apply(loss: Loss) -> Grads:
        if engine == "func":
            if remat != "none":
                raise ValueError(f"engine func keeps every activation; use engine tape for remat {remat!r}")
            return Grads(func_gradients(loss.fn, dtype), loss.fn if isinstance(loss.fn, Chain) else None)
        if not isinstance(loss.fn, Chain):
            raise ValueError("engine tape sweeps a Chain of stages, and this loss is a plain function; use grad(engine='func')")
        return Grads(tape_gradients(loss.fn, remat, dtype), loss.fn)

    return Transform(f"grad({engine!r})", Loss, Grads, apply, frozenset({RERUNS} if remat != "none" else ()))


# --- Grads -> Grads ---------------------------------------------------------------------------------------------------


def accumulate(n: int) -> Transform[Grads, Grads]:
    """Split the batch in ``n`` parts along its first dim and add their gradients. Invisible, also with uneven masks."""

    if n < 1:
        raise ValueError(f"accumulate({n}): there must be at least one part")

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            first, *others = split_batch(batch, n)
            total, metrics, signals = inner.fn(params, first, execution).finished(execution)
            for part in others:
                found = inner.fn(params, part, execution)  # added as they are: a widened copy would double their memory
                grads, more, told = found if found.signals.scale is None else found.finished(execution)
                signals = signals if told.skip is None else signals.skipping(told.skip)
                total = tree.map(torch.add if execution.differentiable else Tensor.add_, total, grads)
                metrics = add_metrics(metrics, more, inner.declared)
            return Gradients(total, metrics, signals)

        return replace(inner, fn=gradients)

    return Transform(f"accumulate({n})", Grads, Grads, apply if n > 1 else lambda inner: inner, not_after=PARTS_CLIPPED)


PARTS_CLIPPED = {
    CLIPS: "would clip every part of the batch by itself",
    NOISES: "would add the same noise with every part of the batch",
}
"""What accumulation must not follow."""


def split_batch(batch: Batch, n: int) -> list[Batch]:
    """``n`` equal parts, each of which divides its loss by the tokens of the whole batch.

    >>> [part["loss_tokens"].item() for part in split_batch({"labels": torch.tensor([[1, 2], [3, -100]])}, 2)]
    [3, 3]
    """
    tokens, rows = loss_tokens(batch), len(batch["labels"])
    if rows % n:
        raise ValueError(f"accumulate({n}) cannot split a batch of {rows} sequences in equal parts")
    chunks = {name: value.chunk(n) for name, value in batch.items() if value.ndim}
    return [{**{k: v[i] for k, v in chunks.items()}, "loss_tokens": tokens} for i in range(n)]


def clip(max_norm: float) -> Transform[Grads, Grads]:
    """Scale the gradient so that its global norm is at most ``max_norm``; reports ``grad_norm`` from before.

    The factor is left to the update that follows, which reads the gradients anyway.
    """
    if not max_norm > 0:
        raise ValueError(f"clip({max_norm}): the largest norm must be positive; leave clip out to clip nothing")

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            grads, metrics, signals = inner.fn(params, batch, execution)
            before = 1.0 if signals.scale is None else signals.scale
            norm = execution.layout.sharing.norm(grads) * before
            scale = (max_norm / norm).clamp(max=1.0) * before
            return Gradients(grads, {**metrics, "grad_norm": norm}, signals._replace(scale=scale))

        return replace(inner, fn=gradients)

    return Transform(f"clip({max_norm})", Grads, Grads, apply, frozenset({CLIPS}))


# --- Step -> Step: these change the numbers ---------------------------------------------------------------------------


def skip_spikes(sigma: float = 6.0, window: int = 128) -> Transform[Step, Step]:
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

        def control(state: State, signals: Signals, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            history, count = state.slots[name]["history"], state.slots[name]["count"]
            now = torch.stack([metrics.get("ce", metrics["loss"]), metrics["grad_norm"]]).to(history)
            known = torch.arange(window, device=history.device) >= window - count  # newest last
            n = count.clamp(min=1)
            mean = (history * known).sum(1) / n
            variance = ((history - mean[:, None]).square() * known).sum(1) / (n - 1).clamp(min=1)
            spike = ((now - mean > sigma * variance.sqrt()).any()) & (count + 1 >= max(3, window // 2))
            finite = now.isfinite().all()
            pushed = torch.cat((history[:, 1:], now[:, None]), dim=1)
            new = {
                "history": torch.where(finite, pushed, history),
                "count": torch.where(finite, (count + 1).clamp(max=window), count),
            }
            control, scalars, metrics = inner.control(state, signals.skipping(spike), metrics)
            return {**control, name: new}, scalars, metrics

        return replace(inner, init_control=init_control, control=control)

    return Transform(f"skip_spikes({sigma}, window={window})", Step, Step, apply, **slot(name))


def ema(decay: float) -> Transform[Step, Step]:
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

    return Transform(f"ema({decay})", Step, Step, apply, **averaging("ema"))


def averaging(name: str) -> dict[str, Any]:
    """Tags and rules of a transform that keeps a mean of the weights in the slot ``name``."""
    rules = slot(name)
    frozen_too = {FREEZES: "would keep averages of parameters that do not move"}
    return {"tags": rules["tags"] | {AVERAGES}, "not_after": {**frozen_too, **rules["not_after"]}}


# --- Step -> Step: these are invisible in the numbers -----------------------------------------------------------------


RERUNS = "a grad() with remat"
"""Tag: keeps of some segments only what they begin with."""


def offload() -> Transform[Step, Step]:
    """Keep in host memory what rematerialised blocks keep for the backward sweep: their inputs, and results of attention.

    Copied beside the computation; a block's come back while the one after it is differentiated. Invisible.
    """
    return Transform("offload()", Step, Step, partial(with_execution, stash=HostStash), needs=RERUNS)


def donate() -> Transform[Step, Step]:
    """Let each step write into the memory of the state that it replaces: the old state must not be used again."""
    return Transform("donate()", Step, Step, partial(with_execution, donate=True))


def differentiable() -> Transform[Step, Step]:
    """Let derivatives flow through the step, from the next state to the state before it: nothing is overwritten or detached.

    For ``torch.func.grad`` through steps (`olmo_fn.research.hypergradient`); engine func only.
    """
    return Transform("differentiable()", Step, Step, partial(with_execution, differentiable=True))


def with_execution(step: Step, **changes: Any) -> Step:
    """The step carried out otherwise (fields of `Execution`): what invisible transforms are made of."""
    execution = replace(step.execution, **changes)
    if execution.donate and execution.differentiable:
        raise ValueError("donate() overwrites what differentiable() must keep; leave one of them out")
    return replace(step, execution=execution)
