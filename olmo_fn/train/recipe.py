"""The recipe of a run: how its step is composed. This is the page to read, and to change."""

from __future__ import annotations

import torch

from olmo_fn.compile import compile
from olmo_fn.models import transformer
from olmo_fn.optim import Schedule as ScheduleFunction
from olmo_fn.optim import adamw, constant, warmup_cosine, warmup_linear, wsd
from olmo_fn.optim.schedules import warmup_constant
from olmo_fn.step import Step, Transform, accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.train.config import Config


def recipe(cfg: Config, dtype: torch.dtype = torch.float32) -> Step:
    """The training step of a config: a loss, its gradient, an optimizer, and how they are carried out."""
    r = cfg.recipe
    return pipe(
        transformer.loss(cfg.model, z_loss=r.z_loss),
        grad(r.engine, r.remat, dtype),
        accumulate(r.accumulate),
        *given(r.clip, clip(r.clip)),
        optimizer(cfg),
        *given(r.skip_sigma, skip_spikes(r.skip_sigma)),
        *given(r.ema, ema(r.ema)),
        donate(),
        *given(r.compile, compile()),
    )


def optimizer(cfg: Config) -> Transform:
    """AdamW with the config's schedule."""
    o = cfg.optim
    moments = getattr(torch, o.moments)
    return adamw(schedule(cfg), o.betas, o.eps, o.weight_decay, o.no_decay, moments)


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
