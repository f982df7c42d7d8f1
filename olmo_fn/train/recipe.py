"""The recipe of a run: how its step is composed. This is the page to read, and to change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from olmo_fn import tree
from olmo_fn.core.capture import capture
from olmo_fn.core.compile import compile
from olmo_fn.core.pipe import Transform, accumulate, clip, donate, ema, grad, offload, pipe, skip_spikes
from olmo_fn.core.step import Step
from olmo_fn.data.settings import cache_dir
from olmo_fn.formats.huggingface import open_directory
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules, rows_are_less
from olmo_fn.models import transformer
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.parallel.sharded_placement import ShardedPlacement
from olmo_fn.spec import Box, Spec, init_leaf
from olmo_fn.train.config import Config
from olmo_fn.train.schedule import schedule
from olmo_fn.transforms import (
    accumulate_measured,
    attention,
    balance_experts,
    clip_value,
    dims_of,
    freeze,
    merge,
    noise_scale,
    normalize,
    skip_steps,
    train_only,
    unit_params,
)
from olmo_fn.transforms.balance import BIAS
from olmo_fn.transforms.float8 import float8
from olmo_fn.transforms.lora import lora, lora_specs
from olmo_fn.tree import Tree


def recipe(cfg: Config, dtype: torch.dtype = torch.float32, connection: Connection | None = None) -> Step:
    """The training step of a config: a loss, its gradient, an optimizer, and how they are carried out."""
    r, specs = cfg.recipe, parameters(cfg)
    if r.offload and r.remat == "none":
        raise ValueError("--recipe.offload moves what --recipe.remat keeps of a block, which is none; add --recipe.remat full")
    return pipe(
        cfg.loss.build(cfg.model),
        *given(cfg.lora.rank, lambda _: lora({"lora": specs["lora"]}, cfg.lora.alpha)),
        *given(r.float8 != "none" and r.float8, lambda kind: float8(kind, r.float8_skip)),
        grad(r.engine, r.remat, dtype),
        accumulate_measured(r.accumulate) if r.noise_scale else accumulate(r.accumulate),
        *given(r.clip_value, clip_value),
        *given(r.clip, clip),
        cfg.optim.build(schedule(cfg), specs, dtype),
        *given(cfg.model.balance_rate, balance_experts),
        *given(r.normalize, lambda _: normalize(dims_of(transformer.specs(cfg.model)))),
        *given(r.skip_sigma, skip_spikes),
        *given(r.skip_steps, skip_steps),
        *given(r.noise_scale, noise_scale),
        *given(r.ema, ema),
        *given(r.merge_last, lambda last: merge(last, range(r.merge_every, cfg.run.steps + 1, r.merge_every))),
        *given(r.freeze, lambda patterns: freeze(*patterns, parameters=specs)),
        *given(cfg.lora.rank, lambda _: train_only("lora.*", parameters=specs)),
        *given(connection, lambda mesh: shard(mesh, specs, rules(cfg, mesh.mesh), pipeline(cfg), rows="own")),
        donate(),
        *given(r.attention != "auto" and r.attention, attention),
        *given(r.offload, lambda _: offload()),
        *given(r.compile, lambda _: compile(cache_dir(cfg.data) / "compiled")),
        *given(r.capture, lambda _: capture()),
    )


def rules(cfg: Config, mesh: Mesh) -> Rules:
    """The rules of a config on a mesh."""
    m = cfg.mesh
    return Rules(
        keep_gathered=m.keep_gathered,
        cp_method=m.cp_method,
        prefetch=m.prefetch,
        exchanged=exchanged(cfg, mesh),
        reduce_dtype=m.reduce_dtype,
        async_tp=m.async_tp,
    )


def exchanged(cfg: Config, mesh: Mesh) -> tuple[str, ...]:
    """The tables whose rows are exchanged, as ``mesh.embedding`` says: with auto those of which that is fewer bytes."""
    r, m, ranks = cfg.recipe, cfg.model, mesh.degree("fsdp")
    can = getattr(cfg.loss.build(m), "looked_up", ())
    if ranks == 1 or cfg.mesh.embedding == "table" or cfg.lora.rank or not can:
        return ()
    tokens = (1 + m.multi_token.depth) * r.batch_size * r.sequence_length // (r.accumulate * mesh.degree("data") * mesh.cp)
    gathers = 1 if mesh.pp > 1 or cfg.mesh.keep_gathered else 2
    less = rows_are_less(m.vocab_size, m.d_model, tokens, ranks, gathers)
    return tuple(sorted(can)) if less or cfg.mesh.embedding == "rows" else ()


def pipeline(cfg: Config) -> Pipeline:
    """The pipeline of a config's mesh."""
    m = cfg.mesh
    return Pipeline(m.pp_schedule, m.pp_microbatches, m.pp_chunks, m.pp_split)


def parameters(cfg: Config) -> Tree:
    """The specs of all parameters of a run: the model's, and under ``lora`` its adapters if it trains them."""
    specs = transformer.specs(cfg.model)
    return {**specs, **lora_specs(specs, cfg.lora.rank, cfg.lora.patterns)} if cfg.lora.rank else specs


def is_trained(cfg: Config, path: str) -> bool:
    """Whether the parameter at ``path`` is trained, and has slots; the others are frozen, or moved without a gradient."""
    if path.endswith(BIAS):
        return False
    return (not cfg.lora.rank or path.startswith("lora.")) and not tree.matches(path, cfg.recipe.freeze)


def first_parameters(cfg: Config, step: Step, device: torch.device) -> Tree:
    """The parameters that a run begins with: random, or those of ``init.from_hf``; on a mesh each rank makes its own parts."""
    placement, part = step.execution.layout.placement, first_part(cfg)
    if isinstance(placement, ShardedPlacement):
        params = placement.make(part)
    else:
        params = tree.map_with_path(lambda path, spec: part(path, spec, None).to(device), parameters(cfg))
    return unit_params(params, dims_of(transformer.specs(cfg.model))) if cfg.recipe.normalize else params


def first_part(cfg: Config) -> Callable[[str, Spec, Box | None], torch.Tensor]:
    """A function that gives the first values of the parameter at a path, or of a box of it, fp32."""

    def random(path: str, spec: Spec, box: Box | None) -> torch.Tensor:
        return init_leaf(spec, cfg.run.seed, path, box)

    if not cfg.init.from_hf:
        return random
    directory = open_directory(cfg.init.from_hf, cfg.model)
    return lambda path, spec, box: (
        directory.parameter(path, box) if path in directory.names else random(path, spec, box)  # adapters are in no directory
    )


def given(value: Any, make: Callable[[Any], Transform]) -> tuple[Transform, ...]:
    """``make(value)`` when the value is set, nothing when it is 0, False or empty."""
    return (make(value),) if value else ()
