"""Learning-rate schedules are OLMo-core's to the last digits, compile, compose, and refuse what does not fit."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.optim.schedules import (
    Piece,
    anneal,
    constant,
    exponential,
    in_tokens,
    join,
    piecewise,
    power,
    scale,
    sequential,
    then,
    warmup_constant,
    warmup_cosine,
    warmup_cosine_linear,
    warmup_half_cosine,
    warmup_inv_sqrt,
    warmup_linear,
    wsd,
    wsds,
)

CASES = json.loads((Path(__file__).parents[1] / "fixtures" / "sched" / "schedulers.json").read_text())["cases"]
QUICK = examples(40)


def ours(name, s, lr, total):
    """Our schedule for OLMo-core's class and settings."""
    total = s.get("t_max", total)
    warmup = float(s["warmup_fraction"]) if "warmup_fraction" in s else s.get("warmup", 0)
    decay = s["decay"] if "decay" in s else float(s.get("decay_fraction", 0.1))
    start, final, alpha = s.get("warmup_min_lr", 0.0), s.get("decay_min_lr", 0.0), s.get("alpha_f", 0.1)
    match name:
        case "ConstantScheduler":
            return constant(lr)
        case "ConstantWithWarmup":
            return warmup_constant(lr, warmup, total, start)
        case "WSD":
            return wsd(lr, warmup, total, decay, final, start)
        case "LinearWithWarmup":
            return warmup_linear(lr, warmup, total, alpha, start)
        case "CosWithWarmup":
            return warmup_cosine(lr, warmup, total, alpha, start)
        case "HalfCosWithWarmup":
            return warmup_half_cosine(lr, warmup, total, alpha, start)
        case "InvSqrtWithWarmup":
            return warmup_inv_sqrt(lr, warmup, total, alpha, start)
        case "CosWithWarmupAndLinearDecay":
            return warmup_cosine_linear(lr, warmup, total, alpha, decay, final, start)
        case "PowerLR":
            return power(lr, warmup, total, s.get("b", -0.51), decay, final, start)
        case "WSDS":
            return wsds(lr, warmup, s["period_lengths"], decay, s.get("period_lr_multipliers", ()), final, start)
        case "ExponentialScheduler":
            return exponential(lr, total, s.get("lr_min", 1e-9))
        case "ComposableScheduler":
            pieces = [
                Piece(p["duration"], share(p, "end", lr), p.get("shape", "linear"), share(p, "start", lr)) for p in s["stages"]
            ]
            return overridden(piecewise(lr, pieces), s, lr)
        case "SequentialScheduler":
            lengths = [*s["schedulers_max"], total - sum(s["schedulers_max"])]
            make = [
                lambda peak, n=n, s=inner, length=length: ours(n, s, peak, length)
                for (n, inner), length in zip(s["schedulers"], lengths, strict=True)
            ]
            return overridden(sequential(lr, list(zip(make, s["schedulers_max"], strict=False)), make[-1]), s, lr)


def share(piece, at, lr):
    return piece[f"{at}_lr"] / lr if f"{at}_lr" in piece else piece.get(f"{at}_lr_fraction")


def overridden(schedule, s, lr):
    o = s.get("override_decay")
    if o is None:
        return schedule
    final = o["end_lr"] if "end_lr" in o else o["end_lr_fraction"] * lr
    return anneal(schedule, o["start"], o["duration"], final, o.get("shape", "linear"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['scheduler']}-{case['settings']}")
def test_olmo_core(case):
    """At 1e-12 from 0 to beyond the end, but for what is a flaw there.

    It raises (null) at 0 in WSD without a warm-up, and beyond the end of a sequence; and beyond the end the linear
    decays of WSD, cosine-linear and power fall below 0. Ours stay at the final rate.
    """
    s = case["settings"]
    schedule = ours(case["scheduler"], s, case["initial_lr"], case["t_max"])
    points = [(step, lr) for step, lr in zip(case["current"], case["lr"], strict=True) if lr is not None]
    assert len(points) >= len(case["lr"]) - 2
    for step, lr in points:
        if case["scheduler"] in ("WSD", "CosWithWarmupAndLinearDecay", "PowerLR") and step > case["t_max"]:
            assert lr < s.get("decay_min_lr", 0.0)
            lr = s.get("decay_min_lr", 0.0)
        rate = schedule(torch.tensor(step))
        assert rate.dtype == torch.float64
        assert rate.ndim == 0
        assert rate.item() == pytest.approx(lr, rel=1e-12, abs=1e-16 * case["initial_lr"])


def test_all_thirteen_are_compared():
    assert len({case["scheduler"] for case in CASES}) == 13


def test_where_olmo_core_raises():
    """There is a sensible rate."""
    assert wsd(0.3, 0, 1000)(torch.tensor(0)).item() == 0.3
    schedule = sequential(1.0, [(lambda lr: warmup_linear(lr, 0, 10), 10)], lambda lr: warmup_linear(lr, 0, 10, 0.5))
    assert schedule(torch.tensor(500)).item() == pytest.approx(0.05)


def test_default_alpha_is_a_tenth():
    """As in OLMo-core: cosine and linear end at a tenth of the rate."""
    for schedule in (warmup_cosine, warmup_linear):
        assert schedule(2.0, 10, 100)(torch.tensor(100)).item() == pytest.approx(0.2, rel=1e-12)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (lambda: warmup_constant(1.0, 11, 10), "warmup_constant: warmup 11 is longer than the whole schedule of 10"),
        (lambda: warmup_cosine(1.0, 11, 10), "warmup_cosine: warmup 11 is longer than the whole schedule of 10"),
        (lambda: warmup_linear(1.0, 11, 10), "warmup_linear: warmup 11 is longer than the whole schedule of 10"),
        (lambda: warmup_half_cosine(1.0, 11, 10), "warmup_half_cosine: warmup 11 is longer"),
        (lambda: warmup_inv_sqrt(1.0, 11, 10), "warmup_inv_sqrt: warmup 11 is longer"),
        (lambda: wsd(1.0, 11, 10, 0), "wsd: warmup 11 is longer"),
        (lambda: wsd(1.0, 6, 10, 5), "wsd: warmup 6 and decay 5 together are longer than the whole schedule of 10"),
        (lambda: wsd(1.0, 10, 10), "wsd: warmup 10 and decay 1 together are longer"),
        (lambda: wsd(1.0, 0.6, 10, 0.5), "wsd: warmup 6 and decay 5 together are longer"),
        (lambda: warmup_cosine_linear(1.0, 6, 10, decay=5), "warmup_cosine_linear: warmup 6 and decay 5"),
        (lambda: power(1.0, 6, 10, decay=5), "power: warmup 6 and decay 5"),
        (lambda: wsds(1.0, 6, [10, 20], 5), "wsds, period 1: warmup 6 and decay 5"),
        (lambda: wsds(1.0, 1, [10, 4], 5), "wsds, period 2: decay 5 is longer than the whole schedule of 4"),
        (lambda: wsds(1.0, 1, [10, 4], 0.1, [1.0]), "wsds: 1 multipliers for 2 periods"),
        (lambda: wsds(1.0, 1, []), "wsds: there are no periods"),
        (lambda: warmup_cosine(1.0, 2000.0, 10_000), "warmup 2000.0 has a point, so it is a fraction .* write 2000 for steps"),
        (lambda: warmup_cosine(1.0, -1, 10), "warmup -1 must not be negative"),
        (lambda: warmup_constant(1.0, 0.5), "warmup 0.5 is a fraction of the schedule; give total"),
        (lambda: power(1.0, 0, 10), "power: .* warmup must be at least 1, not 0"),
        (lambda: warmup_inv_sqrt(1.0, 0, 10), "warmup_inv_sqrt: .* warmup must be at least 1, not 0"),
        (lambda: exponential(1.0, 10, 0.0), "exponential: lr_min 0 must be above 0 and below lr 1"),
        (lambda: exponential(1.0, 10, 2.0), "exponential: lr_min 2 must be above 0 and below lr 1"),
        (lambda: exponential(1.0, 0), "exponential: total 0 must be at least 1"),
        (lambda: join([constant(1.0)], [5]), "join: 1 schedules have 0 boundaries, not 1"),
        (lambda: join([constant(1.0)] * 3, [5, 5]), "join: the boundaries 5, 5 must grow"),
        (lambda: then(constant(1.0), -1, constant(1.0)), "then: the first schedule has a length of -1"),
        (lambda: piecewise(1.0, []), "piecewise: there are no pieces"),
        (lambda: piecewise(1.0, [Piece(0, 1.0)]), "piecewise: piece 1 has a length of 0"),
        (lambda: anneal(constant(1.0), 10, 0), "anneal: begin 10 must not be negative and length 0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(schedule, message):
    """In one line with the names, when the schedule is made."""
    with pytest.raises(ValueError, match=message) as error:
        schedule()
    assert "\n" not in str(error.value)


SHAPES = {
    "cosine": lambda w, t, d: warmup_cosine(0.3, w, t),
    "linear": lambda w, t, d: warmup_linear(0.3, w, t),
    "half_cosine": lambda w, t, d: warmup_half_cosine(0.3, w, t),
    "cosine_linear": lambda w, t, d: warmup_cosine_linear(0.3, w, t, decay=d),
    "wsd": lambda w, t, d: wsd(0.3, w, t, d),
    "constant": lambda w, t, d: warmup_constant(0.3, w, t),
    "inv_sqrt": lambda w, t, d: warmup_inv_sqrt(0.3, max(w, 1), t),
    "power": lambda w, t, d: power(0.3, max(w, 1), t, decay=min(d, t - max(w, 1))),
    "wsds": lambda w, t, d: wsds(0.3, w, [t], d),
}


@QUICK
@given(st.data(), st.integers(1, 60), st.sampled_from(sorted(SHAPES)))
def test_shape(data, total, name):
    """Finite, between 0 and the peak, rising in warm-up and falling after it; the peak where warm-up ends."""
    warmup = data.draw(st.integers(0, total))
    decay = data.draw(st.integers(0, total - warmup))
    schedule = SHAPES[name](warmup, total, decay)
    rates = schedule(torch.arange(total + 5))
    assert rates.isfinite().all()
    assert rates.min() >= 0
    assert rates.max() <= 0.3 * (1 + 1e-12)
    if name in ("inv_sqrt", "power"):
        warmup = max(warmup, 1)
    assert (rates[: warmup + 1].diff() > 0).all()
    assert (rates[warmup:].diff() <= 1e-16).all()
    if warmup < total - decay:
        assert rates[warmup].item() == pytest.approx((0.3 + 0.03) / 2 if name == "half_cosine" else 0.3, rel=1e-12)


@QUICK
@given(st.integers(0, 100), st.integers(1, 5000), st.integers(0, 120), st.sampled_from(sorted(SHAPES)))
def test_steps_and_tokens_agree(warmup, per_step, step, name):
    """A schedule whose lengths are in tokens, asked by the step, is the same schedule in steps."""
    in_steps, long = SHAPES[name](warmup, 110, 10), SHAPES[name](warmup * per_step, 110 * per_step, 10 * per_step)
    if name in ("inv_sqrt", "power") and not warmup:
        return
    at = torch.tensor(step)
    for tokens in (per_step, lambda s: s * per_step):
        assert in_tokens(long, tokens)(at).item() == pytest.approx(in_steps(at).item(), rel=1e-12, abs=1e-16)


@QUICK
@given(st.lists(st.tuples(st.integers(1, 30), st.floats(0, 1), st.sampled_from(["linear", "cosine"])), min_size=1, max_size=5))
def test_continuous_where_stated(drawn):
    """A step changes the rate by little in pieces without starts, and in sequences without a second warm-up."""
    pieces = [Piece(length * 10, end, shape) for length, end, shape in drawn]
    parts = [(lambda lr, p=p: warmup_linear(lr, 0, p.length, p.end), p.length) for p in pieces]
    for schedule in (piecewise(1.0, pieces), sequential(1.0, parts, constant)):
        rates = schedule(torch.arange(sum(p.length for p in pieces) + 5))
        assert rates.diff().abs().max() <= math.pi / 2 / min(p.length for p in pieces) + 1e-12
    jump = piecewise(1.0, [pieces[0], Piece(100, 0.5, start=pieces[0].end + 1)])
    at = torch.tensor(pieces[0].length)
    assert (jump(at) - jump(at - 1)).abs() > 0.5


@QUICK
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4), st.integers(0, 99))
def test_join_takes_over_after_the_boundary(lengths, step):
    """Each part sees its own steps, the border step belongs to the earlier one; `then` is a join of two."""
    parts = [lambda s, i=i: 1000.0 * i + s.double() for i in range(len(lengths) + 1)]
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths))]
    which = sum(step > end for end in ends)
    expected = 1000.0 * which + step - (ends[which - 1] if which else 0)
    at = torch.tensor(step)
    assert join(parts, ends)(at).item() == expected
    if len(parts) == 2:
        assert then(parts[0], ends[0], parts[1])(at).item() == expected


def test_a_mutant_is_caught():
    """The border given to the later part is another schedule than OLMo-core's."""
    (case,) = (c for c in CASES if c["scheduler"] == "WSDS" and c["settings"].get("warmup_fraction"))
    step, lr = next((step, lr) for step, lr in zip(case["current"], case["lr"], strict=True) if step == 250)
    late = wsds(case["initial_lr"], 0.2, [250, 250, 500], 20)
    early = wsds(case["initial_lr"], 50, [249, 251, 500], 20)
    assert late(torch.tensor(step)).item() == lr != early(torch.tensor(step)).item()


def test_scale():
    """By a number, a schedule, and a tensor of many rates at once."""
    cosine, at = warmup_cosine(0.5, 10, 100), torch.tensor(50)
    assert scale(cosine, 3.0)(at) == 3 * cosine(at)
    assert scale(cosine, warmup_constant(1.0, 100))(at) == cosine(at) / 2
    rates = torch.func.vmap(lambda factor: scale(cosine, factor)(at))(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
    assert torch.equal(rates, cosine(at) * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))


@QUICK
@given(st.integers(0, 90), st.integers(1, 30), st.floats(0, 0.2), st.sampled_from(["linear", "cosine"]))
def test_anneal(begin, length, final, shape):
    """Untouched before ``begin``, continuous there, ``final`` from the end on."""
    plain = warmup_cosine(1.0, 0, 100)
    schedule = anneal(plain, begin, length, final, shape)
    for step in range(begin + 1):
        assert schedule(torch.tensor(step)).item() == pytest.approx(plain(torch.tensor(step)).item(), rel=1e-12)
    for step in (begin + length, begin + length + 7):
        assert schedule(torch.tensor(step)).item() == pytest.approx(final, abs=1e-16)


ALL = {
    **{name: make(10, 100, 10) for name, make in SHAPES.items()},
    "exponential": exponential(1.0, 100),
    "piecewise": piecewise(1.0, [Piece(10, 1.0, start=0.0), Piece(50, 0.2, "cosine")]),
    "sequential": sequential(1.0, [(lambda lr: warmup_linear(lr, 10, 50), 50)], lambda lr: warmup_cosine(lr, 0, 50)),
    "anneal": anneal(scale(warmup_cosine(1.0, 10, 100), constant(0.5)), 40, 20),
    "in_tokens": in_tokens(wsd(1.0, 1000, 10_000), 100),
}


@pytest.mark.parametrize("name", ALL)
def test_compiles_once(name):
    """In one graph without a break, for all steps, to the same numbers; and works on many steps at once."""
    seen = []

    def backend(graph, inputs):
        seen.append(graph)
        return graph.forward

    compiled = torch.compile(ALL[name], fullgraph=True, backend=backend)
    steps = torch.tensor([0, 5, 10, 11, 60, 95, 100, 200])
    for at in steps:
        assert torch.equal(compiled(at.clone()), ALL[name](at))
    assert len(seen) == 1
    assert torch.equal(ALL[name](steps), torch.stack([ALL[name](at) for at in steps]))


def test_the_example_of_the_docs_runs(capsys):
    text = (Path(__file__).parents[2] / "docs" / "schedules.md").read_text()
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert capsys.readouterr().out == "[0.00015, 0.0003, 0.0001884, 0.0]\n"  # 3e-5 + 2.7e-4 (1 + cos 80°) / 2
