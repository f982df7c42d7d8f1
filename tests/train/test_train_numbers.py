"""What no number can mean is refused by the name of its flag, and what can be meant is not."""

import math
import re
import typing
from dataclasses import is_dataclass, replace

import pytest
import tyro
from hypothesis import given
from hypothesis import strategies as st

from configs import CONFIGS
from olmo_fn import optim
from olmo_fn.core.pipe import accumulate, clip, ema, skip_spikes
from olmo_fn.models.config import modified
from olmo_fn.train.config import Config

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
    cfg = tyro.cli(Config, args=[flag, value], default=TINY)
    with pytest.raises(ValueError, match=why) as refused:
        cfg.check()
    assert str(refused.value).startswith(f"{flag} is ")


def numeric(cls, name=""):
    """The fields that hold numbers, by the name of their flag, each with a number that no field can mean."""
    for field, kind in typing.get_type_hints(cls).items():
        if is_dataclass(kind):
            yield from numeric(kind, f"{name}{field}.")
        elif kind is not bool and re.search(r"\b(int|float)\b", str(kind).removeprefix("<class '").removesuffix("'>")):
            bad = math.nan if "float" in str(kind) else -(2**54)
            yield f"{name}{field}", (bad, bad) if "tuple" in str(kind) else bad


def changed(cfg, name, value):
    first, _, rest = name.partition(".")
    return replace(cfg, **{first: changed(getattr(cfg, first), rest, value) if rest else value})


FIELDS = dict(numeric(Config))


@pytest.mark.parametrize("name", FIELDS)
def test_no_field_takes_what_is_no_number(name):
    with pytest.raises(ValueError, match=re.escape(name.replace("_", "-"))):
        changed(TINY, name, FIELDS[name]).check()


def test_the_fields_are_all_there():
    assert len(FIELDS) > 50
    assert {"optim.betas", "optim.eps", "growth.until", "schedule.warmup", "nproc", "lora.alpha"} <= FIELDS.keys()


@given(st.integers(-(2**53), 2**53), st.floats(-4, 4))
def test_what_may_be_negative_is_not_refused(seed, exponent):
    cfg = replace(TINY, run=replace(TINY.run, seed=seed), schedule=replace(TINY.schedule, exponent=exponent))
    replace(cfg, model=modified(cfg.model, window_pattern=(-1, 4))).check()


@pytest.mark.parametrize(
    "make",
    [
        lambda: clip(-1.0),
        lambda: clip(float("nan")),
        lambda: accumulate(0),
        lambda: ema(1.5),
        lambda: skip_spikes(sigma=-6.0),
        lambda: optim.adamw(1e-3, betas=(0.9, 1.0)),
        lambda: optim.lion(1e-3, betas=(-0.1, 0.9)),
        lambda: optim.muon(1e-3, momentum=1.5),
        lambda: optim.normuon(1e-3, beta2=1.0),
        lambda: optim.dion(1e-3, momentum=float("nan")),
        lambda: optim.sgd(1e-3, momentum=-0.9),
        lambda: optim.soap(1e-3, shampoo_beta=1.0),
        lambda: optim.schedule_free_adamw(1e-3, betas=(1.0, 0.9)),
    ],
)
def test_transforms_refuse_what_would_turn_a_step_around(make):
    with pytest.raises(ValueError, match="must be"):
        make()
