"""What is planned on paper is what a real step does: bytes at the largest moment, and every collective."""

from __future__ import annotations

from dataclasses import replace

import plan_ranks
import pytest
import torch

from olmo_fn.mesh.axis import NAMES, Axis
from olmo_fn.mesh.collectives import all_gather
from olmo_fn.mesh.mesh import Mesh, members
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.config import Attention, Model, SwiGLU, dense
from olmo_fn.models.count import flops_per_sequence
from olmo_fn.models.settings.moe import MoE
from olmo_fn.nn.attention import causal_pairs
from olmo_fn.nn.norm import Norm
from olmo_fn.planner.clock import clock
from olmo_fn.planner.estimate import profile_of
from olmo_fn.planner.memory import peak_memory
from olmo_fn.planner.plan_input import PlanInput, check
from olmo_fn.planner.profile import profile
from olmo_fn.planner.trace import Trace, Traffic
from olmo_fn.planner.traffic import traffic
from olmo_fn.train.accelerators import ACCELERATORS
from olmo_fn.train.config import CHOICES, Config, Lora, Recipe, Run
from olmo_fn.train.optimizers import OptimizerSettings

CONTROL = 100  # bytes of scalars that come and go


MODEL_FIELDS = {name for part in (Model, Attention, SwiGLU) for name in part.__dataclass_fields__}


def plan_of(mesh=Mesh(), options=None, optim=None, lora=Lora(), moe=None, **recipe):  # noqa: B008
    fields = {"d_model": 64, "n_layers": 5, "n_heads": 4, "n_kv_heads": 2, "hidden_size": 161, "vocab_size": 501}
    fields |= {name: recipe.pop(name) for name in list(recipe) if name in MODEL_FIELDS}
    given = {"batch_size": 8, "sequence_length": 128, "compile": False, "dtype": "float32"} | recipe
    fields_of_optim = {"name": "adamw", **(optim or {})}
    optim = CHOICES[OptimizerSettings][fields_of_optim["name"]](**fields_of_optim)
    parts = {"mesh": MeshConfig(**mesh.degrees, **(options or {})), "optim": optim, "lora": lora}
    model = dense(**fields)
    if moe is not None:
        experts = MoE(**{"num_experts": 8, "top_k": 2, "expert_size": 48} | moe)
        model = replace(model, block=replace(model.block, feed_forward=experts))
    return check(PlanInput(Config(model, recipe=Recipe(**given), run=Run(steps=5000), **parts), mesh, "cpu"))


def dtype_of(plan):
    return getattr(torch, plan.dtype)


# --- one process ------------------------------------------------------------------------------------------------------

ALL = {"num_experts": 4, "top_k": 4}
"""Every token goes to all experts, so that their loads are even, as a plan has them, whatever the router has learned."""
ROOM = {"capacity_factor": 1.0}
"""Rows have places of a fixed number, whatever the router does."""

SINGLE = {
    "plain": {},
    "bf16": {"dtype": "bfloat16"},
    "remat": {"remat": "full"},
    "remat of all but attention": {"remat": "selective"},
    "remat of feed-forward": {"remat": "feed_forward"},
    "remat of every second, deep": {"remat": "every-2", "n_layers": 8},
    "remat, offloaded": {"remat": "full", "offload": True, "n_layers": 7},
    "remat of all but attention, offloaded": {"remat": "selective", "offload": True, "n_layers": 7},
    "accumulate, ema": {"accumulate": 2, "ema": 0.9},
    "accumulate bf16": {"accumulate": 2, "dtype": "bfloat16", "batch_size": 2},
    "bf16, the update": {"dtype": "bfloat16", "batch_size": 1, "vocab_size": 5000},
    "windows": {"n_layers": 7, "window_pattern": (32, 32, -1)},
    "tied, bf16 moments": {"tie_embeddings": True, "dtype": "bfloat16", "optim": {"moments": "bfloat16"}},
    "wide": {"d_model": 192, "hidden_size": 500, "vocab_size": 2000, "n_layers": 2},
    "muon": {"optim": {"name": "muon"}},
    "lora": {"lora": Lora(rank=4), "accumulate": 2},
    "experts": {"moe": {}, "accumulate": 2},
    "experts in bf16, remat": {"moe": {**ALL, "balance_rate": 0.1}, "dtype": "bfloat16", "remat": "full"},
    "experts with a capacity": {"moe": {"capacity_factor": 1.0, "shared_size": 32}, "remat": "selective"},
    "frozen": {"freeze": ("embed", "blocks.0.*"), "accumulate": 2},
    "one of many blocks frozen": {"freeze": ("blocks.2.*",), "n_layers": 7, "accumulate": 2},
}


def shared_groups(mesh: Mesh, traffic: Traffic) -> Traffic:
    """The same with every axis called by the first in `Axes` over the same ranks, as these share a process group."""
    lines: dict[tuple[int, ...], str] = {}
    for name in NAMES:
        lines.setdefault(mesh.ranks(members(name), 0), name)
    found = Traffic()
    for (axis, kind, unit), n in traffic.items():
        found[lines[mesh.ranks(members(axis), 0)], kind, unit] += n
    return found


@pytest.mark.parametrize("fields", SINGLE.values(), ids=SINGLE.keys())
def test_memory_of_one_process(fields):
    """The peak of a real step, state, gradients, activations, scratch and all: to the byte, not only within 10 %."""
    plan = plan_of(**fields)
    planned = peak_memory(plan, profile_of(plan)).total
    measured = plan_ranks.single_peak(plan.cfg, dtype_of(plan))
    assert planned == pytest.approx(measured, rel=0.002, abs=CONTROL)


# --- several processes ------------------------------------------------------------------------------------------------

LAYOUTS = {
    "fsdp": (Mesh(dp_shard=2), {}, {}),
    "fsdp bf16, remat, accumulate": (Mesh(dp_shard=2), {}, {"dtype": "bfloat16", "remat": "full", "accumulate": 2}),
    "fsdp, remat of all but attention": (Mesh(dp_shard=2), {}, {"remat": "selective"}),
    "zero-2": (Mesh(dp_shard=2), {"weights": "zero-2"}, {}),
    "fsdp, whole table": (Mesh(dp_shard=2), {"embedding": "table"}, {}),
    "fsdp, two ahead": (Mesh(dp_shard=2), {"prefetch": 2}, {"n_layers": 8}),
    "hsdp, reduced in bf16": (Mesh(dp_replicate=2, dp_shard=2), {"reduce_dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    "ddp": (Mesh(dp_replicate=2), {}, {}),
    "hsdp": (Mesh(dp_replicate=2, dp_shard=2), {}, {"remat": "feed_forward"}),
    "tp": (Mesh(tp=2), {}, {}),
    "fsdp x tp, tied": (Mesh(dp_shard=2, tp=2), {}, {"tie_embeddings": True, "dtype": "bfloat16", "remat": "every-2"}),
    "fsdp, muon": (Mesh(dp_shard=2), {}, {"optim": {"name": "muon"}}),
    "fsdp x tp, normuon": (Mesh(dp_shard=2, tp=2), {}, {"optim": {"name": "normuon"}}),
    "pp x fsdp, muon": (Mesh(pp=2, dp_shard=2), {}, {"optim": {"name": "muon"}}),
    "cp gather": (Mesh(cp=2), {}, {}),
    "cp ulysses": (Mesh(cp=2), {"cp_method": "ulysses"}, {}),
    "cp ring x fsdp": (Mesh(dp_shard=2, cp=2), {"cp_method": "ring"}, {}),
    "pp x fsdp": (Mesh(pp=2, dp_shard=2), {"pp_schedule": "gpipe"}, {"remat": "full"}),
    "pp x fsdp, rows": (Mesh(pp=2, dp_shard=2), {"embedding": "rows"}, {}),
    "pp, tied": (Mesh(pp=2), {}, {"tie_embeddings": True, "accumulate": 2}),
    "pp x tp, zero bubble": (Mesh(pp=2, tp=2), {"pp_schedule": "zero_bubble"}, {}),
    "pp x ddp, interleaved": (Mesh(pp=2, dp_replicate=2), {"pp_schedule": "interleaved", "pp_chunks": 2}, {}),
    "experts, fsdp": (Mesh(dp_shard=2), {}, {"moe": {}}),
    "ep": (Mesh(dp_shard=2, ep=2), {}, {"moe": ROOM}),
    "ep, exchange": (Mesh(dp_shard=2, ep=2), {}, {"moe": ALL | {"dispatch": "exchange"}, "accumulate": 2}),
    "ep, gather": (Mesh(dp_shard=2, ep=2), {}, {"moe": ALL | {"dispatch": "gather"}, "dtype": "bfloat16"}),
    "ep, a capacity of the batch": (
        Mesh(dp_shard=2, ep=2),
        {},
        {"moe": ROOM | {"capacity_over": "batch", "shared_size": 32}, "dtype": "bfloat16", "remat": "full"},
    ),
    "ep x fsdp, a bias": (Mesh(dp_shard=4, ep=2), {}, {"moe": ROOM | {"balance_rate": 0.1}, "accumulate": 2}),
    "ep x replicas": (Mesh(dp_replicate=2, dp_shard=2, ep=2), {}, {"moe": ROOM, "remat": "selective"}),
    "ep x tp": (Mesh(dp_shard=2, tp=2, ep=2), {}, {"moe": ALL | {"dispatch": "exchange"}}),
    "ep x cp": (Mesh(dp_shard=2, cp=2, ep=2), {}, {"moe": ROOM}),
    "ep x pp, a dense layer": (Mesh(pp=2, dp_shard=2, ep=2), {}, {"moe": ROOM | {"dense_layers": 1, "dense_size": 161}}),
    "ep x pp, zero bubble": (
        Mesh(pp=2, dp_shard=2, ep=2),
        {"pp_schedule": "zero_bubble"},
        {"moe": ALL | {"balance_over": "sequence"}},
    ),
    "ep x fsdp, muon": (Mesh(dp_shard=4, ep=2), {}, {"moe": ROOM, "optim": {"name": "muon"}}),
}


SLOW = {
    *("fsdp, remat of all but attention", "fsdp, two ahead", "hsdp, reduced in bf16", "ddp", "fsdp, muon", "cp gather"),
    *("pp x fsdp", "pp x fsdp, rows", "experts, fsdp", "ep x replicas", "ep x fsdp, muon"),
}
"""Each is like another one but for a part that a third one has."""


@pytest.mark.parametrize(
    ("mesh", "options", "fields"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in LAYOUTS.items()],
)
def test_traffic_and_memory_of_ranks(pool, mesh, options, fields):
    """Counts and bytes of all collectives are exact; memory is within 1 %, in a pipeline 10 %."""
    plan = plan_of(mesh, options, **fields)
    found = profile_of(plan)
    counted, peaks = zip(*pool.run(plan_ranks.rank_step, plan.cfg, dtype_of(plan), mesh=mesh), strict=True)
    each = mesh.size // mesh.pp
    for rank in range(mesh.pp):
        planned = {}
        for (axis, kind, unit), n in shared_groups(mesh, traffic(plan, found, rank)).items():
            if kind != "send":  # counted apart: point to point
                key = axis, "all_to_all" if kind == "ring_shift" else kind
                count, size = planned.get(key, (0, 0))
                planned[key] = (count + n, size) if unit == "calls" else (count, size + n)
        assert planned == counted[rank * each]
        measured = max(peaks[rank * each : (rank + 1) * each])
        assert peak_memory(plan, found, rank).total == pytest.approx(measured, rel=0.1 if mesh.pp > 1 else 0.01)


def test_uneven_loads_are_those_of_the_plan_together(pool):
    """Dropless, a rank receives what the router happens to send it. Each sends as many rows as it has choices, so that all
    ranks together send what they would if loads were even.
    """
    mesh = Mesh(dp_shard=2, ep=2)
    plan = plan_of(mesh, moe={"dispatch": "exchange"})
    planned = shared_groups(mesh, traffic(plan, profile_of(plan)))
    real = [counted for counted, _ in pool.run(plan_ranks.rank_step, plan.cfg, dtype_of(plan), mesh=mesh)]
    rows = ("dp_shard", "all_to_all")
    assert real[0][rows] != real[1][rows]
    for axis, kind in real[0]:
        counted = [one[axis, kind] for one in real]
        assert {calls for calls, _ in counted} == {planned[axis, kind, "calls"]}
        assert sum(size for _, size in counted) == 2 * planned[axis, kind, "bytes"]


@pytest.mark.parametrize("dispatch", ["exchange", "gather"])
def test_a_skew_is_what_the_busiest_rank_does(pool, dispatch):
    """A router of zeros sends every token to the first two of four experts, which are both on the first of two ranks."""
    mesh = Mesh(dp_shard=2, ep=2)
    plan = plan_of(mesh, moe={"num_experts": 4, "dispatch": dispatch}, init_std=0.0)
    (counted, busiest), (_, idle) = pool.run(plan_ranks.rank_step, plan.cfg, dtype_of(plan), mesh=mesh)
    even, skewed = (replace(plan, cfg=replace(plan.cfg, skew=skew)) for skew in (1.0, 2.0))
    sent = shared_groups(mesh, traffic(skewed, profile_of(skewed)))
    assert counted == {
        (axis, kind): (n, sent[axis, kind, "bytes"]) for (axis, kind, unit), n in sent.items() if unit == "calls"
    }
    assert peak_memory(skewed, profile_of(skewed)).total == pytest.approx(busiest, rel=0.01)
    assert idle < peak_memory(even, profile_of(even)).total < busiest
    ours, theirs = (clock(one, profile_of(one), ACCELERATORS["h100"]) for one in (even, skewed))
    experts = 3 * 2 * 3 * 64 * 48 * 2 * 128 * plan.rows * plan.cfg.model.n_layers  # products, 2, matrices, two for a token
    assert theirs.products - ours.products == experts
    more = replace(plan, cfg=replace(plan.cfg, skew=9.0))
    assert peak_memory(more, profile_of(more)).total == peak_memory(skewed, profile_of(skewed)).total  # there are no more


def test_a_skew_of_no_experts_is_refused():
    plan = plan_of()
    with pytest.raises(ValueError, match=r"--skew 2 is of the tokens for experts, and the model has none"):
        check(replace(plan, cfg=replace(plan.cfg, skew=2.0)))


def test_a_block_stands_for_all_of_its_kind():
    """Depth is put together from pieces: tracing every block gives the same, to the byte."""
    for fields in (
        {"n_layers": 9},
        {"n_layers": 9, "remat": "every-3", "window_pattern": (16, -1), "accumulate": 2},
        {"n_layers": 9, "moe": {"dense_layers": 2}},
    ):
        plan = plan_of(Mesh(dp_shard=4, tp=2), batch_size=16, **fields)
        few = profile_of(plan)
        assert len(few.parts) < plan.cfg.model.n_layers + 2 == len(few.alike)
        full = profile(plan.cfg, plan.mesh, plan.rows, dtype_of(plan), plan.device, every_block=True)
        assert traffic(plan, few) == traffic(plan, full)
        assert peak_memory(plan, few).total == pytest.approx(peak_memory(plan, full).total, abs=CONTROL)


def test_many_sequences_are_planned_from_few():
    """Beyond `TRACED` positions a profile is extrapolated; tracing all of them gives the same."""
    plan = plan_of(Mesh(dp_shard=2, tp=2), batch_size=384, sequence_length=128)
    found, full = profile_of(plan), profile(plan.cfg, plan.mesh, plan.rows, dtype_of(plan), plan.device)
    assert traffic(plan, found) == traffic(plan, full)
    assert peak_memory(plan, found).total == pytest.approx(peak_memory(plan, full).total, rel=1e-3)
    ours, theirs = (clock(plan, one, ACCELERATORS["h100"]) for one in (found, full))
    assert (ours.products, ours.attention) == (theirs.products, theirs.attention)
    assert ours.seconds == pytest.approx(theirs.seconds, rel=1e-3)  # bytes moved: the head's first rows cost less than others


def test_planning_notices_a_change_of_the_step(monkeypatch):
    """A mutant of the step, a block that gathers once more than it should, is in the plan, as the plan is the step's own."""
    axis = Axis("tp", 2, 0, "tp")
    plan = plan_of(Mesh(tp=2))
    before = traffic(plan, profile_of(plan))["tp", "all_gather", "calls"]
    plain = Norm.add
    more = lambda self, ctx, p, x, y, factor: plain(self, ctx, p, x, y, factor) + 0 * all_gather(x, 0, axis)[:1]  # noqa: E731
    monkeypatch.setattr(Norm, "add", more)
    profile.cache_clear()
    after = traffic(plan, profile_of(plan))["tp", "all_gather", "calls"]
    profile.cache_clear()
    assert after == before + 2 * plan.cfg.model.n_layers


def test_an_uneven_exchange_is_no_ring_shift():
    """As experts send what they happen to have: only one that all goes to one rank is a shift."""
    for sent, kind in (([5, 0, 3], "all_to_all"), ([0, 8, 0], "ring_shift")):
        with Trace() as trace:
            torch.ops._c10d_functional.all_to_all_single(torch.empty(8, device="meta"), [2, 2, 2], sent, "cp")
        assert trace.seen.traffic == {("cp", kind, "calls"): 1, ("cp", kind, "bytes"): 32}


def on_gpu(**fields):
    return replace(plan_of(dtype="bfloat16", **fields), device="cuda")


@pytest.mark.parametrize(
    ("moe", "mesh"),
    [
        ({}, Mesh()),  # grouped products
        ({"expert_size": 42}, Mesh()),  # one product an expert: rows of 84 bytes are not what torch's grouped one takes
        (ROOM, Mesh()),  # a batch of products
        ({"shared_size": 16, "latent_size": 32, "dense_layers": 1}, Mesh(dp_shard=4, ep=4)),
        ({"dispatch": "gather"}, Mesh(dp_shard=2, tp=2, ep=2)),
    ],
    ids=str,
)
def test_flops_of_experts_are_those_of_the_model(moe, mesh):
    """For even loads, however they are multiplied; the router's counts too, which each rank of ``tp`` has for its positions."""
    plan = on_gpu(moe=moe, mesh=mesh, vocab_size=512)
    c, m, r = clock(plan, profile_of(plan), ACCELERATORS["h100"]), plan.cfg.model, plan.cfg.recipe
    pairs = m.n_layers * causal_pairs(r.sequence_length, None)
    attention = 4 * m.block.mixer.n_heads * m.block.mixer.width(m.d_model) * pairs * r.batch_size
    assert mesh.size * c.products == flops_per_sequence(m, r.sequence_length) * r.batch_size - 3 * attention
    assert mesh.size * c.attention == 3.5 * attention


def test_flops_are_those_of_the_model_and_what_attention_and_remat_add():
    plan = on_gpu(sequence_length=256, window_pattern=(100, -1))
    c = clock(plan, profile_of(plan), ACCELERATORS["h100"])
    m, r = plan.cfg.model, plan.cfg.recipe
    pairs = sum(causal_pairs(256, window) for window in (100, None, 100, None, None))
    attention = 4 * m.block.mixer.n_heads * m.block.mixer.width(m.d_model) * pairs * r.batch_size
    assert c.products == flops_per_sequence(m, 256) * r.batch_size - 3 * attention
    assert c.attention == 3.5 * attention  # backward makes five products, not four
    remat = on_gpu(sequence_length=256, window_pattern=(100, -1), remat="full")
    again = clock(remat, profile_of(remat), ACCELERATORS["h100"])
    head = 2 * m.vocab_size * m.d_model * 256 * r.batch_size
    assert again.products == c.products + (c.products - 3 * head) / 3
    assert again.attention == 4.5 * attention
    selective = on_gpu(sequence_length=256, window_pattern=(100, -1), remat="selective")
    kept = clock(selective, profile_of(selective), ACCELERATORS["h100"])
    assert (kept.products, kept.attention) == (again.products, c.attention)  # attention is not computed again
