"""Steps in float8 on a GPU that is not there: the layouts that torch demands of scaled products, and what is launched."""

from __future__ import annotations

from dataclasses import replace

import pytest
from traced import traced_step

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.config import dense
from olmo_fn.testing import FakeCuda
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.schedules import Constant

ONE = Config(
    dense(256, 1, 4, 512, vocab_size=256, n_kv_heads=2),
    schedule=Constant(warmup=0),
    recipe=Recipe(batch_size=2, sequence_length=128),
    run=Run(steps=10),
)
TWO = replace(ONE, model=dense(256, 2, 4, 512, vocab_size=256, n_kv_heads=2))


def of(cfg: Config, float8: str) -> Config:
    return replace(cfg, recipe=replace(cfg.recipe, float8=float8))


@pytest.mark.parametrize(("float8", "product", "most"), [("rowwise", "_scaled_mm", 60), ("mx", "_scaled_mm_v2", 84)])
def test_a_block_in_float8(fake_cuda: FakeCuda, float8: str, product: str, most: int) -> None:
    """7 weights: a product each way in float8, one for the weight's gradient in bf16. Nothing is waited for."""
    one, two = (fake_cuda.run(traced_step, of(cfg, float8)) for cfg in (ONE, TWO))
    assert not two.syncs
    block = {name: n - one.launches[name] for name, n in two.launches.items()}
    assert (block[f"aten::{product}"], block["aten::mm"]) == (14, 7)
    assert two.launched - one.launched <= most


@pytest.mark.parametrize("float8", ["rowwise", "mx"])
def test_sharded_in_float8(fake_cuda: FakeCuda, float8: str) -> None:
    exact, quantised = (fake_cuda.run(traced_step, of(TWO, kind), Mesh(dp_shard=2)) for kind in ("none", float8))
    assert not quantised.syncs
    assert quantised.collectives == exact.collectives, "scales travel with entries"
    assert quantised.peak < exact.peak
