"""The sweep of a chain over pipeline ranks: `olmo_fn.core.tape` in another order, a virtual stage and micro-batch at a time.

A rank's weights are gathered once and stay for the whole step, and its gradients are added up whole and scattered once: with
micro-batches in flight, gathering for each of them would be ``microbatches`` times the traffic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from olmo_fn.core.chain import Batch, Chain, Metrics, Sums, loss_tokens, wide
from olmo_fn.core.gradients import Execution
from olmo_fn.core.layout import Weights
from olmo_fn.core.tape import Arriving, LateGrads, Segment, SegmentPullback, fetch, forward_segment, segments, vjp_segment
from olmo_fn.parallel.pipeline.execute import execute
from olmo_fn.parallel.pipeline.schedule import Kind
from olmo_fn.parallel.pipeline.stages import Cut
from olmo_fn.parallel.pipeline.transfers import RankProgram, rank_programs
from olmo_fn.tree import Tree


class Stages:
    """What one rank has of a chain during one step."""

    def __init__(self, cut: Cut, chain: Chain, remat: str, params: Tree, batch: Batch, execution: Execution) -> None:
        sharing, backend = execution.layout.sharing, execution.backend(loss_tokens(batch))
        self.cut, self.chain, self.pp, self.parts = cut, chain, sharing.axes.pp, sharing.parts
        pp = self.pp
        assert backend.loss_weight is not None
        self.cotangent = backend.loss_weight
        self.contexts = [chain.context(part, backend) for part in _split(sharing.local_batch(batch), self.parts)]
        self.last = cut.pipeline.chunks - 1 if pp.index == pp.size - 1 else -1  # the chunk that ends the chain
        self.chunks: list[list[tuple[Segment, Weights]]] = [
            [(segment, fetch(params, segment, chain, execution)) for segment in segments(stages, remat)]
            for stages in cut.cut(chain)[pp.index :: pp.size]
        ]
        self.sums = Sums(chain.metrics)

    def program(self, kind: Kind) -> RankProgram:
        """What this rank runs."""
        return rank_programs(kind, self.pp.size, self.parts, self.cut.pipeline.chunks)[self.pp.index]

    def empty(self, stage: int, part: int) -> Tensor:
        """Memory for what goes from one virtual stage to the next."""
        assert self.chain.empty is not None, "a chain without `empty` cannot be a pipeline"
        return self.chain.empty(self.contexts[part])

    def metrics(self) -> Metrics:
        """The sums of this rank's tokens, zeros of what other ranks report."""
        return self.sums.complete(self.cotangent)


def pipeline_sweep(
    cut: Cut, chain: Chain, remat: str, params: Tree, batch: Batch, execution: Execution
) -> tuple[dict[str, Tensor], Metrics]:
    """Gradients by path of this rank's parameters, as the layout keeps them, and the sums of its tokens."""
    stages, weights_in_use = Stages(cut, chain, remat, params, batch, execution), execution.layout.weights
    pullbacks: dict[tuple[int, int], list[SegmentPullback]] = {}
    later: dict[tuple[int, int], list[LateGrads]] = {}
    grads: list[list[dict[str, Tensor]]] = [[{} for _ in chunk] for chunk in stages.chunks]
    late = cut.pipeline.kind == "zero_bubble"

    def forward(chunk: int, part: int, x: Tensor | None) -> Tensor | None:
        kept = pullbacks[chunk, part] = []
        stash = execution.stash()
        for segment, weights in stages.chunks[chunk]:
            ctx = stages.contexts[part]
            x, pullback = vjp_segment(segment, weights, x, ctx, execution, stages.cotangent, stages.sums, late, stash)
            kept.append(pullback)
        return x

    def backward_input(chunk: int, part: int, cotangent: Any) -> Any:
        kept, rest = pullbacks.pop((chunk, part)), later.setdefault((chunk, part), [])
        while kept:
            late_grads, cotangent = kept.pop()(cotangent)
            rest.append(late_grads)
        return cotangent

    def backward_weight(chunk: int, part: int) -> None:
        rest = later.pop((chunk, part))  # of the last segment first
        for i in reversed(range(len(stages.chunks[chunk]))):
            _accumulate(grads[chunk][i], rest.pop(0)())

    def backward(chunk: int, part: int, cotangent: Any) -> Any:
        kept = pullbacks.pop((chunk, part))
        for i in reversed(range(len(kept))):
            late_grads, cotangent = kept.pop()(cotangent)
            _accumulate(grads[chunk][i], late_grads())
        return cotangent

    program = stages.program(cut.pipeline.kind)
    execute(program, forward, backward, backward_input, backward_weight, empty=stages.empty, axis=stages.pp)
    arriving = Arriving()
    arriving.add(*(weights_in_use.reduce(part) for chunk in grads for part in chunk))
    return weights_in_use.finish(arriving.all()), stages.metrics()


def pipeline_forward(cut: Cut, chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """Forward only, for evaluation: the sums of this rank's tokens, zeros on ranks that do not end the chain."""
    stages = Stages(cut, chain, "none", params, batch, execution)
    stages.contexts = [replace(ctx, backend=replace(ctx.backend, loss_weight=None)) for ctx in stages.contexts]

    def forward(chunk: int, part: int, x: Tensor | None) -> Tensor | None:
        for segment, weights in stages.chunks[chunk]:
            x = forward_segment(segment, weights, x, stages.contexts[part], execution, stages.sums)
        return x

    execute(stages.program("forward"), forward, empty=stages.empty, axis=stages.pp)
    return stages.metrics()


def _split(batch: Batch, n: int) -> list[Batch]:
    rows = len(batch["labels"])
    if rows % n:
        raise ValueError(
            f"{rows} sequences a data-parallel rank cannot be cut into {n} micro-batches; change --mesh.pp-microbatches"
        )
    chunks = {name: x.chunk(n) for name, x in batch.items() if x.ndim}
    return [{name: parts[i] for name, parts in chunks.items()} for i in range(n)]


def _accumulate(found: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    for name, g in grads.items():
        found[name] = found[name].add_(g) if name in found else wide(g).clone()
