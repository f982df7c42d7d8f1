"""Experts are exact in every layout (laws 2, 4 to 7, 9): routers, capacities, losses, biases and meshes, drawn and named."""

from __future__ import annotations

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
from olmo_fn.core import tape
from olmo_fn.core.pipe import accumulate, clip, ema, grad, pipe, skip_spikes
from olmo_fn.core.step import Step
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Placed, Rules, placements
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


def four(x: Tensor) -> int:
    """Rows of every expert in multiples, as bf16 on a CPU has them."""
    return 4


@pytest.mark.parametrize("name", ["ep 2, exchanged", "ep 2, gathered", "ep 2 x cp 2", "ep 2 x tp 2"])
def test_rows_without_a_token_change_nothing(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(Broken(pool, "olmo_fn.nn.experts.rows_at_once", four), layout, model) < 1e-11


def test_in_a_pipeline_losses_are_of_the_sequences_that_are_computed_at_once(pool: Pool) -> None:
    layout = Layout(Mesh(pp=2), pipeline=Pipeline("1f1b", 2))
    assert same(pool, layout, SIGMOID, parts=2) < 1e-11


@pytest.mark.parametrize(
    ("model", "how"),
    [
        (SIGMOID, {"engine": "func"}),
        (CAPACITY, {"engine": "func"}),
        (MANY, {"remat": "full"}),
        (SIGMOID, {"remat": "selective", "parts": 2}),
        (CAPACITY, {"remat": "full", "parts": 2}),
        (EXCHANGED, {"optim": "muon"}),
        (GATHERED, {"optim": "muon"}),
    ],
    ids=str,
)
def test_carried_out_otherwise(pool: Pool, model: Model, how: dict) -> None:
    assert same(pool, Layout(Mesh(dp_shard=2, ep=2)), model, **how) < 1e-10


# --- in one process ---------------------------------------------------------------------------------------------------


def gradients(model: Model, engine: str = "tape", remat: str = "none", parts: int = 1, batch=None):
    step = pipe(transformer.loss(model, z_loss=1e-3), grad(engine, remat, torch.float64), accumulate(parts))
    return step(init(transformer.specs(model), 0, torch.float64), batches(1)[0] if batch is None else batch)


ALL = {"sigmoid": SIGMOID, "capacity": CAPACITY, "capacity of a batch": OF_BATCH, "many": MANY, "groups": GATHERED}


@pytest.mark.parametrize("model", ALL.values(), ids=ALL)
@pytest.mark.parametrize("how", [{"engine": "func"}, {"remat": "full"}, {"remat": "selective"}, {"parts": 4}], ids=str)
def test_the_ways_to_a_gradient_agree(model: Model, how: dict) -> None:
    """Losses over a batch are of what is computed at once, and so is a capacity: those are no sums over parts."""
    if "parts" in how:
        model = with_moe(model, balance_over="sequence", capacity_over="sequence")
    (wanted, metrics), (found, others) = gradients(model), gradients(model, **how)
    for path, g in tree.items(wanted):
        assert torch.allclose(tree.at(found, path), g, rtol=1e-10, atol=1e-12), path
    assert all(torch.allclose(others[name], value, rtol=1e-10) for name, value in metrics.items())


def test_forward_derivatives_and_batches_of_models() -> None:
    """The plain form is differentiable as often as one likes, and goes through ``jvp`` and ``vmap``."""
    loss, batch = transformer.loss(with_moe(MANY, capacity_factor=0.7)), batches(1)[0]
    params = tree.flatten(init(transformer.specs(MANY), 0, torch.float64))
    drawn = torch.Generator().manual_seed(1)
    direction = {path: torch.randn(p.shape, dtype=p.dtype, generator=drawn) for path, p in params.items()}

    def of(flat):
        return loss(tree.unflatten(flat), batch)[0]

    gradient, along = torch.func.grad(of)(params), torch.func.jvp(of, (params,), (direction,))[1]
    assert along.item() == pytest.approx(sum((g * direction[path]).sum().item() for path, g in gradient.items()), rel=1e-9)
    two = {path: torch.stack((p, p + 1e-3 * direction[path])) for path, p in params.items()}
    alone = torch.stack([of({path: p[i] for path, p in two.items()}) for i in range(2)])
    assert torch.allclose(torch.func.vmap(of)(two), alone, rtol=1e-10)


# --- ties -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2, ep=2), Mesh(dp_shard=2, tp=2, ep=2), Mesh(dp_shard=2, cp=2, ep=2)], ids=str)
def test_ties_are_broken_alike(pool: Pool, mesh: Mesh) -> None:
    """All experts have the same score for every token of the first step: a router that is 0."""
    model = replace(model_of(capacity_factor=0.9, balance_rate=0.1), init_std=0.0)
    assert same(pool, Layout(mesh), model) < 1e-11
    _, metrics = gradients(model)
    assert metrics["load/0"].tolist() == [ROWS * LENGTH] * 2 + [0] * 2


# --- drawn ------------------------------------------------------------------------------------------------------------


@st.composite
def settings(draw: st.DrawFn) -> dict:
    E = draw(st.sampled_from([2, 4, 6]))
    shared = draw(st.sampled_from([0, 3]))
    return {
        "num_experts": E,
        "top_k": draw(st.integers(1, E)),
        "expert_size": draw(st.sampled_from([2, 5])),
        "gating": draw(st.sampled_from(["softmax", "sigmoid"])),
        "weight_norm": draw(st.sampled_from([None, 1.0, 2.0])),
        "capacity_factor": draw(st.sampled_from([None, 0.5, 1.25])),
        "capacity_over": draw(st.sampled_from(["sequence", "batch"])),
        "balance_over": draw(st.sampled_from(["sequence", "batch"])),
        "balance_rate": draw(st.sampled_from([0.0, 0.05])),
        "jitter": draw(st.sampled_from([0.0, 0.3])),
        "shared_size": shared,
        "shared_mix": draw(st.sampled_from(["add", "average", "gate"])) if shared else "add",
        "latent_size": draw(st.sampled_from([0, 4])),
        "dispatch": draw(st.sampled_from(["auto", "exchange", "gather"])),
    }


MESHES = (
    Mesh(dp_shard=2, ep=2),
    Mesh(dp_shard=2, tp=2, ep=2),
    Mesh(dp_shard=2, cp=2, ep=2),
    Mesh(dp_shard=4, ep=2),
    Mesh(dp_replicate=2, dp_shard=2, ep=2),
    Mesh(dp_shard=2, cp=2),
    Mesh(tp=2, dp_shard=2),
)


@examples(12)
@given(settings(), st.sampled_from(MESHES), st.sampled_from(["none", "full"]))
def test_any_experts_on_any_mesh(pool: Pool, drawn: dict, mesh: Mesh, remat: str) -> None:
    assert same(pool, Layout(mesh), model_of(**drawn), remat=remat) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [Mesh(dp_shard=8, ep=4), Mesh(dp_shard=8, ep=2), Mesh(dp_shard=4, tp=2, ep=4)], ids=str)
@examples(8)
@given(drawn=settings())
def test_eight_ranks(pool: Pool, mesh: Mesh, drawn: dict) -> None:
    """ep 4 x fsdp 2 among them."""
    experts = 4 * -(-drawn["num_experts"] // 4)
    assert same(pool, Layout(mesh), model_of(**drawn | {"num_experts": experts})) < 1e-10


# --- what it catches --------------------------------------------------------------------------------------------------


def twice(self, mesh):
    """Megatron's and torch's fault: the norm counts experts once for every rank that shares them."""
    return 1


def over_all_tokens(self, path):
    """A forgotten axis, the other way round: experts' gradients are summed over ranks that have other experts."""
    return [self.axes.tokens]


def over_none(self, path):
    return []


def of_this_rank(form, share, loads, axes):
    """A loss that depends on the layout: loads of this rank's tokens alone, as OLMo-core has it."""
    return form.experts / form.top_k * (loads.sum(0) * share.sum((0, 1)) / share[..., 0].numel()).sum()


def on_every_rank(x: Tensor, axis) -> Tensor:
    """A sum over an axis whose ranks all have it."""
    return psum(x, axis) * max(axis.size, 1)


def by_chance(scores: Tensor, k: int) -> Tensor:
    """Ties broken by where a token lies."""
    noise = torch.arange(scores.shape[-2], device=scores.device)[:, None] % 2 * 1e-13 * torch.arange(scores.shape[-1])
    return (scores + noise).sort(dim=-1, descending=True, stable=True).indices[..., :k]


EP, TP = Layout(Mesh(dp_shard=2, ep=2)), Layout(Mesh(dp_shard=2, tp=2, ep=2))
SUM_AXES = "olmo_fn.parallel.sharded_placement.ShardedPlacement.sum_axes"
MUTANTS = {
    "a norm that counts experts twice": (EXCHANGED, EP, "olmo_fn.mesh.placement.Placed.copies", twice),
    "sums over ranks of other experts": (
        EXCHANGED,
        EP,
        SUM_AXES,
        over_all_tokens,
    ),
    "a forgotten axis": (
        EXCHANGED,
        Layout(Mesh(dp_replicate=2, dp_shard=2, ep=2)),
        SUM_AXES,
        over_none,
    ),
    "a balance of each rank": (EXCHANGED, EP, "olmo_fn.nn.router.balance", of_this_rank),
    "a loss for every rank of tp": (SIGMOID, TP, "olmo_fn.nn.router.psum", on_every_rank),
    "ties by place": (replace(model_of(), init_std=0.0), TP, "olmo_fn.nn.router._largest", by_chance),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_fault_is_caught(pool: Pool, name: str) -> None:
    model, layout, target, mutant = MUTANTS[name]
    with pytest.raises(AssertionError, match=r"step \d, .* on rank \d differs by"):
        same(Broken(pool, target, mutant), layout, model)


def test_losses_doubled_by_rematerialisation_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-LM 1478: a loss that the second run of a segment adds once more."""
    _, metrics = gradients(SIGMOID)
    first: list[tape.Sums] = []
    real = tape.vjp_segment

    def counting_again(segment, weights, x, ctx, execution, cotangent, sums, late=False, stash=tape.stay):
        first.append(sums)
        return real(segment, weights, x, ctx, execution, cotangent, first[0], late, stash)

    assert gradients(SIGMOID, remat="full")[1]["router_z"] == pytest.approx(metrics["router_z"].item())
    monkeypatch.setattr(tape, "vjp_segment", counting_again)
    assert gradients(SIGMOID, remat="full")[1]["router_z"] == pytest.approx(2 * metrics["router_z"].item())


# --- saved on one mesh, loaded on another -----------------------------------------------------------------------------


def sharded_step(connection, model: Model, optim: str) -> Step:
    return shard(connection, transformer.specs(model))(recipe(model, optim))


def whole(state):
    return tree.map(lambda x: x.full_tensor() if hasattr(x, "full_tensor") else x, state)


def train_and_save(connection, model: Model, optim: str, folder: str):
    step = sharded_step(connection, model, optim)
    state, _ = step(step.init(init(transformer.specs(model), 0, torch.float64)), batches()[0])
    ranks = Ranks(connection.rank, connection.mesh.size, FileStore(f"{folder}/store", connection.mesh.size))
    save(state._asdict(), folder, step=1, ranks=ranks)
    return whole(state._asdict())


def load_and_compare(connection, model: Model, optim: str, path: str, wanted) -> bool:
    step = sharded_step(connection, model, optim)
    like = step.init(init(transformer.specs(model), 1, torch.float64))._asdict()
    found, _ = load(path, like, select=[*tree.flatten(like)])
    return same_bits(whole(found), wanted)


@pytest.mark.parametrize("optim", ["adamw", "muon"])
def test_a_checkpoint_of_any_mesh_is_one_of_any_other(pool: Pool, tmp_path: Path, optim: str) -> None:
    wanted = pool.run(train_and_save, SIGMOID, optim, str(tmp_path), mesh=Mesh(dp_shard=4, ep=2))[0]
    (path,) = tmp_path.glob("*1")
    alone, _ = load(path)
    assert same_bits(alone, wanted)
    assert any(tree.at(alone["params"], f"blocks.{i}.moe.router_bias").abs().max() > 0 for i in range(2))
    for mesh in (Mesh(), Mesh(dp_shard=2, cp=2, ep=2), Mesh(tp=2), Mesh(dp_shard=2)):
        assert all(pool.run(load_and_compare, SIGMOID, optim, str(path), wanted, mesh=mesh)), mesh


def in_two_halves(connection, model: Model) -> bool:
    """Two steps, and the second again from the state between them: the same bits (law 6)."""
    step = sharded_step(connection, model, "adamw")
    first, _ = step(step.init(init(transformer.specs(model), 0, torch.float64)), batches()[0])
    kept = tree.map(lambda x: x.clone(), first._asdict())
    once, _ = step(first, batches()[1])
    again, _ = step(type(first)(**kept), batches()[1])
    return same_bits(whole(once._asdict()), whole(again._asdict()))


def test_a_run_goes_on_with_the_bits_of_one_that_never_stopped(pool: Pool) -> None:
    assert all(pool.run(in_two_halves, SIGMOID, mesh=Mesh(dp_shard=2, ep=2)))


def test_placement_of_experts() -> None:
    """Experts over ep, their width over the rest of fsdp, their hidden width over tp; the router as everything else."""
    placed = placements(transformer.specs(MANY), DEFAULT, Mesh(dp_shard=4, tp=2, ep=2))
    assert placed["blocks.0.moe.experts.w_gate"].dims == (("ep", 0), ("edp", 1), ("tp", 2))
    assert placed["blocks.0.moe.experts.w_gate"].gathered == ("edp",)
    assert placed["blocks.0.moe.w_router"] == Placed((6, 8), (("fsdp", 0),))
    alone = placements(transformer.specs(MANY), DEFAULT, Mesh(dp_shard=4))
    assert alone["blocks.0.moe.experts.w_gate"].dims == (("fsdp", 1), ("tp", 2))
    assert Rules().store["experts"] == "ep"
