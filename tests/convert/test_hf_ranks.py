"""Ranks that begin from a directory hold the shards of what one process reads; each reads its own."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch

from olmo_fn import tree
from olmo_fn.formats.huggingface import Directory, open_directory
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models import transformer
from olmo_fn.spec import Box
from olmo_fn.train.config import Config, Init, Lora, Recipe
from olmo_fn.train.recipe import first_parameters, recipe
from olmo_fn.train.schedules import Cosine

EXPERTS = {
    "ep": (Mesh(dp_shard=2, ep=2), MeshConfig(dp_shard=2, ep=2)),
    "ep-tp": (Mesh(dp_shard=2, ep=2, tp=2), MeshConfig(dp_shard=2, ep=2, tp=2)),
}
MESHES = {
    "fsdp": (Mesh(dp_shard=2), MeshConfig(dp_shard=2)),
    "tp": (Mesh(tp=2), MeshConfig(tp=2)),
    "pp": (Mesh(pp=2), MeshConfig(pp=2)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from hf_peers import directory  # here, as ranks need no transformers

    return str(directory("llama-bias", tmp_path_factory.mktemp("hf"), torch.bfloat16, num_hidden_layers=2))


def config(folder, mesh=MeshConfig(), rank=0):  # noqa: B008
    model = open_directory(folder).model
    plain = {"recipe": Recipe(compile=False), "schedule": Cosine(warmup=0)}
    return Config(model=model, init=Init(from_hf=folder), mesh=mesh, lora=Lora(rank=rank), **plain)


def wrong_shards(connection: Connection, cfg: Config, mutant: bool = False) -> list[str]:
    """Parameters of which this rank does not hold its part of the whole."""

    def begin(directory, path, box=None):
        return real(directory, path, Box((0,) * len(box.shape), box.shape))

    real = Directory.parameter
    step = recipe(cfg, connection=connection)
    with patch.object(Directory, "parameter", begin if mutant else real):
        params = first_parameters(cfg, step, torch.device("cpu"))
    whole, placement = open_directory(cfg.init.from_hf), step.execution.layout.placement
    found = dict(tree.items(params))
    return [
        path
        for path, leaf in found.items()
        if path in whole.names
        and not torch.equal(leaf.to_local(), whole.parameter(path)[placement.box(path).slices])
    ] + ([] if found else ["nothing"])  # fmt: skip


@pytest.mark.parametrize("name", MESHES)
def test_each_rank_has_its_part(name, folder, pool):
    mesh, settings = MESHES[name]
    assert not any(pool.run(wrong_shards, config(folder, settings), mesh=mesh))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", [*MESHES, *EXPERTS])
def test_each_rank_has_its_part_of_the_experts(name, stacked, tmp_path, pool):
    from hf_peers import peer

    peer("olmoe", num_hidden_layers=2).save_pretrained(tmp_path, save_original_format=not stacked)
    mesh, settings = (MESHES | EXPERTS)[name]
    assert not any(pool.run(wrong_shards, config(str(tmp_path), settings), mesh=mesh))


def test_the_law_bites(folder, pool):
    mesh, settings = MESHES["fsdp"]
    assert any(pool.run(wrong_shards, config(folder, settings), True, mesh=mesh))


def test_adapters_are_new_and_the_rest_is_read(folder):
    cfg = config(folder, rank=2)
    params = first_parameters(cfg, recipe(cfg), torch.device("cpu"))
    plain = first_parameters(replace(cfg, lora=Lora()), recipe(cfg), torch.device("cpu"))
    assert params.keys() - plain.keys() == {"lora"}
    assert all(torch.equal(x, tree.at(params, path)) for path, x in tree.items(plain))
    assert not tree.at(params, "lora.blocks.0.attention.w_q.b").any()
    assert tree.flatten(plain).keys() == tree.flatten(transformer.specs(cfg.model)).keys()
