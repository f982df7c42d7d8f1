"""What several tests need."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_fn.core.chain import Aux, Backend, Batch, Chain, Stage


@dataclass(frozen=True)
class BatchContext:
    """The context of a chain whose stages look at the batch itself."""

    backend: Backend
    batch: Batch


def one_stage(loss, *names):
    """A loss ``(params, batch) -> (sum, metrics)`` of parameters with these names as a chain of one stage."""

    def fn(p, x, ctx):
        total, _ = loss(p, ctx.batch)
        return None, Aux(total)

    stage = Stage("all", tuple((name, name) for name in names), fn)
    return Chain(lambda batch, backend: BatchContext(backend, batch), (stage,))
