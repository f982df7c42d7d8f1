"""The tape engine: a chain swept segment by segment, forward keeping one pullback each, backward in reverse.

A *segment* is what is rematerialised, and brought into use, as one: a block, or a part of it. Autograd runs on detached
leaves inside each stage, which is what compiles right on torch 2.13 (a compiled ``torch.func.grad`` can drop the backward of a
custom function).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import (
    Batch,
    Carry,
    Chain,
    Context,
    Execution,
    Function,
    GradFunction,
    Metrics,
    Stage,
    Sweep,
    loss_tokens,
    per_token,
)
from olmo_fn.core.layout import Weights, compute_copies, wide
from olmo_fn.tree import Tree

SegmentPullback: TypeAlias = Callable[[Any], tuple[Callable[[], dict[str, Tree]], Any]]


class Segment(NamedTuple):
    """Neighbouring stages that share one fate; ``again``: keep only the input and run forward twice."""

    stages: tuple[Stage, ...]
    again: bool = False

    @property
    def params(self) -> tuple[str, ...]:
        """Paths of the subtrees that its stages use."""
        return tuple(dict.fromkeys(path for stage in self.stages for path in stage.params))

    @property
    def stored(self) -> frozenset[str]:
        """Of these, the subtrees that all of their stages take as they are stored."""
        cast = {path for stage in self.stages if not stage.stored for path in stage.params}
        return frozenset(self.params) - cast


def remat_policy(remat: str) -> Callable[[Stage], bool]:
    """Which stages keep only their input and run forward again in the backward sweep.

    ``none``; ``full``: every block; ``every-n``: every n-th block, such as ``every-2``; ``feed_forward``: the
    feed-forward half of every block. Stages outside the blocks (embedding, head) are never rerun.

    >>> remat_policy("every-2")(Stage("attend", (), print, block=2))
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


@cache
def segments(stages: tuple[Stage, ...], remat: str = "none") -> tuple[Segment, ...]:
    """Cut a chain where the block, or whether to rematerialise, changes; inside a segment join what one function can do."""
    again = remat_policy(remat)
    alike = groupby(stages, key=lambda stage: (stage.block, again(stage)))
    return tuple(Segment(_join(tuple(group)), key[1]) for key, group in alike)


def _join(stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
    """Make one stage of neighbours without a pullback of their own: fewer calls, more for a compiler to fuse."""
    joined: list[Stage] = []
    for stage in stages:
        last = joined[-1] if joined else None
        alike = last is not None and (last.vjp, last.compiled, last.stored) == (stage.vjp, stage.compiled, stage.stored)
        if last is not None and alike and stage.vjp is None:
            both = _compose(last.fn, len(last.params), stage.fn)
            joined[-1] = last._replace(name=f"{last.name}+{stage.name}", params=last.params + stage.params, fn=both)
        else:
            joined.append(stage)
    return tuple(joined)


@cache
def _compose(first: Function, n: int, second: Function) -> Function:
    """``second`` after ``first``, which takes the first ``n`` subtrees; cached, so that alike blocks share one function."""

    def both(*args: Any) -> Any:
        *params, carry, context = args
        return second(*params[n:], first(*params[:n], carry, context), context)

    return both


# --- the sweep --------------------------------------------------------------------------------------------------------


def tape_gradients(chain: Chain, remat: str, dtype: torch.dtype) -> GradFunction:
    """Gradients of a chain's loss per token by one sweep forward and one backward."""
    remat_policy(remat)  # refuses an unknown one now

    def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
        if execution.differentiable or torch._C._are_functorch_transforms_active():
            raise ValueError("engine tape cannot be inside vmap, jvp or another derivative; use grad(engine='func')")
        layout = execution.layout
        flat, sums = layout.sweep(ALONE).gradients(chain, remat, params, batch, replace(execution, dtype=dtype))
        grads = tree.unflatten((path, flat[path]) for path, _ in tree.items(params) if path in flat)
        return grads, per_token(layout.total(sums), loss_tokens(batch))

    return gradients


def loss_sums(chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """The sums over all tokens of the loss and its metrics, forward only, by the functions that training has compiled."""
    layout = execution.layout
    return layout.total(layout.sweep(ALONE).sums(chain, params, batch, execution))


def there_and_back(
    chain: Chain, remat: str, params: Tree, batch: Batch, execution: Execution
) -> tuple[dict[str, Tensor], Metrics]:
    """`Sweep.gradients`. While a segment computes, the next one's weights are on their way, and the last one's gradients."""
    layout = execution.layout
    ours = layout.chain(chain)
    parts, cotangent = segments(ours.stages, remat), of_mean(loss_tokens(batch), execution.dtype)
    context = {**ours.context(layout.part(batch)), "cotangent": cotangent}
    held: list[tuple[Weights, SegmentPullback]] = []
    carry: Carry = None
    ahead = fetch(params, parts[0], execution)
    for i, segment in enumerate(parts):
        weights = ahead
        weights.ready()
        if i + 1 < len(parts):
            ahead = fetch(params, parts[i + 1], execution)
        carry, pullback = pull(segment, weights, carry, context, execution)
        if i + 1 < len(parts):  # the last one's are needed again at once
            weights.free()
        held.append((weights, pullback))
    del weights, ahead, pullback  # or the last segment's would live until the end
    total, metrics = carry
    found: dict[str, Tensor] = {}
    arriving: Callable[[], dict[str, Tensor]] = dict
    while held:
        weights, pullback = held.pop()
        weights.ready()
        if held:
            held[-1][0].again()
        grads, cotangent = pullback(cotangent)
        del pullback
        flat = flatten(grads(), execution)
        del grads
        weights.free()
        leaving = layout.reduce(flat)
        del flat
        _add(found, arriving())
        arriving = leaving
    _add(found, arriving())
    return layout.finish(found), {"loss": total.detach(), **metrics}


def there(chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """`Sweep.sums`."""
    ours, carry = execution.layout.chain(chain), None
    context = ours.context(execution.layout.part(batch))
    for segment in segments(ours.stages):
        carry = run(segment, fetch(params, segment, execution), carry, context, execution)
    assert carry is not None
    total, metrics = carry
    return {"loss": total, **metrics}


ALONE = Sweep(there_and_back, there)


def of_mean(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The cotangent of the summed loss, so that the gradient is that of the mean: 1 / ``tokens``, in at least fp32."""
    return 1.0 / tokens.to(torch.promote_types(dtype, torch.float32))


def fetch(params: Tree, segment: Segment, execution: Execution) -> Weights:
    """Begin to bring the weights of a segment into use."""
    return execution.layout.fetch(params, segment.params, execution.dtype, segment.stored)


def flatten(grads: dict[str, Tree], execution: Execution) -> dict[str, Tensor]:
    """The gradients that are asked for, by path."""
    flat = {name: g for path, subtree in grads.items() for name, g in tree.items(subtree, path)}
    return {name: g for name, g in flat.items() if execution.wants(name)}


def _add(found: dict[str, Tensor], more: dict[str, Tensor]) -> None:
    """Tied weights have gradients from two segments."""
    for path, g in more.items():
        found[path] = wide(found[path]) + g if path in found else g


def pull(
    segment: Segment, weights: Weights, carry: Carry, context: Context, execution: Execution, late: bool = False
) -> tuple[Carry, SegmentPullback]:
    """Run a segment; return its carry and its pullback.

    The pullback takes the cotangent of the carry to that of the incoming carry, and to a function for those of the weights (in
    the compute dtype); with ``late`` that function has the work still to do.
    """

    def forward() -> tuple[Carry, list[tuple[Stage, Callable[[Any], tuple[Any, Any]]]]]:
        x, pullbacks, tensors = carry, [], weights.ready()
        for stage in segment.stages:
            x, pullback = pull_stage(stage, tuple(tensors[path] for path in stage.params), x, context, execution)
            pullbacks.append((stage, pullback))
        return x, pullbacks

    def backward(pullbacks: list[Any], cotangent: Any) -> tuple[Callable[[], dict[str, Tree]], Any]:
        found: list[tuple[Stage, Any]] = []
        while pullbacks:
            stage, pullback = pullbacks.pop()
            grads, cotangent = pullback(cotangent)
            if wanted(stage):  # or else the products for frozen weights are never computed
                found.append((stage, grads() if callable(grads) and not late else grads))
        return lambda: _by_path(found), cotangent

    def wanted(stage: Stage) -> bool:
        tensors = weights.ready()
        return any(execution.wants(name) for path in stage.params for name, _ in tree.items(tensors[path], path))

    if segment.again:
        out, _ = forward()
        return out, lambda cotangent: backward(forward()[1], cotangent)
    out, pullbacks = forward()
    return out, lambda cotangent: backward(pullbacks, cotangent)


def run(segment: Segment, weights: Weights, carry: Carry, context: Context, execution: Execution, rows: int = 1024) -> Carry:
    """Run a segment forward only, by the functions that training has compiled; a loss ``rows`` positions at a time."""
    tensors = weights.ready()
    for stage in segment.stages:
        params = tuple(tensors[path] for path in stage.params)
        if stage.rowwise:
            carry = _loss_by_rows(stage, params, carry, context, rows)
        else:
            carry, _ = pull_stage(stage, params, carry, context, execution)
    return carry


@torch.no_grad()
def _loss_by_rows(stage: Stage, params: tuple[Tree, ...], x: Tensor, context: Context, rows: int) -> tuple[Tensor, Metrics]:
    total: dict[str, Tensor] = {}
    params = tuple(compute_copies(p, x.dtype) for p in params)  # once, if they came as they are stored
    for part, labels in zip(x.flatten(0, -2).split(rows), context["labels"].flatten().split(rows), strict=True):
        loss, metrics = stage.fn(*params, part, {**context, "labels": labels})
        for name, value in {"loss": loss, **metrics}.items():
            total[name] = total[name] + value if name in total else value
    return total.pop("loss"), total


def _by_path(found: list[tuple[Stage, Any]]) -> dict[str, Tree]:
    """Gradients of a segment's stages, added up where two stages share a subtree."""
    total: dict[str, Tree] = {}
    while found:
        stage, grads = found.pop(0)
        for path, g in zip(stage.params, grads() if callable(grads) else grads, strict=True):
            total[path] = tree.map(torch.add, total[path], g) if path in total else g
    return total


def pull_stage(
    stage: Stage, params: tuple[Tree, ...], carry: Carry, context: Context, execution: Execution
) -> tuple[Carry, Callable[[Any], tuple[Any, Any]]]:
    """Run one stage; return its carry with its pullback, which may leave gradients of weights to be computed later."""
    if stage.vjp is not None:
        with torch.no_grad():
            out, given = stage.vjp(*params, carry, context, execution.wrap_leaf)
            return _cast(stage, out, execution.dtype), given
    fn = execution.wrap(stage.fn) if stage.compiled else stage.fn
    with torch.enable_grad():
        leaves = tuple(tree.map(_leaf, p) for p in params)
        x = _leaves(carry)
        out = fn(*leaves, x, context)
        out = _cast(stage, out, execution.dtype)
    inputs = [*(leaf for p in leaves for _, leaf in tree.items(p)), *_tensors(x)]

    def pullback(cotangent: Any) -> tuple[tuple[Tree, ...], Any]:
        roots = _tensors(out)
        found = torch.autograd.grad(roots, inputs, [c.to(r.dtype) for c, r in zip(_tensors(cotangent), roots, strict=True)])
        values: Iterator[Tensor] = iter(found)
        grads = tuple(tree.map(lambda _: next(values), p) for p in leaves)
        rest = tuple(values)
        return grads, rest if isinstance(x, tuple) else (rest[0] if rest else None)

    return _detach(out), pullback


def _cast(stage: Stage, out: Carry, dtype: torch.dtype) -> Carry:
    return out.to(dtype) if stage.stored and isinstance(out, Tensor) else out


def _leaf(p: Tensor) -> Tensor:
    return p.detach().requires_grad_()


def _leaves(carry: Carry) -> Carry:
    return None if carry is None else tuple(map(_leaf, carry)) if isinstance(carry, tuple) else _leaf(carry)


def _tensors(carry: Carry) -> tuple[Tensor, ...]:
    """The differentiable part of a carry or cotangent: a loss comes with metrics, which are not."""
    parts = carry if isinstance(carry, tuple) else () if carry is None else (carry,)
    return tuple(part for part in parts if isinstance(part, Tensor))


def _detach(out: Carry) -> Carry:
    return tuple(p.detach() if isinstance(p, Tensor) else p for p in out) if isinstance(out, tuple) else out.detach()
