"""The layout of a pipeline: each rank has the parameters of its stages, and sweeps by the schedule."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.layout import Layout, Sweep, arrive
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.placement import Rules
from olmo_fn.parallel.owners import MatrixOwners
from olmo_fn.parallel.pipeline.stages import Cut
from olmo_fn.parallel.pipeline.sweep import pipeline_forward, pipeline_sweep
from olmo_fn.parallel.sharded import RankSharing, Rows, ShardedWeights, axes_in_use, summing
from olmo_fn.parallel.sharded_placement import ShardedPlacement
from olmo_fn.tree import Tree


def pipelined(connection: Connection, specs: Tree, rules: Rules, cut: Cut, rows: Rows = "all") -> Layout:
    """The layout over ranks of which those along ``pp`` have other stages of the chain, as ``cut`` says."""
    pp = connection.axes.pp
    local = tree.unflatten(cut.own(pp.index))
    sharers = {path: len(ranks) for path, ranks in cut.owners.items() if len(ranks) > 1}
    placement = ShardedPlacement(connection, specs, rules, local, sharers)
    parts = cut.pipeline.parts(pp.size)
    sharing = RankSharing(axes_in_use(connection.axes, rules), rules.cp_method, placement, rows, parts)
    sweep = Sweep(partial(pipeline_sweep, cut), partial(pipeline_forward, cut))
    return Layout(placement, TiedWeights(placement), MatrixOwners(placement), sharing, sweep)


@dataclass(frozen=True, eq=False)
class TiedWeights(ShardedWeights):
    """Weights that two pipeline stages may share."""

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum, in one more collective, gradients of parameters that two pipeline stages share."""
        grads = super().finish(grads)
        if not self.placement.sharers or not grads:
            return grads
        like = next(iter(grads.values()))
        shares = {
            path: grads[path] if path in grads else like.new_zeros(self.placement.box(path)[1])
            for path in self.placement.sharers
        }
        total = arrive(summing(shares, [self.placement.axes.pp]))
        return {path: total.get(path, g) for path, g in grads.items()}
