"""A rank may be given its own rows alone: the same step, bit for bit, as of ranks that are all given the whole batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import same_bits

from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import accumulate, clip, grad, pipe, with_execution
from olmo_fn.core.step import State
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.parallel.sharded import RankSharing
from olmo_fn.testing import Pool

MODEL = dense(16, 2, 4, 24, vocab_size=32, n_kv_heads=2)
SPECS = transformer.specs(MODEL)
ROWS, PARTS, LENGTH = 8, 2, 8


def batch() -> dict[str, torch.Tensor]:
    """Of which every row counts another number of tokens."""
    ids = torch.randint(MODEL.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    keep = torch.arange(LENGTH) < torch.arange(1, ROWS + 1)[:, None]
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].masked_fill(~keep, IGNORE)}


class Uncounted(RankSharing):
    """A mutant: every rank divides by its own tokens."""

    def count_tokens(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return (batch["labels"] != IGNORE).sum()


def differs(connection: Connection, mutant: bool = False) -> bool:
    """Whether two steps of own rows leave another state, or report other metrics, than two of whole batches."""
    found = []
    for rows in ("all", "own"):
        sharding = shard(connection, SPECS, pipeline=Pipeline("1f1b", 2), rows=rows)
        step = pipe(transformer.loss(MODEL), grad(), accumulate(PARTS), clip(1.0), adamw(1e-2), sharding)
        layout = step.execution.layout
        if mutant and rows == "own":
            sharing = Uncounted(**{name: getattr(layout.sharing, name) for name in layout.sharing.__dataclass_fields__})
            step = with_execution(step, layout=replace(layout, sharing=sharing))
        whole, sharing = batch(), layout.sharing
        pieces = [{name: x[piece] for name, x in whole.items()} for piece in sharing.rows(ROWS, PARTS)]
        given = whole if rows == "all" else {name: torch.cat([piece[name] for piece in pieces]) for name in whole}
        state: State = step.init(layout.placement.init(0))
        for _ in range(2):
            state, metrics = step(state, given)
        found.append({"metrics": metrics, "params": layout.placement.to_local(state.params)})
    return not same_bits(*found)


@pytest.mark.parametrize(
    "mesh",
    [Mesh(dp_shard=2), Mesh(dp_replicate=2), Mesh(dp_shard=2, cp=2), Mesh(dp_replicate=2, tp=2), Mesh(pp=2, dp_shard=2)],
    ids=str,
)
def test_own_rows_are_invisible(pool: Pool, mesh: Mesh) -> None:
    assert not any(pool.run(differs, mesh=mesh))


def test_the_law_catches(pool: Pool) -> None:
    assert all(pool.run(differs, True, mesh=Mesh(dp_shard=2)))
