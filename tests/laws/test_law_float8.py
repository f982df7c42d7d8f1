"""The laws with products in float8: what must be invisible stays so, and what quantising costs."""

from __future__ import annotations

from functools import partial
from unittest.mock import patch

import pytest
import torch
from helpers import batch_of, params_of
from test_law_layouts import momentum

from olmo_fn import tree
from olmo_fn.core.pipe import accumulate, clip, grad, pipe
from olmo_fn.core.step import Step
from olmo_fn.kernels import float8 as kernel
from olmo_fn.kernels.float8 import Float8, Form
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.spec import init
from olmo_fn.testing import Layout, Pool, assert_equivalent
from olmo_fn.transforms.float8 import float8
from olmo_fn.transforms.lora import lora, lora_specs

MODEL = dense(64, 2, 4, 96, vocab_size=61, n_kv_heads=2, head_dim=32, init_std=0.1)
DOUBLE = torch.float64


def gradients(recipe: str, *more, engine: str = "tape", remat: str = "none", params=None, before=()):
    step = pipe(transformer.loss(MODEL), *before, float8(recipe), grad(engine, remat, DOUBLE), *more)
    found, metrics = step(params_of(MODEL) if params is None else params, batch_of(61, masked=(0.0, 0.5)))
    return {**tree.flatten(found), "loss": metrics["loss"]}


def assert_alike(found, wanted, tolerance: float = 1e-12) -> None:
    assert found.keys() == wanted.keys()
    for path, x in wanted.items():
        assert (found[path] - x).abs().max() <= tolerance * x.abs().max(), path


@pytest.mark.parametrize("recipe", ["rowwise", "mx"])
def test_law_9_engines(recipe: str) -> None:
    """The pullbacks of quantised products are the derivatives of the definition, which takes quantising for the identity."""
    wanted = gradients(recipe, engine="func")
    assert_alike(gradients(recipe), wanted)
    exact = tree.flatten(
        pipe(transformer.loss(MODEL), grad(dtype=DOUBLE))(params_of(MODEL), batch_of(61, masked=(0.0, 0.5)))[0]
    )
    apart = {path: float((wanted[path] - x).norm() / x.norm()) for path, x in exact.items()}
    assert min(apart.values()) > 0.005  # it is quantised
    assert max(apart.values()) < 0.3


@pytest.mark.parametrize("recipe", ["rowwise", "mx"])
def test_rematerialising_and_accumulating_are_invisible(recipe: str) -> None:
    wanted = gradients(recipe)
    assert_alike(gradients(recipe, remat="full"), wanted, 0.0)
    assert_alike(gradients(recipe, accumulate(2)), wanted)


def test_adapters_of_quantised_weights() -> None:
    """LoRA: the products with the weights are quantised, those with the adapters are not; both engines agree."""
    adapters = lora_specs(transformer.specs(MODEL), 4)
    params = {**params_of(MODEL), **tree.map(lambda p: p + 0.01, init(adapters, 1, DOUBLE))}
    tape, func = (gradients("rowwise", engine=engine, params=params, before=[lora(adapters)]) for engine in ("tape", "func"))
    assert_alike(tape, func)
    with pytest.raises(ValueError, match=r"lora.*after float8\('rowwise'\) would adapt weights that are quantised already"):
        pipe(transformer.loss(MODEL), float8(), lora(adapters), grad())


# --- law 2 ------------------------------------------------------------------------------------------------------------


def recipe(kind: str) -> Step:
    return pipe(transformer.loss(MODEL), float8(kind), grad(dtype=DOUBLE), clip(0.5), momentum(0.1))


LAYOUTS = {
    "fsdp": Layout(Mesh(dp_shard=2)),
    "zero2": Layout(Mesh(dp_shard=2), Rules(keep_gathered=True)),
    "hsdp": Layout(Mesh(dp_replicate=2, dp_shard=2)),
    "fsdp-ring": Layout(Mesh(dp_shard=2, cp=2), Rules(cp_method="ring")),
    "pipeline": Layout(Mesh(pp=2), pipeline=Pipeline("zero_bubble", 2)),
}


def verify(pool: Pool, kind: str, layout: Layout, **options) -> None:
    batches = [batch_of(61, seed=seed, masked=(0.0, 0.5)) for seed in range(2)]
    assert_equivalent(partial(recipe, kind), transformer.specs(MODEL), [layout], batches, pool=pool, **options)


@pytest.mark.parametrize("name", LAYOUTS)
def test_law_2_layouts(pool: Pool, name: str) -> None:
    """Parts of weights are quantised by themselves, with the scales of the whole."""
    verify(pool, "rowwise", LAYOUTS[name])


def test_law_2_blocks_of_32(pool: Pool) -> None:
    verify(pool, "mx", LAYOUTS["fsdp"])
    with pytest.raises(Exception, match=r"parts of 16 of blocks\.0\.attention\.w_q.* cannot quantise each by itself"):
        verify(pool, "mx", LAYOUTS["fsdp-ring"])


def test_law_2_uneven_parts(pool: Pool) -> None:
    """Three ranks have 22, 22 and 20 rows of 64."""
    batches = [{name: x[:3] for name, x in batch_of(61).items()}]
    assert_equivalent(partial(recipe, "rowwise"), transformer.specs(MODEL), [Layout(Mesh(dp_shard=3))], batches, pool=pool)


class Halves:
    """What two ranks of ``tp`` compute, in one process: each half of what tp divides has scales of its own."""

    quantised, products, transposed = Form.quantised, kernel.products, kernel.transposed_products

    @staticmethod
    def of_weight(form, w, *more):
        parts = [Halves.quantised(form, half, *more) for half in w.chunk(2, 1 - form.dim)]
        return Float8(*(torch.cat([part[i] for part in parts], 1 - form.dim) for i in (0, 1)), form)

    @staticmethod
    def parts(w):
        cut = 1 - w.form.dim
        return [Float8(d, s, w.form) for d, s in zip(w.data.chunk(2, cut), w.scale.chunk(2, cut), strict=True)]

    @staticmethod
    def forward(fuse, x, weights):
        found = []
        for w in weights:
            inputs = x.chunk(2, 1) if w.form.dim else [x, x]
            outs = [Halves.products(fuse, part, [half])[0] for part, half in zip(inputs, Halves.parts(w), strict=True)]
            found.append(sum(outs) if w.form.dim else torch.cat(outs, 1))
        return found

    @staticmethod
    def backward(fuse, d_out, weights):
        total = 0
        for d, w in zip(d_out, weights, strict=True):
            inputs = [d, d] if w.form.dim else d.chunk(2, 1)
            outs = [Halves.transposed(fuse, [part], [half]) for part, half in zip(inputs, Halves.parts(w), strict=True)]
            total = total + (torch.cat(outs, 1) if w.form.dim else sum(outs))
        return total


def test_law_2_tensor_parallel(pool: Pool) -> None:
    """Ranks of ``tp`` scale what they have, heads and hidden features, by themselves: so does the single process here."""
    linear = "olmo_fn.nn.linear."
    with (
        patch.object(Form, "quantised", Halves.of_weight),
        patch(linear + "products", Halves.forward),
        patch(linear + "transposed_products", Halves.backward),
    ):
        verify(pool, "rowwise", Layout(Mesh(tp=2)))
    with pytest.raises(AssertionError, match="step 0"):  # not what one process computes, by far less than quantising costs
        verify(pool, "rowwise", Layout(Mesh(tp=2)))
    verify(pool, "rowwise", Layout(Mesh(tp=2)), tolerance=1e-2)


# --- what it costs ----------------------------------------------------------------------------------------------------


def text(seed: int) -> dict[str, torch.Tensor]:
    """8 rows in which each of 61 tokens has four successors, the same in every batch."""
    successors = torch.randint(61, (61, 4), generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed + 1)
    ids = [torch.randint(61, (8,), generator=generator)]
    for choice in torch.randint(4, (32, 8), generator=generator):
        ids.append(successors[ids[-1], choice])
    row = torch.stack(ids, 1)
    return {"input_ids": row[:, :-1].contiguous(), "labels": row[:, 1:].contiguous()}


def losses(steps: int, *quantising) -> torch.Tensor:
    """In bf16, each of a new batch."""
    step = pipe(transformer.loss(MODEL), *quantising, grad(dtype=torch.bfloat16), clip(1.0), adamw(3e-3))
    state, found = step.init(params_of(MODEL, dtype=torch.float32)), []
    for i in range(steps):
        state, metrics = step(state, text(i))
        found.append(metrics["loss"])
    return torch.stack(found)


def test_30_losses_stay_within_005_of_those_in_bf16() -> None:
    exact, quantised = losses(30), losses(30, float8())
    assert exact[0] > 4.4
    assert exact[-1] < 2.7
    assert 0.001 < (exact - quantised).abs().max() < 0.05


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["rowwise", "mx"])
def test_200_losses_stay_within_005_of_those_in_bf16(recipe: str) -> None:
    """At every step within 0.038 (rowwise) and 0.026 (mx), in the mean of the last 20 within 0.0012 and 0.0026, as measured;
    bf16's are within 0.0056 of fp32's.
    """
    exact, quantised = losses(200), losses(200, float8(recipe))
    assert exact[-1] < 1.6
    assert (exact - quantised).abs().max() < 0.05
    assert (exact - quantised)[-20:].mean().abs() < 0.005


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_cannot_be_quantised_is_refused_by_name() -> None:
    odd = transformer.loss(dense(64, 1, 4, 100, vocab_size=61, n_kv_heads=2, head_dim=32))
    with pytest.raises(ValueError, match=r"blocks\.0\.feed_forward\.w_gate is 64 x 100.*multiples of 16.*--recipe.float8-skip"):
        pipe(odd, float8(), grad())
    pipe(odd, float8(skip=["*.feed_forward.*"]), grad())
    with pytest.raises(ValueError, match="multiples of 32"):
        pipe(transformer.loss(dense(48, 1, 3, 96, vocab_size=61)), float8("mx"), grad())
    with pytest.raises(ValueError, match="this loss is a plain function"):
        pipe(lambda params, batch: (params["w"].sum(), {}), float8(), grad("func"))
