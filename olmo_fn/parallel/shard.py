"""Sharding as a transform of the step: who has which part of the state, and nothing of what is computed."""

from __future__ import annotations

from olmo_fn.core.chain import refuse_axes
from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.parallel.pipeline.pipelined import pipelined
from olmo_fn.parallel.pipeline.stages import Cut, Pipeline
from olmo_fn.parallel.sharded import Rows, sharded
from olmo_fn.tree import Tree

ONE_BY_ONE = Pipeline()


def shard(
    connection: Connection, specs: Tree, rules: Rules = DEFAULT, pipeline: Pipeline = ONE_BY_ONE, rows: Rows = "all"
) -> Transform[Step, Step]:
    """Carry a step out on the ranks of ``connection``, parameters ``specs`` lying there by ``rules``. Invisible (law 2).

    Every rank calls the step with the same batch, of which it takes its rows, and its own shards of the state; with
    ``rows="own"`` with its own rows alone (``step.execution.layout.sharing.rows`` says which). ``pipeline`` says how the chain
    is cut where the mesh has an axis ``pp``. ValueError for rules without sense, with the parameter's name, and for axes that
    the loss is not written for.

        connection = connect(Mesh(dp_shard=4, tp=2))  # torch.distributed is initialised, with 8 ranks
        step = pipe(transformer.loss(model), grad(), adamw(1e-3), shard(connection, transformer.specs(model)))
        state = step.init(step.execution.layout.placement.init(seed=0))
    """

    def apply(step: Step) -> Step:
        pp, chain = connection.axes.pp.size, step.grads.chain
        if wrong := {*rules.exchanged} - (chain.looked_up if chain else {*()}):
            raise ValueError(f"a rule exchanges the rows of {min(wrong)!r}, which the loss does not say that it looks up")
        if rules.async_tp and connection.device_mesh.device_type != "cuda":
            raise ValueError("--mesh.async-tp sends over NVLink while it multiplies, which needs CUDA devices; leave it out")
        refuse = refuse_axes if chain is None else chain.check
        refuse(connection.axes, rules.cp_method)
        if chain is not None:
            chain.check_parameters(specs)
        if pp == 1:
            return with_execution(step, layout=sharded(connection, specs, rules, rows))
        if chain is None or chain.empty is None:
            raise ValueError("a pipeline (--mesh.pp) cuts a chain of stages: use grad('tape') and a model with `Chain.empty`")
        return with_execution(step, layout=pipelined(connection, specs, rules, Cut(chain, specs, pp, pipeline), rows))

    return Transform(f"shard({connection.mesh})", Step, Step, apply)
