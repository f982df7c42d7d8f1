"""Optimizers, each a pair of pure functions of one parameter, how several make one step, and learning-rate schedules."""

from olmo_fn.optim.adafactor import adafactor
from olmo_fn.optim.adamw import adam, adamw
from olmo_fn.optim.base import NO_DECAY, OLMO_CORE_NO_DECAY, Decay, Rule, optimizer
from olmo_fn.optim.dion import dion
from olmo_fn.optim.lion import lion
from olmo_fn.optim.muon import muon, orthogonalize
from olmo_fn.optim.normuon import normuon
from olmo_fn.optim.partition import partition
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.optim.schedules import Schedule, constant, warmup_cosine, warmup_linear, wsd
from olmo_fn.optim.sgd import sgd
from olmo_fn.optim.soap import soap

__all__ = [
    "NO_DECAY",
    "OLMO_CORE_NO_DECAY",
    "Decay",
    "Rule",
    "Schedule",
    "adafactor",
    "adam",
    "adamw",
    "constant",
    "dion",
    "lion",
    "muon",
    "normuon",
    "optimizer",
    "orthogonalize",
    "partition",
    "schedule_free_adamw",
    "sgd",
    "soap",
    "warmup_cosine",
    "warmup_linear",
    "wsd",
]
