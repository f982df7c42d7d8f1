"""What no number can mean is refused by the name of its flag, and what can be meant is not."""

import math
import re
from dataclasses import is_dataclass, replace
from typing import get_type_hints

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from configs import CONFIGS
from olmo_fn.core.pipe import accumulate, clip, ema, skip_spikes
from olmo_fn.fields import walk
from olmo_fn.models.config import modified
from olmo_fn.optim import adamw, dion, lion, muon, normuon, sgd, soap
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.train.choices import base_of, choosable, choose, get, put
from olmo_fn.train.config import CHOICES, Config
from olmo_fn.train.schedules import Power

TINY = CONFIGS["olmo2-tiny"]


@pytest.mark.parametrize("preset", CONFIGS)
def test_every_preset_passes(preset):
    CONFIGS[preset].check()


@pytest.mark.parametrize(
    ("flag", "value", "why"),
    [
        ("--recipe.clip", "nan", "must be a finite number"),
        ("--optim.lr", "inf", "must be a finite number"),
        ("--optim.weight-decay", "-0.1", "must not be negative"),
        ("--run.threads", "-1", "must not be negative"),
        ("--run.steps", "99999999999999999999", "cannot be counted"),
        ("--schedule.levels", "inf", "must be a finite number"),
        ("--model.rope-theta", "0", "must be positive"),
        ("--gpus", "-1", "must not be negative"),
    ],
)
def test_it_is_refused_by_its_flag(flag, value, why):
    cfg, rest = choose(TINY, ["--schedule.name", "wsds", flag, value], CHOICES)
    cfg = tyro.cli(Config, args=rest, default=cfg)
    with pytest.raises(ValueError, match=why) as refused:
        cfg.check()
    assert str(refused.value).startswith(f"{flag} is ")


def numeric(cfg):
    """The fields that hold numbers: flag, path, and a number that no field can mean."""
    for field in walk(cfg):
        kind = get_type_hints(type(get(cfg, field.path[:-1])))[field.path[-1]]
        if kind is not bool and not is_dataclass(field.value) and re.search(r"\b(int|float)\b", str(kind)):
            bad = math.nan if "float" in str(kind) else -(2**54)
            yield field.flag, (field.path, (bad, bad) if "tuple" in str(kind) else bad)


def every_choice():
    """Configs in which each class that a field may hold is held."""
    yield TINY
    for flag, path in choosable(TINY, CHOICES).items():
        for name in CHOICES[base_of(type(get(TINY, path)), CHOICES)]:
            yield choose(TINY, [flag, name], CHOICES)[0]


FIELDS = {
    f"{flag} of {cfg.optim.name} {cfg.schedule.name}": (cfg, flag, path, bad)
    for cfg in every_choice()
    for flag, (path, bad) in numeric(cfg)
    if cfg is TINY or flag.startswith(("--optim", "--schedule", "--loss"))
}


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_is_no_number(name):
    cfg, flag, path, bad = FIELDS[name]
    with pytest.raises(ValueError, match=re.escape(flag)):
        put(cfg, path, bad).check()


def test_the_fields_are_all_there():
    flags = {flag for _, flag, _, _ in FIELDS.values()}
    assert len(flags) > 60
    assert {"--optim.betas", "--optim.eps", "--growth.until", "--schedule.warmup", "--nproc", "--lora.alpha"} <= flags
    assert {"--optim.rank", "--schedule.exponent", "--schedule.levels", "--loss.z-loss"} <= flags


@given(st.integers(-(2**53), 2**53), st.floats(-4, 4))
def test_what_may_be_negative_is_not_refused(seed, exponent):
    cfg = replace(TINY, run=replace(TINY.run, seed=seed), schedule=Power(exponent=exponent, warmup=30))
    replace(cfg, model=modified(cfg.model, window_pattern=(-1, 4))).check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip(-1.0),
        lambda: clip(float("nan")),
        lambda: accumulate(0),
        lambda: ema(1.5),
        lambda: skip_spikes(sigma=-6.0),
        lambda: adamw(1e-3, betas=(0.9, 1.0)),
        lambda: lion(1e-3, betas=(-0.1, 0.9)),
        lambda: muon(1e-3, momentum=1.5),
        lambda: normuon(1e-3, beta2=1.0),
        lambda: dion(1e-3, momentum=float("nan")),
        lambda: sgd(1e-3, momentum=-0.9),
        lambda: soap(1e-3, shampoo_beta=1.0),
        lambda: schedule_free_adamw(1e-3, betas=(1.0, 0.9)),
    ],
)
def test_transforms_refuse_what_would_turn_a_step_around(make):
    with pytest.raises(ValueError, match="must be"):
        make()
