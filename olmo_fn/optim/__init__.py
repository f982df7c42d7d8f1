"""Optimizers, each a pair of pure functions of one parameter, and learning-rate schedules."""

from olmo_fn.optim.adamw import adamw
from olmo_fn.optim.base import optimizer
from olmo_fn.optim.schedules import Schedule, constant, warmup_cosine, warmup_linear, wsd
from olmo_fn.optim.sgd import sgd

__all__ = ["Schedule", "adamw", "constant", "optimizer", "sgd", "warmup_cosine", "warmup_linear", "wsd"]
