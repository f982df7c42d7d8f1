"""What law 2 catches: one thing broken inside the ranks at a time, as in a layout that somebody got wrong."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
from helpers import Broken
from strategies import Case, batches_of
from test_law_layouts import recipe

from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.parallel import buckets as bucket
from olmo_fn.parallel.sharded import RankSharing, ShardedWeights, sharded
from olmo_fn.testing import Layout, Pool, assert_equivalent
from olmo_fn.tree import items

MODEL = dense(6, 1, 4, 5, vocab_size=11, n_kv_heads=2, head_dim=2, init_std=0.3)
FSDP, TP, RING = Layout(Mesh(dp_shard=2)), Layout(Mesh(tp=2)), Layout(Mesh(cp=2), Rules(cp_method="ring"))


def verify(pool, layout, **options):
    case = Case(MODEL, *layout, 4, 8, 1, "none", "tape", True, 0.5, seed=3)
    return assert_equivalent(
        partial(recipe, MODEL, torch.float64), transformer.specs(MODEL), [layout], batches_of(case, 2), pool=pool, **options
    )


def nothing(x, axis, *more):
    return x


def unchanged(self, x):
    return x


def not_totalled(self, sums, declared):
    return sums


def not_summing(grads, axes, dtype):
    return lambda: dict(grads)


def mean_of_means(batch):
    """The mean of each rank's own tokens: right only if all have as many."""
    return (batch["labels"].chunk(dist.get_world_size())[dist.get_rank()] != IGNORE).sum() * dist.get_world_size()


def without_mask(ids, vocab_size, tp):
    return ids % (vocab_size // tp.size), torch.ones_like(ids, dtype=torch.bool)


def first_rows(self, batch):
    return {name: x.chunk(self.axes.data.size)[0] if x.ndim else x for name, x in batch.items()}


unpack = bucket.unpack


def unpack_rolled(gathered, outs, shards, axis):
    rows = torch.ops._c10d_functional.wait_tensor(gathered).view(axis.size, -1)
    unpack(rows.roll(1, 0).flatten(), outs, shards, axis)


def norm_of_copies(self, grads):
    squares = torch.stack([g.double().square().sum() for _, g in items(grads)]).sum()
    dist.all_reduce(squares)
    return squares.sqrt()


def positions_in_order(T, cp, device="cpu"):
    return torch.arange(T).chunk(cp.size)[cp.index]


def second_piece_only(R, index, n):
    return (2 * n - 1 - index) * (R // 2), (2 * n - 1 - index) * (R // 2)


WEIGHTS, SHARING = "olmo_fn.parallel.sharded.ShardedWeights.", "olmo_fn.parallel.sharded.RankSharing."
MUTANTS = {
    "gradients of whole leaves are not summed": (FSDP, WEIGHTS + "finish", unchanged),
    "gradients are not summed": (Layout(Mesh(dp_replicate=2)), "olmo_fn.parallel.sharded.summing", not_summing),
    "metrics are not summed": (FSDP, SHARING + "total", not_totalled),
    "QK-norm over a rank's own heads": (TP, "olmo_fn.nn.norm.psum", nothing),
    "norms without the sums of their gradients": (TP, "olmo_fn.nn.norm.enter", nothing),
    "softmax over a rank's own vocabulary": (TP, "olmo_fn.nn.cross_entropy.psum", nothing),
    "embedding without a mask": (TP, "olmo_fn.nn.embedding.local_rows", without_mask),
    "a mean of means": (FSDP, "olmo_fn.core.tape.loss_tokens", mean_of_means),
    "a ring that does not turn": (RING, "olmo_fn.kernels.attention_cp.ring_shift", nothing),
    "a ring that forgets a piece": (RING, "olmo_fn.kernels.attention_cp._offsets", second_piece_only),
    "positions that are not dealt": (RING, "olmo_fn.models.transformer.positions_of", positions_in_order),
    "every rank reads the first rows": (FSDP, SHARING + "local_batch", first_rows),
    "weights in the wrong order": (FSDP, "olmo_fn.parallel.buckets.unpack", unpack_rolled),
    "a norm that counts copies": (FSDP, SHARING + "norm", norm_of_copies),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_law_2_catches(pool: Pool, name: str) -> None:
    layout, target, mutant = MUTANTS[name]
    with pytest.raises(AssertionError, match=r"step 0, \w+ .* on rank \d differs by .*; the tolerance is 1e-10"):
        verify(Broken(pool, target, mutant), layout)


def test_what_is_not_broken_passes(pool: Pool) -> None:
    for layout in (FSDP, TP, RING, Layout(Mesh(dp_replicate=2))):
        assert verify(Broken(pool, SHARING + "norm", RankSharing.norm), layout)[0] < 1e-12


class Unscaled(ShardedWeights):
    """Somebody's own way for gradients to return, as a mean over ranks."""

    def finish(self, grads):
        return {path: g / self.placement.axes.tokens.size for path, g in super().finish(grads).items()}


def my_shard(connection, specs, rules):
    layout = sharded(connection, specs, rules)
    mine = replace(layout, weights=Unscaled(layout.placement))
    return Transform("my_shard", Step, Step, lambda step: with_execution(step, layout=mine))


def test_a_layout_of_ones_own(pool: Pool) -> None:
    with pytest.raises(AssertionError, match=r"^Mesh\(dp_shard=2\): step 0, metric grad_norm on rank . differs by .* 0\.5 of"):
        verify(pool, FSDP, sharding=my_shard)
    assert verify(pool, Layout(Mesh()), sharding=my_shard)[0] < 1e-14, "on one rank it is right"


def test_a_transform_of_ones_own(pool: Pool) -> None:
    """A transform that should be invisible is compared with the recipe without it."""
    other = partial(recipe, MODEL, torch.float64, "tape", "full", 2)
    assert verify(pool, Layout(Mesh()), reference=other)[0] < 1e-12
    with pytest.raises(AssertionError, match="step 0, gradient"):
        verify(pool, Layout(Mesh()), reference=partial(recipe, modified(MODEL, norm_eps=1e-5), torch.float64))
    with pytest.raises(AssertionError, match="is on no rank"):
        verify(pool, Layout(Mesh()), reference=partial(recipe, MODEL, torch.float64, optim="momentum"))


def test_what_cannot_travel_is_refused(pool: Pool) -> None:
    with pytest.raises(ValueError, match=r"travel to the ranks by pickle.*functools\.partial"):
        assert_equivalent(lambda: None, {}, [FSDP], [], pool=pool)
