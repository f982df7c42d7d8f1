"""The recipe of a run: how its step is composed. This is the page to read, and to change."""

from __future__ import annotations

from typing import Any

import torch

from olmo_fn.compile import compile
from olmo_fn.models import transformer
from olmo_fn.optim import (
    Decay,
    adafactor,
    adamw,
    constant,
    dion,
    lion,
    muon,
    normuon,
    partition,
    schedule_free_adamw,
    sgd,
    soap,
    warmup_cosine,
    warmup_linear,
    wsd,
)
from olmo_fn.optim import Schedule as ScheduleFunction
from olmo_fn.optim.schedules import warmup_constant
from olmo_fn.step import Step, Transform, accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.train.config import Config, Optim


def recipe(cfg: Config, dtype: torch.dtype = torch.float32) -> Step:
    """The training step of a config: a loss, its gradient, an optimizer, and how they are carried out."""
    r = cfg.recipe
    return pipe(
        transformer.loss(cfg.model, z_loss=r.z_loss),
        grad(r.engine, r.remat, dtype),
        accumulate(r.accumulate),
        *given(r.clip, clip(r.clip)),
        optimizer(cfg, dtype),
        *given(r.skip_sigma, skip_spikes(r.skip_sigma)),
        *given(r.ema, ema(r.ema)),
        donate(),
        *given(r.compile, compile()),
    )


def optimizer(cfg: Config, dtype: torch.dtype = torch.float32) -> Transform:
    """The config's optimizer with its schedule; beside those for matrices, AdamW for the rest. ``dtype`` is Newton-Schulz's."""
    o, lr = cfg.optim, schedule(cfg)
    shared = {"weight_decay": Decay(o.weight_decay, o.no_decay, o.cautious), "moments": getattr(torch, o.moments)}
    if o.name == "adamw":
        return adamw(lr, **options(o, "betas", "eps"), **shared)
    if o.name == "lion":
        return lion(lr, **options(o, "betas"), **shared)
    if o.name == "sgd":
        return sgd(lr, **options(o, "momentum", "nesterov"), **shared)
    if o.name == "adafactor":
        return adafactor(lr, weight_decay=shared["weight_decay"])
    if o.name == "schedule-free":
        return schedule_free_adamw(lr, **options(o, "betas", "eps"), **shared)
    if o.name == "muon":
        matrix = muon(lr, **options(o, "momentum", "nesterov"), **shared, dtype=dtype)
    elif o.name == "normuon":
        matrix = normuon(lr, **options(o, "momentum", "nesterov"), **shared, dtype=dtype)
    elif o.name == "dion":
        matrix = dion(lr, **options(o, "momentum", "rank"), **shared)
    else:
        matrix = soap(lr, **options(o, "betas", "eps"), **shared)
    times = (o.adamw_lr or o.lr) / o.lr
    rest = adamw(lambda step: times * lr(step), **options(o, "betas", "eps"), **shared)
    return partition({"matrix": matrix, "default": rest}, transformer.specs(cfg.model))


def options(o: Optim, *names: str) -> dict[str, Any]:
    """The fields that are given, as arguments."""
    return {name: getattr(o, name) for name in names if getattr(o, name) is not None}


def schedule(cfg: Config) -> ScheduleFunction:
    """The learning rate as a function of the step."""
    s, lr, total = cfg.schedule, cfg.optim.lr, cfg.run.steps
    if s.name == "cosine":
        return warmup_cosine(lr, s.warmup, total, s.final)
    if s.name == "linear":
        return warmup_linear(lr, s.warmup, total, s.final)
    if s.name == "wsd":
        return wsd(lr, s.warmup, total, round(s.decay * total), s.final * lr)
    return warmup_constant(lr, s.warmup) if s.warmup else constant(lr)


def given(value: object, transform: Transform) -> tuple[Transform, ...]:
    """The transform when the value is set, nothing when it is 0 or False."""
    return (transform,) if value else ()
