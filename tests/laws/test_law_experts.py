"""Experts are exact in every layout (laws 2, 4, 5, 7 and 9): routers, capacities, losses, biases and meshes, drawn and named."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import Broken, batch_of, examples, same_bits
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed import FileStore

from olmo_fn import tree
from olmo_fn.checkpoint import Ranks, load, save
from olmo_fn.core.pipe import accumulate, clip, ema, grad, pipe, skip_spikes
from olmo_fn.core.step import Step
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Placed, Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, Model
from olmo_fn.models.settings.moe import MoE
from olmo_fn.optim import adamw, partition
from olmo_fn.optim.muon import muon
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init
from olmo_fn.testing import Layout, Pool, assert_equivalent
from olmo_fn.transforms import balance_experts

ROWS, LENGTH, VOCAB = 8, 16, 11


def model_of(layers: int = 2, **moe) -> Model:
    settings = {"num_experts": 4, "top_k": 2, "expert_size": 5, "balance_loss": 0.1, "router_z_loss": 0.1} | moe
    block = Block(mixer=Attention(n_heads=2, n_kv_heads=2, head_dim=2), feed_forward=MoE(**settings))
    return Model(6, layers, VOCAB, block=block, init_std=0.3)


def recipe(model: Model, optim: str = "adamw", engine: str = "tape", remat: str = "none", parts: int = 1) -> Step:
    make = {"adamw": lambda: adamw(1e-2), "muon": lambda: by_matrices(model)}[optim]
    steps = [clip(0.1), make(), *([balance_experts(model.balance_rate)] if model.balance_rate else []), skip_spikes(), ema(0.9)]
    return pipe(transformer.loss(model, z_loss=1e-3), grad(engine, remat, torch.float64), accumulate(parts), *steps)


def by_matrices(model: Model):
    return partition({"matrix": muon(1e-2, dtype=torch.float64), "default": adamw(1e-2)}, transformer.specs(model))


def batches(n: int = 2):
    return [
        batch_of(VOCAB, rows=ROWS, length=LENGTH, seed=seed, masked=(0.9, 0.0, 0.5, 0.2))
        | {"rows": torch.arange(ROWS) + 9 * seed}
        for seed in range(n)
    ]


def same(pool: Pool, layout: Layout, model: Model, parts: int = 1, **how) -> float:
    """The largest difference to one process, which computes ``parts`` of a batch one after the other."""
    wanted = partial(recipe, model, parts=parts, **how)
    alone = partial(recipe, model, parts=1 if layout.mesh.pp > 1 else parts, **how)
    return assert_equivalent(alone, transformer.specs(model), [layout], batches(), reference=wanted, pool=pool)[0]


SIGMOID = model_of(gating="sigmoid", weight_norm=1.0, balance_rate=0.01, weight_scale=2.0)
CAPACITY = model_of(capacity_factor=0.7, balance_over="sequence")
OF_BATCH = model_of(capacity_factor=0.7, capacity_over="batch")
MANY = model_of(num_experts=8, top_k=3, shared_size=4, shared_mix="gate", latent_size=4, latent_norm=True, jitter=0.2)
EXCHANGED = model_of(dispatch="exchange", shared_size=4, shared_mix="average")
GATHERED = model_of(dispatch="gather", expert_groups=2, dense_layers=1, dense_size=7)


def with_moe(model: Model, **changes) -> Model:
    return replace(model, block=replace(model.block, feed_forward=replace(model.block.feed_forward, **changes)))


LAYOUTS = {
    "data parallel": (SIGMOID, Layout(Mesh(dp_replicate=2))),
    "sharded": (MANY, Layout(Mesh(dp_shard=2))),
    "ep 2, exchanged": (EXCHANGED, Layout(Mesh(dp_shard=2, ep=2))),
    "ep 2, gathered": (GATHERED, Layout(Mesh(dp_shard=2, ep=2))),
    "ep 2, a capacity of a sequence": (CAPACITY, Layout(Mesh(dp_shard=2, ep=2))),
    "ep 2, a capacity of a batch": (OF_BATCH, Layout(Mesh(dp_shard=2, ep=2))),
    "ep 2, a capacity, gathered": (with_moe(CAPACITY, dispatch="gather"), Layout(Mesh(dp_shard=2, ep=2))),
    "ep 2, a bias": (SIGMOID, Layout(Mesh(dp_shard=2, ep=2), Rules(keep_gathered=True))),
    "ep 2 x replicas": (SIGMOID, Layout(Mesh(dp_replicate=2, dp_shard=2, ep=2))),
    "ep 2 x fsdp 2": (EXCHANGED, Layout(Mesh(dp_shard=4, ep=2))),
    "ep 2 x tp 2": (MANY, Layout(Mesh(dp_shard=2, tp=2, ep=2))),
    "ep 2 x tp 2, a capacity": (OF_BATCH, Layout(Mesh(dp_shard=2, tp=2, ep=2))),
    "ep 2 x cp 2": (EXCHANGED, Layout(Mesh(dp_shard=2, cp=2, ep=2))),
    "ep 2 x cp 2, a capacity": (with_moe(CAPACITY, balance_rate=0.1), Layout(Mesh(dp_shard=2, cp=2, ep=2))),
    "ep 2 x cp 2, a capacity of a batch": (OF_BATCH, Layout(Mesh(dp_shard=2, cp=2, ep=2))),
    "ep 2 x pp 2": (
        with_moe(SIGMOID, balance_over="sequence"),
        Layout(Mesh(pp=2, dp_shard=2, ep=2), pipeline=Pipeline("1f1b", 2)),
    ),
    "ep 2 x pp 2, zero bubble": (CAPACITY, Layout(Mesh(pp=2, dp_shard=2, ep=2), pipeline=Pipeline("zero_bubble", 2))),
    "ep 4": (MANY, Layout(Mesh(dp_shard=4, ep=4))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_those_of_one_process(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(pool, layout, model) < 1e-11
