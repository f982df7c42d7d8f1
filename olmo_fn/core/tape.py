"""The tape engine: a chain swept segment by segment, forward keeping one pullback each, backward in reverse.

A *segment* is what is rematerialised, and brought into use, as one: a block, or a part of it. Autograd runs on detached
leaves inside each segment, around compiled pieces, which is right on torch 2.13 (a compiled ``torch.func.grad`` can drop the
backward of a custom function).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from olmo_fn import tree
from olmo_fn.core.chain import Aux, Batch, Chain, Metrics, Stage, Sums, loss_tokens, per_token, wide
from olmo_fn.core.gradients import Execution, GradFunction, Gradients, in_order
from olmo_fn.core.layout import Reduction, Sweep, Weights
from olmo_fn.core.offload import Stash, stay
from olmo_fn.core.primitive import Once
from olmo_fn.kernels.float8 import Float8, Quantise
from olmo_fn.tree import Tree

LateGrads: TypeAlias = Callable[[], dict[str, Tensor]]
SegmentPullback: TypeAlias = Callable[[Any], tuple[LateGrads, Any]]


class Segment(NamedTuple):
    """Neighbouring stages that share one fate; ``again``: keep only the input and run forward twice, with ``once`` but for the
    costly primitives, whose results are kept too.
    """

    stages: tuple[Stage, ...]
    again: bool = False
    once: bool = False

    @property
    def paths(self) -> tuple[str, ...]:
        """Paths of the subtrees that its stages use."""
        return tuple(dict.fromkeys(path for stage in self.stages for path in stage.paths))


def remat_policy(remat: str) -> Callable[[Stage], bool]:
    """Which stages keep only their input and run forward again in the backward sweep.

    ``none``; ``full``: every block; ``selective``: every block, but what attention gave is kept, and it runs once; ``every-n``:
    every n-th block, such as ``every-2``; ``feed_forward``: the feed-forward half of every block. Stages outside the blocks
    (embedding, head) are never rerun.

    >>> remat_policy("every-2")(Stage("attention", (), print, block=2))
    True
    """
    if remat == "none":
        return lambda stage: False
    if remat in ("full", "selective"):
        return lambda stage: stage.block is not None
    if remat == "feed_forward":
        return lambda stage: stage.name == "feed_forward"
    kind, _, n = remat.partition("-")
    if kind == "every" and n.isdecimal() and int(n) > 0:
        return lambda stage: stage.block is not None and stage.block % int(n) == 0
    raise ValueError(f"remat {remat!r} is unknown; use none, selective, feed_forward, full, or every-2, every-3, …")


def segments(stages: tuple[Stage, ...], remat: str = "none") -> tuple[Segment, ...]:
    """Cut a chain where the block, or whether to rematerialise, changes."""
    again = remat_policy(remat)
    alike = groupby(stages, key=lambda stage: (stage.block, again(stage)))
    return tuple(Segment(tuple(group), key[1], remat == "selective") for key, group in alike)


# --- the sweep --------------------------------------------------------------------------------------------------------


def tape_gradients(chain: Chain, remat: str, dtype: torch.dtype) -> GradFunction:
    """Gradients of a chain's loss per token by one sweep forward and one backward."""
    segments(chain.stages, remat)  # refuses an unknown policy now

    def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
        if execution.differentiable or torch._C._are_functorch_transforms_active():
            raise ValueError("engine tape cannot be inside vmap, jvp or another derivative; use grad(engine='func')")
        sharing, sweep = execution.layout.sharing, execution.layout.sweep or LOCAL_SWEEP
        chain.check(sharing.axes, sharing.cp_method)
        flat, sums = sweep.gradients(chain, remat, params, batch, replace(execution, dtype=dtype))
        metrics = per_token(sharing.total(sums, chain.metrics), loss_tokens(batch), chain.metrics)
        return in_order(params, flat, metrics)

    return gradients


def loss_sums(chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """The sums over all tokens of the loss and its metrics, forward only, by the functions that training has compiled.

    ``params`` are local shards, ``batch`` is whole.
    """
    sharing, sweep = execution.layout.sharing, execution.layout.sweep or LOCAL_SWEEP
    return sharing.total(sweep.sums(chain, params, sharing.with_tokens(batch), execution), chain.metrics)


def forward_backward(
    chain: Chain, remat: str, params: Tree, batch: Batch, execution: Execution
) -> tuple[dict[str, Tensor], Metrics]:
    """`Sweep.gradients`. While a segment computes, the next ones' weights are on their way, and the last ones' gradients."""
    weights_in_use, parts, tokens = execution.layout.weights, segments(chain.stages, remat), loss_tokens(batch)
    backend, sums, stash = execution.backend(tokens), Sums(chain.metrics), execution.stash()
    ctx, cotangent = chain.context(execution.layout.sharing.local_batch(batch), backend), backend.loss_weight
    assert cotangent is not None
    kept: list[tuple[Weights, SegmentPullback]] = []
    x: Any = None
    coming: deque[Weights] = deque()
    for i, segment in enumerate(parts):
        weights = bring(i, parts, coming, params, chain, execution)
        x, pullback = vjp_segment(segment, weights, x, ctx, execution, cotangent, sums, stash=stash)
        if i + 1 < len(parts):  # the last one's are needed again at once
            weights.free()
        kept.append((weights, pullback))
    del weights, pullback  # or the last segment's would live until the end
    arriving = Arriving()
    d_x: Any = None
    while kept:
        weights, pullback = kept.pop()
        weights.ready()
        for earlier, _ in reversed(kept[-weights_in_use.ahead :]):
            earlier.refetch()
        late, d_x = pullback(d_x)
        del pullback
        leaving = weights_in_use.reduce(late())
        del late
        weights.free()
        arriving.add(leaving)
        del leaving
    return weights_in_use.finish(arriving.all()), sums.complete(tokens.new_zeros((), dtype=cotangent.dtype))


def forward_only(chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """`Sweep.sums`: the sums of this rank's tokens, nothing kept."""
    batch = execution.layout.sharing.local_batch(batch)
    ctx, sums, x = chain.context(batch, execution.backend()), Sums(chain.metrics), None
    chain.check(ctx.backend.axes, ctx.backend.cp_method)
    parts, coming = segments(chain.stages), deque[Weights]()
    for i, segment in enumerate(parts):
        weights = bring(i, parts, coming, params, chain, execution)
        x = forward_segment(segment, weights, x, ctx, execution, sums)
        del weights  # before the next ones arrive
    return sums.complete(sums.loss())


LOCAL_SWEEP = Sweep(forward_backward, forward_only)


def bring(
    i: int, parts: Sequence[Segment], coming: deque[Weights], params: Tree, chain: Chain, execution: Execution
) -> Weights:
    """The weights of segment ``i``, there; those of the next ones are then ``coming``."""
    weights = coming.popleft() if coming else fetch(params, parts[i], chain, execution)
    weights.ready()
    for later in parts[i + 1 + len(coming) : i + 1 + execution.layout.weights.ahead]:
        coming.append(fetch(params, later, chain, execution))
    return weights


def fetch(params: Tree, segment: Segment, chain: Chain, execution: Execution) -> Weights:
    """Begin to bring the weights of a segment into use."""
    quantise = Quantise(chain.float8, execution.kernel)
    return execution.layout.weights.fetch(params, segment.paths, execution.dtype, chain.uncast, quantise)


class Arriving:
    """Gradients on their way home, each of whose collectives is waited for when a further segment has been computed."""

    def __init__(self) -> None:
        self.grads: dict[str, Tensor] = {}
        self.under_way: list[Reduction] = []

    def add(self, *new: Reduction) -> None:
        """Go on with those that are under way, and take ``new`` ones."""
        before, self.under_way = self.under_way, list(new)
        for reduction in before:
            found = reduction()
            if not isinstance(found, dict):
                self.under_way.append(found)
                continue
            for path, g in found.items():  # tied weights have gradients from two segments
                self.grads[path] = wide(self.grads[path]) + g if path in self.grads else g

    def all(self) -> dict[str, Tensor]:
        """The gradients, once the last ones are there."""
        while self.under_way:
            self.add()
        return self.grads


# --- one segment ------------------------------------------------------------------------------------------------------


def forward_segment(segment: Segment, weights: Weights, x: Any, ctx: Any, execution: Execution, sums: Sums) -> Any:
    """Run a segment forward only, by the functions that training has compiled; adds what its stages report to ``sums``."""
    return vjp_segment(segment, weights, x, ctx, execution, torch.empty(0), sums)[0]


def vjp_segment(
    segment: Segment,
    weights: Weights,
    x: Any,
    ctx: Any,
    execution: Execution,
    cotangent: Tensor,
    sums: Sums,
    late: bool = False,
    stash: Stash = stay,
) -> tuple[Any, SegmentPullback]:
    """Run a segment under autograd, on leaves of its own; return its x and its pullback.

    The pullback takes the cotangent of that x (None after the last segment) to that of the incoming x, and to a function that
    gives the gradients of the weights by path, in the compute dtype; with ``late`` their products are left to that function.
    ``cotangent`` is that of every loss that a stage reports. What a segment that runs twice keeps is in ``stash`` meanwhile.
    """
    leaves, costly = Leaves(weights, execution.wants, late), Once(ctx.backend.primitive)
    primitive = costly.first if segment.again and segment.once else ctx.backend.primitive
    watched = replace(ctx, backend=replace(ctx.backend, weight_grads=leaves.take, primitive=primitive))
    start = None if x is None else x.detach().requires_grad_()
    out, losses = start, []
    with torch.enable_grad():
        for stage in segment.stages:
            out, aux = stage.fn(stage.select(leaves.subtrees), out, watched)
            losses += [aux.loss] if aux.loss is not None else []
            sums.add(stage, Aux(None if aux.loss is None else aux.loss.detach(), aux.metrics))
    result = None if out is None else out.detach()
    if segment.again:  # what the second run reports is not counted
        held, rest, uncounted = stash([x, *costly.take()]), segment._replace(again=False), Sums(sums.declared)
        if segment.once:
            ctx = replace(ctx, backend=replace(ctx.backend, primitive=costly.second))

        def again(d_out: Any) -> tuple[LateGrads, Any]:
            start, *results = held()
            costly.given(results)
            return vjp_segment(rest, weights, start, ctx, execution, cotangent, uncounted, late)[1](d_out)

        return result, again
    roots = [get_gradient_edge(root) for root in (out, *losses) if root is not None and root.requires_grad]
    dtype = out.dtype if out is not None and out.requires_grad else None

    def pullback(d_out: Any) -> tuple[LateGrads, Any]:
        cotangents = [d_out.to(dtype)] if dtype else []
        d_x = leaves.backward(roots, [*cotangents, *[cotangent] * (len(roots) - len(cotangents))], start)
        roots.clear()
        return leaves.result, d_x

    return result, pullback


class Leaves:
    """The weights of a segment as leaves of autograd, and their gradients.

    Those of primitives come as functions through `take`, past autograd: in the dtype of the computation and, if ``late``, not
    yet computed. Those of everything else come out of autograd.
    """

    def __init__(self, weights: Weights, wants: Callable[[str], bool], late: bool) -> None:
        self.late = late
        self.paths: dict[int, str] = {}  # id of a leaf -> its path
        self.leaves: dict[str, Tensor] = {}
        self.late_grads: list[tuple[str, Callable[[], Tensor]]] = []
        self.grads: dict[str, Tensor] = {}
        make = partial(self._leaf, wants)
        self.subtrees = {top: tree.map_with_path(make, subtree, prefix=top) for top, subtree in weights.ready().items()}

    def _leaf(self, wants: Callable[[str], bool], path: str, p: Any) -> Any:
        if isinstance(p, Float8):  # its entries stand for it; their gradient never comes out of autograd, in e4m3
            return p._replace(data=self._leaf(wants, path, p.data))
        made = p.detach()
        if wants(path):  # or else the products for frozen weights are never computed
            self.paths[id(made.requires_grad_())], self.leaves[path] = path, made
        return made

    def take(self, weight: Tensor, gradient: Callable[[], Tensor]) -> bool:
        """Take the gradient of a leaf from a primitive; False for other tensors."""
        path = self.paths.get(id(weight))
        if path is not None:
            self.late_grads.append((path, gradient if self.late else partial(_value, gradient())))
        return path is not None

    def backward(self, roots: list[GradientEdge], cotangents: list[Tensor], start: Tensor | None) -> Tensor | None:
        """Run autograd from the roots; returns the cotangent of ``start``, the incoming x."""
        inputs = [*self.leaves.values(), *([] if start is None else [start])]
        found = torch.autograd.grad(roots, inputs, cotangents, allow_unused=True) if inputs and roots else [None] * len(inputs)
        self.grads = {path: g for path, g in zip(self.leaves, found, strict=False) if g is not None}
        if start is None:
            return None
        return torch.zeros_like(start) if found[-1] is None else found[-1]

    @torch.no_grad()  # products that were left for later run outside of autograd's backward
    def result(self) -> dict[str, Tensor]:
        """The gradients by path; zeros of what the segment does not use."""
        grads, self.grads = self.grads, {}
        while self.late_grads:
            path, gradient = self.late_grads.pop(0)
            grads[path] = grads[path] + gradient() if path in grads else gradient()
        return {path: grads[path] if path in grads else torch.zeros_like(leaf) for path, leaf in self.leaves.items()}


def _value(x: Tensor) -> Tensor:
    return x
