"""Updates of whole matrices are shared out: each is done by one rank, and nobody can tell."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn import tree
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.kernels import identity
from olmo_fn.mesh.axis import chunk
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim.base import Rule, optimizer
from olmo_fn.parallel import owners as deal
from olmo_fn.parallel.buckets import Shard
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init
from olmo_fn.testing import Pool, Traffic
from olmo_fn.testing.pool import RankFailed

MODEL = dense(16, 2, 4, 24, vocab_size=32, n_kv_heads=2)
SPECS = transformer.specs(MODEL)
DTYPES = (torch.float64, torch.bfloat16, torch.float32)


def there_and_back(connection, shapes: list[tuple[tuple[int, ...], int]], break_it=identity) -> None:
    """Deal out tensors of three dtypes, and a scalar-like one that is everywhere; change what came; collect it."""
    axis = connection.axes.fsdp
    generator = torch.Generator().manual_seed(0)
    wholes = [[torch.randn(shape, generator=generator).to(dtype) for dtype in DTYPES] for shape, _ in shapes]
    every = [torch.randn(1, 3, generator=generator) for _ in shapes]

    def own(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.narrow(dim, *chunk(x.shape[dim], axis.index, axis.size)).contiguous()

    parts = [[own(x, dim) for x in item] for item, (_, dim) in zip(wholes, shapes, strict=True)]
    shards = [[Shard(shape, dim)] * len(DTYPES) for shape, dim in shapes]
    mine = deal.scatter_to_owners(parts, shards, axis)
    assert (mine is None) == (axis.index >= len(shapes))
    if mine is not None:
        assert all(torch.equal(x, y) for x, y in zip(mine, wholes[axis.index], strict=True))
        mine = [*(2 * x for x in mine), every[axis.index] + 1]
    like = [[*item, x] for item, x in zip(parts, every, strict=True)]
    with patch("olmo_fn.parallel.owners.chunk_of", break_it(deal.chunk_of)):
        found = deal.gather_from_owners(mine, like, [[*item, None] for item in shards], axis)
    for item, before in zip(found, like, strict=True):
        for x, old in zip(item[:-1], before[:-1], strict=True):
            assert x.dtype == old.dtype
            assert x.is_contiguous()
            assert torch.equal(x, 2 * old), "came back changed"
        assert torch.equal(item[-1], before[-1] + 1)


def others_chunk(chunk_of):
    return lambda x, shard, rank, n: chunk_of(x, shard, n - 1 - rank, n)


SHAPES = st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(1, 4)).flatmap(
    lambda shape: st.tuples(st.just(shape), st.integers(0, 2))
)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_dealt_out_comes_back(pool: Pool, ranks: int) -> None:
    @examples(25)
    @given(st.lists(SHAPES, min_size=1, max_size=ranks))
    def law(shapes) -> None:
        pool.run(there_and_back, shapes, ranks=ranks)

    law()


def test_the_law_catches(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="came back changed"):
        pool.run(there_and_back, [((4, 3), 0), ((5, 2), 1)], others_chunk, ranks=2)


def updates(connection) -> tuple[list[str], dict[tuple[str, str], int], dict[str, torch.Tensor]]:
    """Shapes of the wholes that this rank has updated, its exchanges, and the slots that are whole everywhere."""
    seen: list[tuple[int, ...]] = []

    def update(p, g, slots, s):
        seen.append(tuple(p.shape))
        return s["lr"] * g / g.norm(), {"norm": slots["norm"] + g.norm()}

    rule = Rule(lambda path, p: {"norm": p.new_zeros(1, 2)}, update, elementwise=False, unlike=("norm",))
    counted = optimizer("counted", rule, 0.1)
    step = pipe(transformer.loss(MODEL), grad(), counted, shard(connection, SPECS))
    state = step.init(init(SPECS, 0))
    ids = torch.arange(6 * 9).view(6, 9) % MODEL.vocab_size
    with Traffic(connection.axes) as traffic:
        state, _ = step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
    calls = {name: moved.calls for name, moved in traffic.moved.items() if name[0] == "all_to_all"}
    norms = {path: x.clone() for path, x in tree.items(state.slots["norm"])}
    return seen, calls, norms


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(dp_shard=3), Mesh(dp_shard=2, tp=2)], ids=str)
def test_each_matrix_is_updated_by_one_rank(pool: Pool, mesh: Mesh) -> None:
    dealt = [path for path, spec in tree.items(SPECS) if "embed" in spec.axes]
    others = [path for path, _ in tree.items(SPECS) if path not in dealt]  # the gains of queries and keys are not sharded
    n = mesh.dp_shard
    rounds = -(-len(dealt) // n)
    found = pool.run(updates, mesh=mesh)
    _, _, alone = pool.run(updates, mesh=Mesh())[0]
    for rank, (seen, calls, norms) in enumerate(found):
        place = mesh.coordinates(rank)["dp_shard"]
        assert len(seen) == len(others) + len(dealt[place::n])
        assert sorted(seen) == sorted(tree.at(SPECS, path).shape for path in (*others, *dealt[place::n]))
        assert calls == {("all_to_all", "dp_shard"): 2 * rounds}
        for path, norm in norms.items():  # what has not the parameter's shape is whole everywhere
            torch.testing.assert_close(norm, alone[path], rtol=1e-5, atol=0, msg=path)
