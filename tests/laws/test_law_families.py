"""Law 2 for every part of a dense model: loss, gradients and whole steps are the same on any ranks."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from olmo_fn.core.chain import bind
from olmo_fn.core.pipe import clip, grad, pipe, with_execution
from olmo_fn.core.step import Step
from olmo_fn.kernels import Function
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import (
    GELU,
    Attention,
    Block,
    GatedDelta,
    GeGLU,
    Head,
    Hybrid,
    LayerNorm,
    Model,
    MoE,
    MultiToken,
    PeriNorm,
    PreNorm,
    RMSNorm,
    ScaledNorm,
    SwiGLU,
    modified,
)
from olmo_fn.models.families import ngpt
from olmo_fn.models.settings.rope_scaling import Interpolation, Stepwise, YaRN
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.testing import Layout, Pool, assert_equivalent

HEADS = {"n_heads": 4, "n_kv_heads": 2}
SMALL = Model(16, 2, 32)


def model(kind, mixer=None, feed_forward=None, **options) -> Model:
    """A small model of such blocks."""
    ff = feed_forward or Block().feed_forward
    ff = type(ff)(hidden_size=24, **{name: getattr(ff, name) for name in ("feed_forward_bias",) if hasattr(ff, name)})
    options = {"init_std": 0.3, **options}
    return Model(16, 2, 32, kind(mixer=Attention(**{**HEADS, **(mixer or {})}), feed_forward=ff), **options)


def sparse(kind, qk_norm="none", dropout=0.0, **experts) -> Model:
    """Experts beside a dense network."""
    experts = {"num_experts": 4, "top_k": 2, "expert_size": 5, "balance_loss": 0.1, "balance_over": "sequence", **experts}
    block = kind(mixer=Attention(qk_norm=qk_norm, **HEADS), feed_forward=MoE(**experts), dense=SwiGLU(hidden_size=24))
    return Model(16, 2, 32, replace(block, dropout=dropout), init_std=0.3)


MODELS = {
    "peri-geglu": model(
        PeriNorm,
        {"qk_norm": "head", "zero_centred": True, "score_scale": 0.3, "local_rope_theta": 100.0, "window_pattern": (5, -1)},
        GeGLU(),
        norm=RMSNorm(zero_centred=True),
        embed_scale=4.0,
        tie_embeddings=True,
    ),
    "biases-layer-norm": model(
        PreNorm,
        {"qk_norm": "none", "attention_bias": True, "rope_interleaved": True, "clip_qkv": 0.5, "rope_fraction": 0.5},
        GeGLU(feed_forward_bias=True),
        norm=LayerNorm(),
        embed_norm=True,
        head=Head(bias=True, cap=3.0),
    ),
    "scaled-gates-sinks": model(
        ScaledNorm, {"qk_norm": "per-head", "gate": "element", "sinks": True, "rope_scaling": YaRN(factor=4.0, old_context=8)}
    ),
    "factors-head-gate-cap": model(
        partial(Block, attention_factor=0.7, feed_forward_factor=0.4),
        {"gate": "head", "score_cap": 2.0, "scalable_softmax": True, "rope_layers": "windowed", "window_pattern": (7, -1)},
        norm=RMSNorm(zero_centred=True),
    ),
    "gelu-stepwise": model(PreNorm, {"qk_norm": "none", "rope_scaling": Stepwise(old_context=8)}, GELU()),
    "linear-nope": model(
        Block,
        {"rope_scaling": Interpolation(), "rope_scaled_layers": "all", "rope_layers": "windowed", "window_pattern": (4, -1)},
    ),
    "dropout": model(partial(PeriNorm, dropout=0.25, attention_factor=0.5)),
    "dropout-reordered": model(partial(Block, dropout=0.5)),
    "multi-token": model(Block, tie_embeddings=True, multi_token=MultiToken(depth=2)),
    "multi-token-untied": model(PreNorm, {"qk_norm": "head"}, multi_token=MultiToken(depth=1, weight=0.5)),
    "hybrid": sparse(Hybrid, qk_norm="full", dropout=0.25),
    "hybrid-pre-norm": sparse(partial(Hybrid, norms="input", feed_forward_factor=0.7), capacity_factor=0.8),
    "ngpt": ngpt(16, 2, 4, 24, vocab_size=32, n_kv_heads=2),
    "gated-delta": replace(
        model(PreNorm),
        pattern=(
            PreNorm(mixer=GatedDelta(n_heads=2, n_value_heads=4, head_dim=6), feed_forward=SwiGLU(hidden_size=24)),
            Block(mixer=Attention(**HEADS), feed_forward=SwiGLU(hidden_size=24)),
        ),
    ),
    "gated-delta-looks-far-back": replace(
        model(PreNorm),
        block=PreNorm(mixer=GatedDelta(n_heads=4, conv_size=8, negative_eigenvalues=False), feed_forward=GELU(hidden_size=24)),
    ),
}
LAYOUTS = {
    "fsdp": Layout(Mesh(dp_shard=2), DEFAULT),
    "tp": Layout(Mesh(tp=2), DEFAULT),
    "cp-gather": Layout(Mesh(cp=2), DEFAULT),
    "cp-ulysses": Layout(Mesh(cp=2), Rules(cp_method="ulysses")),
    "cp-ring": Layout(Mesh(cp=2), Rules(cp_method="ring")),
    "pp": Layout(Mesh(pp=2), DEFAULT, Pipeline(microbatches=2)),
}
OF_EXPERTS = {"ep": Layout(Mesh(dp_shard=2, ep=2), DEFAULT), "ep-tp": Layout(Mesh(dp_shard=2, ep=2, tp=2), DEFAULT)}


def recipe(cfg: Model) -> Step:
    return pipe(transformer.loss(cfg, z_loss=1e-2), grad(dtype=torch.float64), clip(0.5), adamw(1e-2))


def batches(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 32, (count, 4, 25), generator=generator)
    documents = torch.tensor([0] * 9 + [1] * 7 + [2] * 8).expand(4, -1)
    rest = {"documents": documents, "rows": torch.tensor([7, 1 << 40, 9, 3])}
    return [{"input_ids": x[:, :-1].contiguous(), "labels": x[:, 1:].contiguous(), **rest} for x in ids]


@pytest.mark.parametrize("name", MODELS)
def test_parts_in_every_layout(pool: Pool, name: str) -> None:
    """Whole steps in fp64, with documents, on two ranks in each way; a pipeline has 2 blocks to cut."""
    cfg = MODELS[name]
    layouts = [*LAYOUTS.values(), *(OF_EXPERTS.values() if cfg.block.feed_forward.num_experts else ())]
    assert_equivalent(partial(recipe, cfg), transformer.specs(cfg), layouts, batches(), pool=pool)


def changed(name: str, **fields) -> Model:
    return modified(MODELS[name], **fields)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("peri-geglu", {"zero_centred": False}),
        ("peri-geglu", {"score_scale": 0.31}),
        ("biases-layer-norm", {"clip_qkv": 0.6}),
        ("factors-head-gate-cap", {"score_cap": 2.1}),
        ("linear-nope", {"rope_scaling": Interpolation(factor=2.1)}),
        ("hybrid", {"top_k": 1}),
        ("hybrid-pre-norm", {"block": replace(MODELS["hybrid-pre-norm"].block, norms="output")}),
        ("dropout", {"block": replace(MODELS["dropout"].block, dropout=0.3)}),
    ],
)
def test_the_law_catches_another_number(pool: Pool, name: str, fields: dict) -> None:
    """Mutants: each setting is part of what is compared."""
    with pytest.raises(AssertionError):
        assert_equivalent(
            partial(recipe, MODELS[name]),
            transformer.specs(MODELS[name]),
            [Layout(Mesh(dp_shard=2), DEFAULT)],
            batches(1),
            reference=partial(recipe, changed(name, **fields)),
            pool=pool,
        )


def forgetful(cfg: Model) -> Step:
    """The gain that all heads share is used on each rank of ``tp`` as its own, so that its gradient is not summed."""
    return with_execution(recipe(cfg), fuse=alone)


def alone(fn: Function, *constants: Any) -> Function:
    return bind(fn, *((constants[0], Axis()) if fn.__name__ == "norm_and_rotate_by_head" else constants))


def test_the_law_catches_a_gain_that_is_not_summed(pool: Pool) -> None:
    cfg = changed("peri-geglu", window_pattern=())
    with pytest.raises(AssertionError, match="_norm"):
        assert_equivalent(partial(forgetful, cfg), transformer.specs(cfg), [LAYOUTS["tp"]], batches(1), pool=pool)
