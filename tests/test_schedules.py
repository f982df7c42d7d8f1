"""Learning-rate schedules are OLMo-core's to the last digits, and bad lengths are refused."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.optim import constant, warmup_cosine, warmup_linear, wsd
from olmo_fn.optim.schedules import warmup_constant

CASES = json.loads((Path(__file__).parent / "fixtures" / "sched" / "schedulers.json").read_text())["cases"]


def ours(case):
    """Our schedule for a case; what OLMo-core gives as a fraction is rounded to whole steps, as it does."""
    s, lr = case["settings"], case["initial_lr"]
    total = s.get("t_max", case["t_max"])
    warmup = s.get("warmup", round(s.get("warmup_fraction", 0) * total))
    match case["scheduler"]:
        case "ConstantScheduler":
            return constant(lr)
        case "ConstantWithWarmup":
            return warmup_constant(lr, warmup)
        case "WSD":
            fraction = s.get("decay_fraction", 0.1)
            decay = s["decay"] if fraction is None else round(fraction * total)
            if set(s) <= {"warmup", "warmup_fraction"}:
                decay = None  # our default is the same tenth
            return wsd(lr, warmup, total, decay, s.get("decay_min_lr", 0.0))
        case "LinearWithWarmup":
            return warmup_linear(lr, warmup, total, s.get("alpha_f", 0.1))
        case "CosWithWarmup":
            return warmup_cosine(lr, warmup, total, s.get("alpha_f", 0.1))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['scheduler']}-{case['settings']}")
def test_olmo_core(case):
    """From step 0 to beyond the end, but for two flaws of OLMo-core's WSD.

    Without warm-up it divides by zero at step 0; beyond the end its rate falls below 0. Ours stays.
    """
    schedule = ours(case)
    points = [(step, lr) for step, lr in zip(case["current"], case["lr"], strict=True) if lr is not None]
    assert len(points) >= len(case["lr"]) - 1
    for step, lr in points:
        if case["scheduler"] == "WSD" and step > case["t_max"]:
            lr = case["settings"].get("decay_min_lr", 0.0)
        rate = schedule(torch.tensor(step))
        assert rate.dtype == torch.float64
        assert rate.ndim == 0
        assert rate.item() == pytest.approx(lr, rel=1e-12, abs=1e-16 * case["initial_lr"])


def test_default_alpha_is_a_tenth():
    """As in OLMo-core: cosine and linear end at a tenth of the rate."""
    for schedule in (warmup_cosine, warmup_linear):
        assert schedule(2.0, 10, 100)(torch.tensor(100)).item() == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "used"),
    [
        (lambda: warmup_cosine(1.0, 11, 10), 11),
        (lambda: warmup_linear(1.0, 11, 10), 11),
        (lambda: wsd(1.0, 11, 10, 0), 11),
        (lambda: wsd(1.0, 6, 10, 5), 11),
        (lambda: wsd(1.0, 10, 10), 11),
    ],
)
def test_longer_than_the_run_is_refused(schedule, used):
    """In one line, when the schedule is made."""
    with pytest.raises(ValueError, match=f"take {used} steps, but the schedule has only 10") as error:
        schedule()
    assert "\n" not in str(error.value)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 60), st.sampled_from(["cosine", "linear", "wsd", "constant"]))
def test_shape(data, total, name):
    """Finite, between 0 and the peak, rising in warm-up and falling after it."""
    warmup = data.draw(st.integers(0, total))
    decay = data.draw(st.integers(0, total - warmup))
    schedule = {
        "cosine": lambda: warmup_cosine(0.3, warmup, total),
        "linear": lambda: warmup_linear(0.3, warmup, total),
        "wsd": lambda: wsd(0.3, warmup, total, decay),
        "constant": lambda: warmup_constant(0.3, warmup),
    }[name]()
    rates = torch.stack([schedule(torch.tensor(step)) for step in range(total + 5)])
    assert rates.isfinite().all()
    assert rates.min() >= 0
    assert rates.max() <= 0.3 * (1 + 1e-12)
    assert (rates[: warmup + 1].diff() > 0).all()
    assert (rates[warmup:].diff() <= 0).all()
    if name in ("cosine", "linear", "constant") and warmup < total:
        assert rates[warmup].item() == pytest.approx(0.3, rel=1e-12)
