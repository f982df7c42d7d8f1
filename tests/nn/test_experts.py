"""Experts and routers by themselves: products, rows, capacities, groups, losses, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.core.chain import PLAIN, Backend
from olmo_fn.core.compile import compile
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.primitive import primitive
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, Model, dense
from olmo_fn.models.settings.moe import MoE
from olmo_fn.nn.context import Context
from olmo_fn.nn.experts import Work, by_experts, grouped_gradient, grouped_mm, rows_of, rows_of_some, slots_of, take, written
from olmo_fn.nn.experts import put as put_rows
from olmo_fn.nn.moe import MoEForm, active
from olmo_fn.nn.router import RouterForm, choose, route
from olmo_fn.spec import init
from olmo_fn.train.check_mesh import check_layout


def context(tape: bool) -> Context:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    return Context(Backend(primitive=primitive) if tape else PLAIN, ids, None, torch.arange(6))


# --- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("width", [8, 7], ids=["aligned", "odd"])
def test_products_of_groups_are_those_of_each(dtype: torch.dtype, width: int) -> None:
    """torch's grouped product, the loop and the padded one; an expert without rows among them."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([3, 0, 5, 2])
    x, d_y = torch.randn(10, width, generator=generator).to(dtype), torch.randn(10, 16, generator=generator).to(dtype)
    w = torch.randn(4, width, 16, generator=generator).to(dtype)
    sizes = counts.tolist()
    wanted = torch.cat([part @ w[e] for e, part in enumerate(x.split(sizes))])
    close = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(grouped_mm(x, w, counts), wanted, **close)
    torch.testing.assert_close(
        grouped_mm(d_y, w.mT, counts), torch.cat([d @ w[e].T for e, d in enumerate(d_y.split(sizes))]), **close
    )
    products = torch.stack([a.T @ b for a, b in zip(x.split(sizes), d_y.split(sizes), strict=True)])
    torch.testing.assert_close(grouped_gradient(x, d_y, counts, 4), products, **close)
    even, d_even = x[:8], d_y[:8]
    torch.testing.assert_close(grouped_mm(even, w, 2), grouped_mm(even, w, torch.tensor([2, 2, 2, 2])), **close)
    torch.testing.assert_close(
        grouped_gradient(even, d_even, 2, 4), grouped_gradient(even, d_even, torch.tensor([2, 2, 2, 2]), 4), **close
    )


def test_what_a_kernel_leaves_unwritten_is_zero() -> None:
    """Whatever is there for an expert without rows, NaN included."""
    found = torch.full((3, 2, 2), torch.nan)
    found[1] = 1.0
    assert written(found, torch.tensor([0, 4, 0])).sum((1, 2)).tolist() == [0.0, 4.0, 0.0]


def test_no_rows_at_all() -> None:
    nothing = torch.zeros(4, dtype=torch.int64)
    assert grouped_mm(torch.zeros(0, 8), torch.ones(4, 8, 16), nothing).shape == (0, 16)
    assert grouped_gradient(torch.zeros(0, 8), torch.zeros(0, 16), nothing, 4).abs().sum() == 0


# --- rows -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**31), st.floats(0, 1))
def test_rows_and_choices_are_each_others(N: int, k: int, E: int, seed: int, share: float) -> None:
    """Every kept choice has one row, among those of its expert, in the order of tokens; `put` is the transpose of `take`."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(E, (N, k), generator=generator)
    kept = torch.rand(N, k, generator=generator) < share
    most = max(1, int(torch.bincount(experts[kept], minlength=E).max()) if kept.any() else 1)
    x = torch.randn(N, 2, generator=generator, dtype=torch.float64)
    padded = rows_of_some(experts, E, kept, 4, 0)
    assert (padded.counts % 4 == 0).all()
    for rows in (rows_of(experts, E), rows_of_some(experts, E, kept, 1, 0), padded, slots_of(experts, E, kept, most)):
        chosen = torch.ones_like(kept) if rows.whole else kept
        of = experts.flatten()
        sizes = [rows.counts] * E if isinstance(rows.counts, int) else rows.counts.tolist()
        assert sum(sizes) == len(rows.choice)
        for e, part in enumerate(rows.choice.split(sizes)):
            real = part[part >= 0]
            assert (of[real] == e).all()
            assert real.tolist() == sorted(real.tolist())
        assert sorted(rows.choice[rows.choice >= 0].tolist()) == chosen.flatten().nonzero().flatten().tolist()
        taken = take(x, rows, k)
        y = torch.randn(taken.shape, generator=generator, dtype=torch.float64)
        back = put_rows(y, rows, k)
        assert (taken * y).sum().item() == pytest.approx((x * back).sum().item(), abs=1e-9)
        wanted = torch.zeros_like(x).index_add_(
            0, torch.arange(N).repeat_interleave(k)[chosen.flatten()], y[rows.row[chosen.flatten()]]
        )
        torch.testing.assert_close(back, wanted)


@pytest.mark.parametrize(("limit", "multiple"), [(None, 1), (None, 4), (2, 1)], ids=["dropless", "padded", "capacity"])
def test_the_tape_and_the_definition_agree(limit: int | None, multiple: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results, and the derivatives of tokens, weights and matrices."""
    monkeypatch.setattr("olmo_fn.nn.experts.rows_at_once", lambda x: multiple)
    generator = torch.Generator().manual_seed(0)
    N, k, E, D, H = 12, 2, 4, 6, 5
    x, weights = (torch.randn(N, n, generator=generator, dtype=torch.float64) for n in (D, k))
    matrices = tuple(torch.randn(E, *shape, generator=generator, dtype=torch.float64) for shape in ((D, H), (D, H), (H, D)))
    experts = torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(N)])
    rank = torch.stack([(experts.flatten()[:i] == experts.flatten()[i]).sum() for i in range(N * k)]).view(N, k)
    kept = None if limit is None else rank < limit
    found = []
    for tape in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weights, *matrices)]
        work = Work(leaves[0], experts, leaves[1], E, tuple(leaves[2:]), "silu", kept, limit or 0)  # type: ignore[arg-type]
        y = by_experts(context(tape), work)()
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# --- routers ----------------------------------------------------------------------------------------------------------


def test_groups_are_those_whose_two_best_add_up_to_the_most() -> None:
    """DeepSeek-V3, by its definition."""
    scores = torch.rand(50, 12, generator=torch.Generator().manual_seed(0))
    form = RouterForm(experts=12, top_k=3, groups=4, top_groups=2)
    for token, row in zip(choose(form, scores), scores, strict=True):
        sums = [row[3 * g : 3 * g + 3].topk(2).values.sum().item() for g in range(4)]
        best = sorted(range(4), key=lambda g: -sums[g])[:2]
        allowed = [e for e in range(12) if e // 3 in best]
        assert token.tolist() == sorted(allowed, key=lambda e: -row[e].item())[:3]


def test_scores_weights_and_losses_by_their_formulas() -> None:
    x = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    w = torch.randn(5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    form = RouterForm(experts=4, top_k=2, gating="sigmoid", weight_norm=2.0, weight_scale=3.0, balance=0.5, z=0.25, biased=True)
    bias = torch.tensor([0.0, 0.5, 0.0, -0.5], dtype=torch.float64)
    found = route(context(False), form, {"w_router": w, "router_bias": bias}, x)
    logits = x @ w
    scores = torch.sigmoid(logits) + 1e-7
    chosen = (scores + bias).topk(2).indices
    assert torch.equal(found.experts, chosen)
    raw = scores.gather(-1, chosen)
    torch.testing.assert_close(found.weights, 3 * raw / raw.norm(dim=-1, keepdim=True))
    share, loads = scores / scores.sum(-1, keepdim=True), torch.bincount(chosen.flatten(), minlength=4).double()
    balance = 0.5 * 4 / 2 * (loads * share.mean((0, 1))).sum()
    z = 0.25 * logits.logsumexp(-1).square().sum()
    torch.testing.assert_close(found.loss, balance + z)
    assert found.metrics["load"].tolist() == loads.tolist()
    entropy = -(share * share.log()).sum()
    torch.testing.assert_close(found.metrics["router_entropy"], entropy)
    each = route(context(False), replace(form, balance_over="sequence", z=0.0), {"w_router": w, "router_bias": bias}, x)
    counts = F.one_hot(chosen, 4).sum((1, 2)).double()
    torch.testing.assert_close(each.loss, 0.5 * 4 / 2 * (counts * share.mean(1)).sum())


def test_jitter_is_drawn_by_the_numbers_of_tokens_and_not_without_them() -> None:
    x, w = torch.ones(2, 6, 5), torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    form, ctx = RouterForm(experts=4, top_k=1, jitter=0.1), context(False)
    still = route(ctx, form, {"w_router": w}, x)
    assert (still.weights == still.weights[0, 0]).all()
    drawn = [
        route(replace(ctx, rows=torch.tensor(rows), columns=torch.arange(6)), form, {"w_router": w}, x).weights
        for rows in ([3, 4], [3, 4], [4, 3])
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0].flip(0), drawn[2])
    assert len(drawn[0].unique()) > 6


# --- models -----------------------------------------------------------------------------------------------------------


def model_of(**moe) -> Model:
    settings = {"num_experts": 4, "top_k": 2, "expert_size": 6} | moe
    return Model(8, 2, 16, block=Block(mixer=Attention(n_heads=2), feed_forward=MoE(**settings)))


def test_flops_are_those_of_the_experts_that_a_token_meets() -> None:
    one, alone = (
        transformer.layers(model_of())[0].sublayers[1],
        transformer.layers(dense(8, 2, 2, 12, vocab_size=16))[0].sublayers[1],
    )
    assert one.flops(10) == alone.flops(10) + 2 * 10 * 8 * 4, "two experts of 6 are one network of 12, and the router"
    form = MoEForm(
        d_model=8, router=RouterForm(experts=4, top_k=2), hidden=6, std=1.0, std_down=1.0, shared=3, shared_mix="gate", latent=4
    )
    assert active(form) == 8 * 4 + 2 * 3 * 4 * 6 + 3 * 8 * 3 + 8 + 2 * 8 * 4


def test_one_expert_of_one_is_a_dense_network() -> None:
    """With a weight of 1: the same numbers as the feed-forward network it is."""
    sparse = model_of(num_experts=1, top_k=1, expert_size=12, balance_loss=0.0, router_z_loss=0.0)
    plain = dense(8, 2, 2, 12, vocab_size=16, last_layer_full=True)
    params, batch = init(transformer.specs(sparse), 0), {"input_ids": torch.arange(12).view(2, 6)}
    blocks = {}
    for i, block in params["blocks"].items():
        moe = block["moe"]["experts"]
        rest = {name: leaf for name, leaf in block.items() if not name.startswith("moe")}
        blocks[i] = {**rest, "feed_forward": {name: w[0] for name, w in moe.items()}, "feed_forward_norm": block["moe_norm"]}
    wanted = transformer.logits(plain, {**params, "blocks": blocks}, batch)
    torch.testing.assert_close(transformer.logits(sparse, params, batch), wanted)


def test_compiled_is_eager(tmp_path) -> None:
    """Law 5, with numbers of rows that change from step to step."""
    model, step = model_of(capacity_factor=0.75), None
    params = init(transformer.specs(model), 0)
    for seed in range(2):
        ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
        wanted, _ = pipe(transformer.loss(model), grad())(params, batch)
        step = step or pipe(transformer.loss(model), grad())
        found, _ = step(params, batch, compiled(tmp_path))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def compiled(folder):
    """The execution of a compiled step."""
    from olmo_fn.optim import adamw

    return pipe(transformer.loss(model_of()), grad(), adamw(1e-3), compile(folder)).execution


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"top_k": 5}, "--model.top-k is 5, and there are 4 experts (--model.num-experts); choose 4 or fewer"),
        ({"top_k": 0}, "--model.top-k is 0; it must be at least 1"),
        ({"capacity_factor": 0.0}, "--model.capacity-factor is 0.0; it must be positive"),
        ({"expert_groups": 3}, "--model.expert-groups 3 does not divide --model.num-experts 4; choose 1, 2, 4"),
        ({"expert_groups": 2, "top_groups": 3}, "--model.top-groups is 3, and there are 2 groups (--model.expert-groups)"),
        (
            {"expert_groups": 2, "top_k": 3},
            "--model.top-k 3 experts are not in --model.top-groups 1 groups of 2; choose 2 groups or more",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(moe: dict, message: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        model_of(**moe).check()
    assert str(error.value) == message


def test_meshes_that_cannot_share_the_experts_are_refused() -> None:
    how = {"batch_size": 8, "sequence_length": 16}
    with pytest.raises(ValueError, match=r"--model.num-experts 4 is not a multiple of --mesh.ep 3.* choose --mesh.ep 1, 2, 4"):
        check_layout(model_of(), Mesh(dp_shard=3, ep=3), DEFAULT, **how | {"batch_size": 9})
    with pytest.raises(ValueError, match=r"--mesh.ep is 2, and the model has no experts; leave --mesh.ep at 1"):
        check_layout(dense(8, 2, 2, 12), Mesh(dp_shard=2, ep=2), DEFAULT, **how)
    with pytest.raises(ValueError, match=r"--mesh.ep 2 does not divide --mesh.dp-shard 3, of whose ranks it is; choose 1, 3"):
        Mesh(dp_shard=3, ep=2)
