"""Any stage may add to the loss and report metrics: exactly, under every engine, layout and schedule (laws 2, 4, 5 and 9).

The feed-forward network here has the losses of a router (Zoph et al. 2022, ST-MoE) and a metric of every kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import tyro
from helpers import Broken, batch_of

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE, PLAIN, Aux, Metric
from olmo_fn.core.gradients import EAGER
from olmo_fn.core.pipe import accumulate, clip, grad, pipe
from olmo_fn.core.step import Step
from olmo_fn.core.tape import loss_sums, vjp_segment
from olmo_fn.mesh.collectives import all_gather, enter, pmax, psum
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models import transformer
from olmo_fn.models.blocks import Part
from olmo_fn.models.config import Attention, Block, FeedForwardSettings, Model, SwiGLU
from olmo_fn.models.transformer import _block_stage
from olmo_fn.nn.sublayer import Sublayer, with_aux
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.sharded import RankSharing
from olmo_fn.spec import Init, Spec, init
from olmo_fn.testing import Layout, Pool, assert_equivalent

E, SURE = 3, -0.3  # experts, and from which logarithm on a gate is sure of its expert
METRICS = {
    "balance": Metric("mean"),
    "sure": Metric("sum"),
    "top_gate": Metric("max"),
    "loads": Metric("sum", (E,)),
    "gates": Metric("mean", (E,)),
    "top_gates": Metric("max", (E,)),
}


def router(p, x):
    """Log-probabilities (B, T, E) of the experts, and the two losses of each token."""
    z = x.to(p["router"].dtype) @ p["router"]
    logp = z.log_softmax(-1)
    return logp, E * logp.exp().square().sum(-1), 0.1 * z.logsumexp(-1).square()


def report(logp, balance):
    """Every metric, as a stage reports it. Logarithms of gates are negative: a maximum must not start at 0."""
    loads = logp.argmax(-1).flatten().bincount(minlength=E)
    return {
        "balance": balance.sum(),
        "sure": (logp.amax(-1) > SURE).sum(),
        "top_gate": logp.max(),
        "loads": loads,
        "gates": logp.exp().sum((0, 1)),
        "top_gates": logp.amax((0, 1)),
    }


@dataclass(frozen=True)
class Routed(FeedForwardSettings):
    """Experts that are a gain each. Over ``tp`` whole on each rank, or divided: each rank routes its positions."""

    name: tyro.conf.Suppress[str] = "routed"
    over_tp: bool = False
    fault: str = ""

    def build(self, model: Model, layer: int) -> Sublayer:
        def apply(p, x, ctx):
            axes, tp = ctx.backend.axes, ctx.backend.axes.tp
            p = {name: enter(leaf, tp) for name, leaf in p.items()}  # each rank of tp uses them for its own positions
            logp, balance, z = router(p, x)
            loss, metrics = (balance + z).sum(), report(logp, balance)
            if self.fault == "counted by each rank of tp":
                loss = sum(part.sum() for part in router(p, all_gather(x, 1, tp))[1:])
            if self.fault == "a mean of means":
                loss = loss / (ctx.labels != IGNORE).sum().clamp(min=1) * 32
            if self.fault == "undeclared":
                metrics["entropy"] = loss
            reduce = {"max": pmax, "mean": psum, "sum": psum}
            metrics = {n: reduce[METRICS[n].how if n in METRICS else "sum"](v, tp) for n, v in metrics.items()}
            assert axes.tp.size == 1 or self.over_tp
            return x * (logp.exp() @ p["gain"]).to(x.dtype), Aux(psum(loss, tp), metrics)

        specs = {
            "router": Spec((model.d_model, E), ("embed", "experts"), Init("normal", 0.5)),
            "gain": Spec((E, model.d_model), ("experts", "embed"), Init("normal", 0.5)),
        }
        divided = ("tp", "cp") if self.over_tp else ("cp",)
        return Sublayer("routed", specs, apply, lambda T: 4 * T * model.d_model * E, divided=divided, metrics=METRICS)


def model_of(routed: Routed, *others: FeedForwardSettings, layers: int = 2) -> Model:
    """Layers of the one and the other feed-forward network in turn."""
    mixer = Attention(n_heads=2, n_kv_heads=2, head_dim=2)
    blocks = tuple(Block(mixer=mixer, feed_forward=each) for each in (routed, *others))
    return Model(6, layers, 11, pattern=blocks, init_std=0.3)


WHOLE, DIVIDED = model_of(Routed()), model_of(Routed(over_tp=True))
MIXED = model_of(Routed(), SwiGLU(hidden_size=5))  # the second half of it reports nothing


def recipe(model: Model, engine: str = "tape", remat: str = "none", parts: int = 1) -> Step:
    loss = transformer.loss(model, z_loss=1e-2)
    return pipe(loss, grad(engine, remat, torch.float64), accumulate(parts), clip(0.5), adamw(1e-2))


def batches(model: Model, n: int = 2):
    """Two steps of 4 x 8 tokens; rows have very different numbers of labels that count."""
    return [batch_of(model.vocab_size, rows=4, length=8, seed=seed, masked=(0.9, 0.0, 0.5, 0.2)) for seed in range(n)]


def same(pool, model, layout=None, reference=None, **how):
    """Law 2 for two steps; without a layout, two recipes in one process."""
    make, specs = partial(recipe, model, **how), transformer.specs(model)
    return assert_equivalent(make, specs, [layout or Layout(Mesh())], batches(model), reference=reference, pool=pool)[0]


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_loss_and_the_metrics_by_hand() -> None:
    """Cross-entropy of the logits, plus the routers' losses at what the routers saw, over the labels that count."""
    seen = []

    @dataclass(frozen=True)
    class Watched(Routed):
        def build(self, model, layer):
            sub = super().build(model, layer)

            def apply(p, x, ctx):
                seen.append((layer, p, x.detach()))
                return sub.apply(p, x, ctx)

            return replace(sub, apply=apply)

    model, (batch,) = model_of(Watched()), batches(WHOLE, 1)
    params = init(transformer.specs(model), 0, torch.float64)
    wanted = F.cross_entropy(transformer.logits(model, params, batch).flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    routed = [(layer, *router(p, x)) for layer, p, x in seen]
    assert [layer for layer, *_ in routed] == [0, 1]
    tokens = (batch["labels"] != IGNORE).sum()
    for _, _, balance, z in routed:
        wanted = wanted + balance.sum() + z.sum()
    gradients = pipe(transformer.loss(model), grad(dtype=torch.float64))
    _, metrics = gradients(params, batch)
    torch.testing.assert_close(metrics["loss"], wanted / tokens, rtol=1e-12, atol=0)
    torch.testing.assert_close(metrics["balance"], sum(balance.sum() for _, _, balance, _ in routed) / tokens)
    torch.testing.assert_close(metrics["top_gate"], max(logp.max() for _, logp, _, _ in routed))
    assert metrics["sure"] == sum((logp.amax(-1) > SURE).sum() for _, logp, _, _ in routed)
    assert metrics["loads/0"].sum() == metrics["loads/1"].sum() == batch["labels"].numel()
    for layer, logp, _, _ in routed:  # vectors of each layer by itself
        assert metrics[f"loads/{layer}"].tolist() == [(logp.argmax(-1) == e).sum() for e in range(E)]
        torch.testing.assert_close(metrics[f"gates/{layer}"], logp.exp().sum((0, 1)) / tokens)
        torch.testing.assert_close(metrics[f"top_gates/{layer}"], logp.amax((0, 1)))


def test_the_gradient_is_that_of_the_whole_loss() -> None:
    """Against autograd through the chain called as a function, and not zero without the cross-entropy's part."""
    (batch,) = batches(WHOLE, 1)
    params = init(transformer.specs(WHOLE), 0, torch.float64)
    leaves = {path: p.requires_grad_() for path, p in tree.items(params)}
    total, _ = transformer.loss(WHOLE)(params, batch)
    wanted = torch.autograd.grad(total / (batch["labels"] != IGNORE).sum(), list(leaves.values()))
    for engine in ("tape", "func"):
        grads, _ = pipe(transformer.loss(WHOLE), grad(engine, dtype=torch.float64))(
            tree.map(torch.Tensor.detach, params), batch
        )
        for (path, g), want in zip(tree.items(grads), wanted, strict=True):
            torch.testing.assert_close(g, want, rtol=1e-10, atol=1e-12, msg=path)


def test_evaluation_reports_the_same_sums() -> None:
    (batch,) = batches(WHOLE, 1)
    params = init(transformer.specs(WHOLE), 0, torch.float64)
    total, metrics = transformer.loss(WHOLE)(params, batch)
    sums = loss_sums(transformer.loss(WHOLE), params, batch, replace(EAGER, dtype=torch.float64))
    for name, value in {"loss": total, **metrics}.items():
        torch.testing.assert_close(sums[name], value.double(), rtol=1e-12, atol=0, msg=name)


# --- the laws ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [{"parts": 2}, {"parts": 4, "engine": "func"}, {"engine": "func"}, {"remat": "full"}, {"remat": "feed_forward"}],
    ids=str,
)
def test_invisible_in_one_process(pool: Pool, how: dict) -> None:
    """The engines agree; accumulation and rematerialisation change nothing, and nothing is counted twice."""
    for model in (WHOLE, MIXED):
        assert same(pool, model, reference=partial(recipe, model), **how) < 1e-12


LAYOUTS = {
    "ddp": (WHOLE, Layout(Mesh(dp_replicate=2))),
    "fsdp": (WHOLE, Layout(Mesh(dp_shard=2))),
    "cp": (WHOLE, Layout(Mesh(cp=2), Rules(cp_method="ring"))),
    "tp whole": (WHOLE, Layout(Mesh(tp=2))),
    "tp divided": (DIVIDED, Layout(Mesh(tp=2))),
    "fsdp tp divided": (DIVIDED, Layout(Mesh(dp_shard=2, tp=2))),
    "pp": (WHOLE, Layout(Mesh(pp=2), pipeline=Pipeline("1f1b", 2))),
    "pp, one stage reports": (MIXED, Layout(Mesh(pp=2), pipeline=Pipeline("1f1b", 2))),
    "pp interleaved": (model_of(Routed(), layers=4), Layout(Mesh(pp=2), pipeline=Pipeline("interleaved", 2, chunks=2))),
    "pp zero bubble": (WHOLE, Layout(Mesh(pp=2), pipeline=Pipeline("zero_bubble", 2))),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_on_every_layout(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(pool, model, layout) < 1e-12


@pytest.mark.parametrize("name", ["fsdp", "tp whole"])
def test_func_on_ranks_with_accumulation(pool: Pool, name: str) -> None:
    model, layout = LAYOUTS[name]
    assert same(pool, model, layout, engine="func", parts=2) < 1e-12


def test_rematerialised_on_a_pipeline(pool: Pool) -> None:
    model, layout = LAYOUTS["pp zero bubble"]
    assert same(pool, model, layout, remat="full", reference=partial(recipe, model)) < 1e-12


# --- what they catch --------------------------------------------------------------------------------------------------

total = RankSharing.total


def maxima_summed(self, sums, declared):
    return total(self, sums, {})


def maxima_from_0(self, like):
    zeros = {name: like.new_zeros(metric.shape) for name, metric in {"loss": Metric(), **self.declared}.items()}
    return {**zeros, "loss": self.total.detach(), **self.metrics}


def reports_twice(segment, weights, x, ctx, execution, cotangent, sums, late=False, stash=None):
    run = partial(vjp_segment, segment._replace(again=False), weights, x, ctx, execution, cotangent, sums, late)
    out, pullback = run()
    return out, (lambda d_out: run()[1](d_out)) if segment.again else pullback


@pytest.mark.parametrize(
    ("model", "layout", "fault"),
    [
        (DIVIDED, Layout(Mesh(tp=2)), "counted by each rank of tp"),
        (WHOLE, Layout(Mesh(dp_replicate=2)), "a mean of means"),
    ],
    ids=["tp", "ddp"],
)
def test_a_faulty_loss_is_caught(pool: Pool, model: Model, layout: Layout, fault: str) -> None:
    faulty = model_of(Routed(over_tp=model is DIVIDED, fault=fault))
    with pytest.raises(AssertionError, match=r"step 0, .* on rank \d differs by"):
        same(pool, faulty, layout)


def test_a_maximum_that_is_summed_is_caught(pool: Pool) -> None:
    broken = Broken(pool, "olmo_fn.parallel.sharded.RankSharing.total", maxima_summed)
    with pytest.raises(AssertionError, match=r"step 0, metric top_gate\S* on rank \d differs by"):
        same(broken, WHOLE, Layout(Mesh(dp_replicate=2)))


def test_a_maximum_of_ranks_that_have_none_is_caught(pool: Pool) -> None:
    model, layout = LAYOUTS["pp, one stage reports"]
    with pytest.raises(AssertionError, match=r"step 0, metric top_gate\S* on rank \d differs by"):
        same(Broken(pool, "olmo_fn.core.chain.Sums.complete", maxima_from_0), model, layout)


def test_a_metric_that_is_reported_twice_is_caught(pool: Pool) -> None:
    broken = Broken(pool, "olmo_fn.core.tape.vjp_segment", reports_twice)
    with pytest.raises(AssertionError, match=r"step 0, metric \S+ on rank 0 differs by"):
        same(broken, WHOLE, remat="full", reference=partial(recipe, WHOLE))


@pytest.mark.parametrize("engine", ["tape", "func"])
def test_a_metric_that_is_not_declared_is_refused_by_name(engine: str) -> None:
    model = model_of(Routed(fault="undeclared"))
    step = recipe(model, engine)
    with pytest.raises(
        ValueError, match=r"^stage 'feed_forward' reports the metric 'entropy' and declares balance, sure, .*it$"
    ):
        step(step.init(init(transformer.specs(model), 0, torch.float64)), batches(model)[0])


def test_two_meanings_of_a_name_are_refused() -> None:
    chain = transformer.loss(WHOLE)
    other = {"balance": Metric("max")}
    clash = chain.changed(lambda stage: stage._replace(metrics=other) if stage.block == 1 and stage.metrics else stage)
    with pytest.raises(ValueError, match=r"the metric 'balance' is .*mean.* in one stage and .*max.* in 'feed_forward'"):
        _ = clash.metrics


def beside(first: Sublayer, second: Sublayer) -> Part:
    """Both in one part: x + f(x) + g(x)."""
    return Part("both", lambda p, x, run, ctx: x + run(first, x) + run(second, x), (first, second), {})


def other_routed(metrics) -> Sublayer:
    """A second router, in the place of the mixer."""
    return replace(Routed().build(Model(6, 1, 11), 0), name="first", metrics=metrics)


def test_two_sublayers_of_a_part_that_report_the_same_are_added_up() -> None:
    """As those of two parts are."""
    first, second = other_routed(METRICS), Routed().build(Model(6, 1, 11), 0)
    stage, x = _block_stage(beside(first, second), 0), torch.randn(2, 3, 6, dtype=torch.float64)
    p = {sub.name: init(sub.specs, seed, torch.float64) for seed, sub in enumerate((first, second))}
    ctx = transformer.loss(WHOLE).context(batches(WHOLE)[0], PLAIN)
    _, aux = stage.fn(p, x, ctx)
    one, other = (with_aux(sub.apply(p[sub.name], x, ctx))[1] for sub in (first, second))
    assert torch.equal(aux.loss, one.loss + other.loss)
    assert torch.equal(aux.metrics["balance"], one.metrics["balance"] + other.metrics["balance"])
    assert torch.equal(aux.metrics["sure"], one.metrics["sure"] + other.metrics["sure"])
    assert torch.equal(aux.metrics["top_gate"], torch.maximum(one.metrics["top_gate"], other.metrics["top_gate"]))
    with pytest.raises(ValueError, match=r"the metric 'balance' is .*max.* in one stage and .*mean.* in 'routed'"):
        _block_stage(beside(other_routed({**METRICS, "balance": Metric("max")}), second), 0)
