"""The sweep of a chain over pipeline ranks: `olmo_fn.core.tape` in another order, a virtual stage and micro-batch at a time.

A rank's weights are gathered once and stay for the whole step, and its gradients are added up whole and scattered once: with
micro-batches in flight, gathering for each of them would be ``microbatches`` times the traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.chain import Batch, Carry, Chain, Execution, Metrics, loss_tokens
from olmo_fn.core.layout import Weights, wide
from olmo_fn.core.tape import Segment, SegmentPullback, fetch, flatten, of_mean, pull, run, segments
from olmo_fn.parallel.pipeline.execute import execute
from olmo_fn.parallel.pipeline.schedule import Kind
from olmo_fn.parallel.pipeline.stages import Cut
from olmo_fn.parallel.pipeline.transfers import RankProgram, rank_programs
from olmo_fn.parallel.sharded import Sharded
from olmo_fn.tree import Tree


class Stages:
    """What one rank has of a chain during one step."""

    def __init__(
        self, layout: Sharded, cut: Cut, chain: Chain, remat: str, params: Tree, batch: Batch, execution: Execution
    ) -> None:
        self.cut, self.chain, self.dtype, self.pp = cut, layout.chain(chain), execution.dtype, layout.axes.pp
        pp, self.parts = self.pp, cut.pipeline.parts(self.pp.size)
        self.cotangent, parts = of_mean(loss_tokens(batch), self.dtype), _split(layout.part(batch), self.parts)
        self.contexts = [{**self.chain.context(part), "cotangent": self.cotangent} for part in parts]
        virtual = cut.cut(self.chain)
        self.last = cut.pipeline.chunks - 1 if pp.index == pp.size - 1 else -1  # the chunk that ends the chain
        self.chunks: list[list[tuple[Segment, Weights]]] = [
            [(segment, fetch(params, segment, execution)) for segment in segments(stages, remat)]
            for stages in virtual[pp.index :: pp.size]
        ]
        zero = torch.zeros((), dtype=torch.promote_types(self.dtype, torch.float32), device=batch["labels"].device)
        self.sums: Metrics = dict.fromkeys(("loss", *self.chain.sums), zero)

    def program(self, kind: Kind) -> RankProgram:
        """What this rank runs."""
        return rank_programs(kind, self.pp.size, self.parts, self.cut.pipeline.chunks)[self.pp.index]

    def empty(self, stage: int, part: int) -> Tensor:
        """Memory for a carry."""
        assert self.chain.carry is not None, "a chain without `carry` cannot be a pipeline"
        return self.chain.carry(self.contexts[part], self.dtype)

    def add(self, out: Carry) -> None:
        """Add the sums of one micro-batch."""
        total, metrics = out
        for name, value in {"loss": total.detach(), **metrics}.items():
            self.sums[name] = self.sums[name] + value


def pipeline_sweep(
    layout: Sharded,
    cut: Cut,
    chain: Chain,
    remat: str,
    params: Tree,
    batch: Batch,
    execution: Execution,
) -> tuple[dict[str, Tensor], Metrics]:
    """Gradients by path of this rank's parameters, as the layout keeps them, and the sums of its tokens."""
    stages = Stages(layout, cut, chain, remat, params, batch, execution)
    held: dict[tuple[int, int], list[SegmentPullback]] = {}
    later: dict[tuple[int, int], list[Callable[[], dict[str, Tree]]]] = {}
    found: list[list[dict[str, Tensor]]] = [[{} for _ in chunk] for chunk in stages.chunks]

    def forward(chunk: int, part: int, carry: Tensor | None) -> Tensor | None:
        x: Carry = carry
        pullbacks = held[chunk, part] = []
        for segment, weights in stages.chunks[chunk]:
            x, pullback = pull(segment, weights, x, stages.contexts[part], execution, late=cut.pipeline.kind == "zero_bubble")
            pullbacks.append(pullback)
        if chunk == stages.last:
            stages.add(x)
            return None
        return x

    def backward_input(chunk: int, part: int, cotangent: Any) -> Any:
        if chunk == stages.last:
            cotangent = stages.cotangent
        pullbacks, rest = held.pop((chunk, part)), later.setdefault((chunk, part), [])
        while pullbacks:
            grads, cotangent = pullbacks.pop()(cotangent)
            rest.append(grads)
        return cotangent

    def backward_weight(chunk: int, part: int) -> None:
        rest = later.pop((chunk, part))  # of the last segment first
        for i in reversed(range(len(stages.chunks[chunk]))):
            _accumulate(found[chunk][i], flatten(rest.pop(0)(), execution))

    def backward(chunk: int, part: int, cotangent: Any) -> Any:
        if chunk == stages.last:
            cotangent = stages.cotangent
        pullbacks = held.pop((chunk, part))
        for i in reversed(range(len(pullbacks))):
            grads, cotangent = pullbacks.pop()(cotangent)
            _accumulate(found[chunk][i], flatten(grads(), execution))
        return cotangent

    program = stages.program(cut.pipeline.kind)
    execute(program, forward, backward, backward_input, backward_weight, empty=stages.empty, axis=layout.axes.pp)
    grads: dict[str, Tensor] = {}
    arriving = [layout.reduce(part) for chunk in found for part in chunk]
    for arrive in arriving:
        for path, g in arrive().items():
            grads[path] = grads[path] + g if path in grads else g
    return layout.finish(grads), stages.sums


def pipeline_forward(layout: Sharded, cut: Cut, chain: Chain, params: Tree, batch: Batch, execution: Execution) -> Metrics:
    """Forward only, for evaluation: the sums of this rank's tokens, zeros on ranks that do not end the chain."""
    stages = Stages(layout, cut, chain, "none", params, batch, execution)

    def forward(chunk: int, part: int, carry: Tensor | None) -> Tensor | None:
        x: Carry = carry
        for segment, weights in stages.chunks[chunk]:
            x = run(segment, weights, x, stages.contexts[part], execution)
        if chunk == stages.last:
            stages.add(x)
            return None
        return x

    execute(stages.program("forward"), forward, empty=stages.empty, axis=layout.axes.pp)
    return stages.sums


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
