"""Steps of every family, recipe and layout, traced on a GPU that is not there: no device is mixed with another, no value is
waited for. (Optimizers and transforms: test_syncs.py.)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from traced import traced_step

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.config import MultiToken, dense
from olmo_fn.models.families import FAMILIES
from olmo_fn.testing import FakeCuda, Seen
from olmo_fn.train.config import Config, Lora, Recipe
from olmo_fn.train.optimizers import SOAP
from olmo_fn.train.schedules import Constant

SMALL = dense(64, 2, 4, 128, vocab_size=128)
BASE = Config(SMALL, schedule=Constant(warmup=0), recipe=Recipe(8, 64, compile=False))


def with_recipe(**changes: Any) -> Config:
    return replace(BASE, recipe=replace(BASE.recipe, **changes))


RECIPES = {
    "remat-full": with_recipe(remat="full"),
    "remat-feed-forward": with_recipe(remat="feed_forward"),
    "accumulate": with_recipe(accumulate=2),
    "func": with_recipe(engine="func"),
    "documents": replace(BASE, data=replace(BASE.data, mask_documents=True, eos_id=0)),
    "lora": replace(BASE, lora=Lora(rank=4)),
    "multi-token": replace(BASE, model=replace(SMALL, multi_token=MultiToken(depth=1))),
    "tied": replace(BASE, model=replace(SMALL, tie_embeddings=True)),
}
MESHES = {
    "fsdp": (Mesh(dp_shard=4), MeshConfig()),
    "zero-2": (Mesh(dp_shard=4), MeshConfig(weights="zero-2")),
    "hsdp": (Mesh(dp_replicate=2, dp_shard=2), MeshConfig()),
    "tp": (Mesh(dp_shard=2, tp=2), MeshConfig()),
    "cp-gather": (Mesh(dp_shard=2, cp=2), MeshConfig(cp=2)),
    "cp-ring": (Mesh(dp_shard=2, cp=2), MeshConfig(cp=2, cp_method="ring")),
    "cp-ulysses": (Mesh(dp_shard=2, cp=2), MeshConfig(cp=2, cp_method="ulysses")),
    "pp": (Mesh(dp_shard=2, pp=2), MeshConfig(pp=2)),
    "pp-zero-bubble": (Mesh(dp_shard=2, pp=2), MeshConfig(pp=2, pp_schedule="zero_bubble")),
}


def nothing_is_waited_for(seen: Seen) -> None:
    assert seen.launched > 100
    assert not seen.syncs, seen.table()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(fake_cuda: FakeCuda, name: str):
    model = [*FAMILIES[name].values()][-1]  # the largest: its heads are those that kernels for GPUs take
    model = replace(model, n_layers=max(1, len(model.block.mixer.window_pattern)))
    cfg = replace(BASE, model=model, recipe=replace(BASE.recipe, normalize=model.init_method == "normalized"))
    nothing_is_waited_for(fake_cuda.run(traced_step, cfg))


def test_soap_asks_the_device_whether_to_turn_its_bases(fake_cuda: FakeCuda):
    found = fake_cuda.run(traced_step, replace(BASE, optim=SOAP()), dtype=torch.float32, values=True)
    assert {name.split(":")[-2] for name in found.syncs} == {"_local_scalar_dense optim/soap.py"}, found.table()


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe(fake_cuda: FakeCuda, name: str):
    nothing_is_waited_for(fake_cuda.run(traced_step, RECIPES[name], compiled=name != "func"))


@pytest.mark.parametrize("name", MESHES)
def test_every_layout(fake_cuda: FakeCuda, name: str):
    mesh, settings = MESHES[name]
    nothing_is_waited_for(fake_cuda.run(traced_step, replace(BASE, mesh=settings), mesh))
