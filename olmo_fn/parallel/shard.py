"""Sharding as a transform of the step: who has which part of the state, and nothing of what is computed."""

from __future__ import annotations

from olmo_fn.parallel.connect import Connection
from olmo_fn.parallel.rules import DEFAULT, Rules
from olmo_fn.parallel.sharded import Sharded
from olmo_fn.step import Step, Transform, _execute
from olmo_fn.tree import Tree


def shard(connection: Connection, specs: Tree, rules: Rules = DEFAULT) -> Transform:
    """Carry a step out on the ranks of ``connection``, parameters ``specs`` lying there by ``rules``. Invisible (law 2).

    Every rank calls the step with the same batch, of which it takes its part, and its own parts of the state. ValueError,
    with the parameter's name, for rules that make no sense.

        connection = connect(Mesh(dp_shard=4, tp=2))  # torch.distributed is initialised, with 8 ranks
        step = pipe(transformer.loss(model), grad(), adamw(1e-3), shard(connection, transformer.specs(model)))
        state = step.init(step.execution.layout.init(seed=0))
    """
    layout = Sharded(connection, specs, rules)
    return Transform(f"shard({connection.mesh})", Step, Step, lambda step: _execute(step, layout=layout))
