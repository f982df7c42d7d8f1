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
from olmo_fn.models.settings.moe import MoE
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


EXPERTS = {
    "dropless": {},
    "capacity": {"capacity_factor": 1.0},
    "capacity of a batch": {"capacity_factor": 1.0, "capacity_over": "batch"},
    "biases, jitter": {"gating": "sigmoid", "weight_norm": 1.0, "balance_rate": 0.1, "jitter": 0.1},
    "groups, dense and latent": {
        "expert_groups": 4,
        "top_groups": 2,
        "dense_layers": 1,
        "latent_size": 32,
        "latent_norm": True,
    },
}
EP = MeshConfig(ep=2)
WAITS = {
    "exchange": (1, EP, Mesh(dp_shard=4, ep=2), {"dispatch": "exchange"}, {}),
    "exchange, remat": (2, EP, Mesh(dp_shard=4, ep=2), {"dispatch": "exchange"}, {"remat": "full"}),
    "gather": (1, EP, Mesh(dp_shard=4, ep=2), {"dispatch": "gather"}, {}),
    "tp": (1, EP, Mesh(dp_shard=2, tp=2, ep=2), {"dispatch": "exchange"}, {}),
    "capacity": (0, EP, Mesh(dp_shard=4, ep=2), {"capacity_factor": 1.0}, {}),
    "capacity, gather": (0, EP, Mesh(dp_shard=4, ep=2), {"capacity_factor": 1.0, "dispatch": "gather"}, {}),
    "capacity, cp": (0, replace(EP, cp=2), Mesh(dp_shard=2, cp=2, ep=2), {"capacity_factor": 1.0}, {}),
    "capacity, pp": (0, replace(EP, pp=2), Mesh(pp=2, dp_shard=2, ep=2), {"capacity_factor": 1.0}, {}),
    "no ep": (0, MeshConfig(), Mesh(dp_shard=4), {}, {}),
}
"""How often the host waits in a layer of experts: once for how many rows come, unless there are places for a fixed number."""


def of_experts(settings: dict[str, Any], **recipe: Any) -> Config:
    experts = MoE(**{"num_experts": 8, "top_k": 2, "expert_size": 64, "shared_size": 32} | settings)
    model = replace(SMALL, block=replace(SMALL.block, feed_forward=experts))
    return replace(BASE, model=model, recipe=replace(BASE.recipe, **recipe))


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


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(fake_cuda: FakeCuda, name: str):
    nothing_is_waited_for(fake_cuda.run(traced_step, of_experts(EXPERTS[name])))


@pytest.mark.parametrize("name", WAITS)
def test_experts_on_other_ranks_are_waited_for_once(fake_cuda: FakeCuda, name: str):
    """With numbers of rows that are no multiples of anything, as real ones are: torch's grouped product takes all of them."""
    times, settings, mesh, moe, recipe = WAITS[name]
    cfg = replace(of_experts(moe, sequence_length=61 if mesh.size == mesh.dp_shard * mesh.pp else 60, **recipe), mesh=settings)
    seen = fake_cuda.run(traced_step, cfg, mesh)
    assert seen.syncs.total() == times * cfg.model.n_layers, seen.table()
    assert all(name.startswith("aten::_to_copy nn/experts.py") for name in seen.syncs)
    grouped = 0 if "capacity_factor" in moe else (12 if "remat" in recipe else 9) * cfg.model.n_layers
    assert seen.launches["aten::_grouped_mm"] == grouped


@pytest.mark.parametrize("name", MESHES)
def test_every_layout(fake_cuda: FakeCuda, name: str):
    mesh, settings = MESHES[name]
    nothing_is_waited_for(fake_cuda.run(traced_step, replace(BASE, mesh=settings), mesh))
