"""The layout of a pipeline: each rank has the parameters of its stages, and sweeps by the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial

from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Sweep
from olmo_fn.parallel.pipeline.stages import Cut
from olmo_fn.parallel.pipeline.sweep import pipeline_forward, pipeline_sweep
from olmo_fn.parallel.sharded import Sharded, summing
from olmo_fn.tree import Tree


@dataclass(frozen=True, eq=False)
class Pipelined(Sharded):
    """A layout over ranks of which those along ``pp`` have other stages of the chain, as ``cut`` says."""

    cut: Cut = field(kw_only=True)

    def __post_init__(self) -> None:
        _ = self.placed  # refuses what makes no sense, by name

    @cached_property
    def own_specs(self) -> Tree:
        """The parameters that this rank has a part of: those of its stages."""
        return tree.unflatten(self.cut.own(self.axes.pp.index))

    @property
    def shares(self) -> int:  # type: ignore[override]
        """Sequences of a batch must be a multiple of this: data-parallel ranks times micro-batches."""
        return self.axes.data.size * self.cut.pipeline.parts(self.axes.pp.size)

    def sweep(self, alone: Sweep) -> Sweep:
        """A virtual stage and micro-batch at a time."""
        return Sweep(partial(pipeline_sweep, self, self.cut), partial(pipeline_forward, self, self.cut))

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum, in one more collective, gradients of parameters that two pipeline stages share."""
        grads = super().finish(grads)
        tied = [path for path, ranks in self.cut.owners.items() if len(ranks) > 1]
        if not tied:
            return grads
        like = next(iter(grads.values()))
        shares = {path: grads[path] if path in grads else like.new_zeros(self.box(path)[1]) for path in tied}
        total = summing(shares, self.axes.pp)()
        return {path: total.get(path, g) for path, g in grads.items()}

    def copies(self, path: str) -> int:
        """How many ranks have the same part of the parameter."""
        return super().copies(path) * len(self.cut.owners[path])
