"""Optimizers and the transforms around them: OLMo-core's numbers, and laws that hold for any gradients."""

import json
import math
from pathlib import Path

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.gradients import Gradients, Grads
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.pipe import clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.optim import adamw, sgd
from olmo_fn.optim.base import Decay, Rule
from olmo_fn.optim.base import optimizer as from_rule

torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other

FIXTURES = Path(__file__).parents[1] / "fixtures" / "optim"
CASES = json.loads((FIXTURES / "optim.json").read_text())
TENSORS = load_file(FIXTURES / "optim.safetensors")
NAMES = ("w", "t", "v", "e")
QUICK = examples(40)


def no_loss(params, batch):
    """Steps are driven by given gradients here."""
    raise AssertionError("the loss is not used")


def make(*transforms):
    """A step whose gradients are given to ``update``."""
    return pipe(no_loss, grad(engine="func"), *transforms)


def tensors(case, kind):
    """The tensors ``<case>/<kind>.<name>`` by name, in memory of their own."""
    return {name: TENSORS[f"{case}/{kind}.{name}"].clone() for name in NAMES}


def optimizer(case):
    """Our AdamW with the hyper-parameters of a case, and its schedule."""
    hyper, rates = CASES[case]["hyper"], torch.tensor([0.0, *CASES[case]["lr_per_step"]], dtype=torch.float64)
    return adamw(
        lambda step: rates[step],
        tuple(hyper["betas"]),
        hyper["eps"],
        Decay(hyper.get("weight_decay", 0.0), no_decay=("e",) if CASES[case]["groups"] else ()),  # torch.optim.Adam has none
        moments=torch.bfloat16 if "bf16" in case else None,
    )


def run(case, *transforms):
    """Yield the state before and after each step of a case, and its metrics."""
    step = make(optimizer(case), *transforms)
    state = step.init(tensors(case, "param0"))
    losses = CASES[case]["loss"] or [1.0] * CASES[case]["steps"]
    norms = CASES[case]["grad_norm"] or [1.0] * CASES[case]["steps"]  # constant: never a spike
    for i, (loss, norm) in enumerate(zip(losses, norms, strict=True)):
        metrics = {"loss": torch.tensor(float(loss)), "grad_norm": torch.tensor(norm)}
        before = state
        state, metrics = step.update(state, Gradients(tensors(case, f"grad.{i}"), metrics))
        yield i + 1, before, state, metrics


# --- parity -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["adamw", "adamw_groups", "adam"])
def test_adamw_is_torch(case):
    """Parameters and moments after every step, with decay, without, and with one parameter left out."""
    for i, _, state, metrics in run(case):
        assert_close(state.params, tensors(case, f"param.{i}"), rtol=1e-6, atol=1e-7)
        for name in NAMES:
            for ours, theirs in (("adamw_m", "exp_avg"), ("adamw_v", "exp_avg_sq")):
                expected = TENSORS[f"{case}/state.{i}.{name}.{theirs}"]
                assert_close(state.slots[ours][name], expected, rtol=1e-6, atol=1e-8)
        assert metrics["lr"].item() == CASES[case]["lr_per_step"][i - 1]
    assert i == CASES[case]["steps"]


@pytest.mark.parametrize("case", ["skip_step_adamw_loop_fix", "skip_step_adamw_foreach_fix", "skip_step_adamw_loss_only"])
def test_skip_spikes_is_olmo_core(case):
    """The same steps are skipped, and parameters, moments and update count agree after every step."""
    hyper = CASES[case]["hyper"]
    skipped = []
    for i, _, state, metrics in run(case, skip_spikes(hyper["sigma_factor"], hyper["rolling_interval_length"])):
        skipped.append(metrics["skipped"].item())
        assert_close(state.params, tensors(case, f"param.{i}"), rtol=1e-5, atol=1e-7)
        for name in NAMES:
            assert state.slots["adamw"]["count"].item() == TENSORS[f"{case}/state.{i}.{name}.step"].item()
            for ours, theirs in (("adamw_m", "exp_avg"), ("adamw_v", "exp_avg_sq")):
                expected = TENSORS[f"{case}/state.{i}.{name}.{theirs}"]
                assert_close(state.slots[ours][name], expected, rtol=1e-5, atol=1e-8)
    assert skipped == CASES[case]["step_skipped"]
    assert 0 < sum(skipped) < len(skipped)


def test_bf16_moments():
    """Moments rounded to bf16 after every step: OLMo-core's updates, but nearer to those of fp32 moments.

    Ours are computed in fp32 and then rounded; OLMo-core computes in bf16.
    """
    case, exact = "skip_step_adamw_bf16_moments", "skip_step_adamw_foreach_fix"
    hyper = CASES[case]["hyper"]
    for i, before, state, metrics in run(case, skip_spikes(hyper["sigma_factor"], hyper["rolling_interval_length"])):
        assert metrics["skipped"].item() == CASES[case]["step_skipped"][i - 1]
        ours, theirs, fp32 = (
            tree.map(torch.sub, new, old)
            for new, old in (
                (state.params, before.params),
                *((tensors(c, f"param.{i}"), tensors(c, f"param.{i - 1}" if i > 1 else "param0")) for c in (case, exact)),
            )
        )
        for name in NAMES:
            assert_close(ours[name], theirs[name], rtol=0, atol=2e-2 * fp32[name].abs().max().item())
            assert state.slots["adamw_m"][name].dtype == state.slots["adamw_v"][name].dtype == torch.bfloat16
        if not metrics["skipped"]:
            errors = [SINGLE.sharing.norm(tree.map(torch.sub, update, fp32)) for update in (ours, theirs)]
            assert errors[0] < 0.8 * errors[1]


def test_nan_loss_is_skipped_alone():
    """Better than OLMo-core, where one NaN loss makes every step skipped until it has left the window.

    Here the NaN never enters the history: its own step is skipped, the next is judged by the finite ones.
    """
    case = "skip_step_adamw_nan_loss"
    window = CASES[case]["hyper"]["rolling_interval_length"]
    nan = [math.isnan(float(loss)) for loss in CASES[case]["loss"]]
    at = nan.index(True) + 1
    assert CASES[case]["step_skipped"][at - 1 :] == [1.0] * 5  # theirs
    for i, before, state, metrics in run(case, skip_spikes(6.0, window)):
        assert metrics["skipped"].item() == (i == at)
        history = state.slots["skip_spikes"]
        assert history["history"].isfinite().all()
        if i == at:
            assert metrics["loss"].isnan()  # reported
            assert_equal(history, before.slots["skip_spikes"])
            assert_equal(state.params, before.params)
    assert state.slots["adamw"]["count"].item() == len(nan) - 1


# --- laws ---------------------------------------------------------------------------------------------------


def assert_equal(a, b):
    """Bit for bit (``torch.equal`` would call 0.0 and -0.0 the same, and NaN different from itself)."""
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        assert torch.equal(*(x[path].reshape(-1).view(torch.uint8) for x in (a, b))), path


def random(seed, scale=1.0):
    """A tree of parameters or gradients."""
    g = torch.Generator().manual_seed(seed)
    return {
        "embed": torch.randn(5, 4, generator=g) * scale,
        "blocks": {"0": {"w": torch.randn(4, 3, generator=g) * scale, "norm": torch.ones(3)}},
    }


def metrics(loss=1.0, norm=1.0):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}


seeds = st.integers(0, 2**32)
OPTIMIZERS = {"adamw": lambda: adamw(1e-2), "sgd": lambda: sgd(1e-2)}


@QUICK
@given(
    seeds,
    st.sampled_from(sorted(OPTIMIZERS)),
    st.sampled_from([(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, math.inf), (50.0, 1.0), (1.0, 50.0)]),
    st.booleans(),
)
def test_a_skipped_step_changes_nothing(seed, name, bad, poison):
    """Parameters and slots stay bit-equal, whatever the gradients hold; the step and the history move on."""
    step = make(OPTIMIZERS[name](), skip_spikes(sigma=6, window=8), ema(0.9))
    state = step.init(random(seed))
    for i in range(5):
        state, report = step.update(state, Gradients(random(seed + 1 + i), metrics(1 + 0.01 * i, 1 - 0.01 * i)))
        assert not report["skipped"]
    bad_grads = random(seed + 9, scale=math.nan if poison else 1.0)
    after, report = step.update(state, Gradients(bad_grads, metrics(*bad)))
    assert report["skipped"]
    assert after.step == state.step + 1
    assert_equal(after.params, state.params)
    kept = {slot: value for slot, value in after.slots.items() if slot != "skip_spikes"}
    assert_equal(kept, {slot: state.slots[slot] for slot in kept})
    after, report = step.update(after, Gradients(random(seed + 10), metrics()))
    assert not report["skipped"]
    assert not torch.equal(after.params["embed"], state.params["embed"])


@QUICK
@given(
    seeds,
    st.sampled_from(sorted(OPTIMIZERS)),
    st.lists(st.sampled_from([1.0, 1.1, 9.0, math.nan]), min_size=1, max_size=8),
)
def test_donate_is_invisible(seed, name, losses):
    """Writing into the old state's memory gives the same bits, in that memory."""
    plain, donated = (make(OPTIMIZERS[name](), skip_spikes(sigma=3, window=4), ema(0.9), *more) for more in ((), (donate(),)))
    a, b = plain.init(random(seed)), donated.init(random(seed))
    memory = {path: p.data_ptr() for path, p in tree.items(b.params)}
    for i, loss in enumerate(losses):
        a, in_a = plain.update(a, Gradients(random(seed + i), metrics(loss)))
        b, in_b = donated.update(b, Gradients(random(seed + i), metrics(loss)))
        assert_equal(in_a, in_b)
        assert_equal(a._asdict(), b._asdict())
    assert {path: p.data_ptr() for path, p in tree.items(b.params)} == memory


def test_two_slots_of_one_name_are_refused():
    """An optimizer keeps its count in a slot of its own name, which a slot of the parameters would overwrite."""
    rule = Rule(lambda path, p: {"mine": torch.zeros_like(p)}, lambda p, g, slots, scalars: (g, slots))
    with pytest.raises(ValueError, match="'mine' is a slot of parameters"):
        make(from_rule("mine", rule, 0.1)).init({"w": torch.zeros(2)})


def test_without_donate_the_old_state_stays():
    """A step is pure: the state that it was given keeps its bits."""
    step = make(adamw(1e-2), skip_spikes(window=4), ema(0.9))
    state = step.init(random(0))
    for i in range(3):
        before = tree.map(torch.clone, state._asdict())
        after, _ = step.update(state, Gradients(random(i + 1), metrics()))
        assert_equal(state._asdict(), before)
        state = after


@QUICK
@given(seeds, st.floats(0, 1), st.integers(1, 5))
def test_ema_formula(seed, decay, steps):
    """decay · ema + (1 - decay) · params after each update; all else is as without it."""
    plain, averaged = make(adamw(1e-1)), make(adamw(1e-1), ema(decay))
    a, b = plain.init(random(seed)), averaged.init(random(seed))
    expected = tree.map(torch.Tensor.double, random(seed))
    for i in range(steps):
        a, _ = plain.update(a, Gradients(random(seed + i), metrics()))
        b, _ = averaged.update(b, Gradients(random(seed + i), metrics()))
        assert_equal(a.params, b.params)
        expected = tree.map(lambda e, p: decay * e + (1 - decay) * p.double(), expected, b.params)
        assert_close(tree.map(torch.Tensor.double, b.slots["ema"]), expected, rtol=1e-5, atol=1e-6)
    assert_equal(a.slots, {slot: value for slot, value in b.slots.items() if slot != "ema"})


@QUICK
@given(seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clip(seed, scale, max_norm):
    """The direction stays, the norm is at most the maximum, a second clip changes nothing."""
    grads = random(seed, scale)
    given = Grads(lambda params, batch, execution: Gradients(tree.map(torch.clone, grads), {"loss": torch.ones(())}))
    got, report = clip(max_norm)(given)({}, {})
    before = SINGLE.sharing.norm(grads)
    assert report == {"loss": 1, "grad_norm": before}
    assert SINGLE.sharing.norm(got) <= max_norm * (1 + 1e-6)
    if before + 1e-6 < max_norm:
        assert_equal(got, grads)
    else:  # OLMo-core's 1e-6 in the denominator, which also is what a second clip may change
        assert_close(got, tree.map(lambda g: g * (max_norm / (before + 1e-6)), grads), rtol=1e-5, atol=0)
    again = clip(max_norm)(clip(max_norm)(given))({}, {})[0]
    assert_close(again, got, rtol=1e-6 + 1e-6 / max_norm, atol=0)


def test_no_decay_by_path():
    """With zero gradients only the decay acts: on matrices, not on norms, nor on the embedding."""
    step = make(adamw(0.5, weight_decay=0.1))
    params = random(0)
    state, _ = step.update(step.init(params), Gradients(tree.map(torch.zeros_like, params), metrics()))
    assert_close(state.params["blocks"]["0"]["w"], params["blocks"]["0"]["w"] * 0.95)
    assert_equal(state.params["embed"], params["embed"])
    assert_equal(state.params["blocks"]["0"]["norm"], params["blocks"]["0"]["norm"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converges(name):
    """A quadratic is minimised through the whole step."""

    def loss(params, batch):
        return ((params["w"] - torch.arange(4.0)).square() * torch.tensor([1.0, 2.0, 3.0, 4.0])).sum(), {}

    transform = {"adamw": adamw(0.1, weight_decay=0.0), "sgd": sgd(0.1)}[name]
    step = pipe(loss, grad(engine="func"), transform)
    state = step.init({"w": torch.full((4,), 5.0)})
    for _ in range(300):
        state, report = step(state, {"labels": torch.zeros(1, dtype=torch.int64)})
    assert report["loss"] < 1e-3


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("more", [(), (donate(),)], ids=["plain", "donate"])
def test_dtypes_stay(name, more):
    """Gradients are fp32; parameters and slots keep the dtype that they have, and round the exact result once."""
    step, exact = make(OPTIMIZERS[name](), ema(0.5), *more), make(OPTIMIZERS[name](), ema(0.5))
    state = step.init(tree.map(torch.Tensor.bfloat16, random(0)))
    dtypes = tree.map(lambda x: x.dtype, state._asdict())
    wide = exact.init(tree.map(torch.Tensor.float, state.params))
    state, _ = step.update(state, Gradients(random(1), metrics()))
    wide, _ = exact.update(wide, Gradients(random(1), metrics()))
    assert tree.map(lambda x: x.dtype, state._asdict()) == dtypes
    assert_equal(state.params, tree.map(torch.Tensor.bfloat16, wide.params))


@pytest.mark.parametrize("more", [(), (donate(),)], ids=["plain", "donate"])
def test_parameters_of_any_layout(more):
    """Transposed parameters, as an importer may leave them, are trained like contiguous ones."""
    step = make(adamw(1e-2), *more)
    w = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    a, b = ({"w": x} for x in (w.T, w.T.contiguous()))
    a, b = (step.update(step.init(p), Gradients({"w": torch.ones(4, 3)}, metrics()))[0] for p in (a, b))
    assert_equal(a._asdict(), b._asdict())


# --- skip_spikes --------------------------------------------------------------------------------------------


def test_skip_spikes_without_a_spike_is_the_identity():
    """Bit for bit, also when the losses fall fast: only what is above the mean is a spike."""
    plain, guarded = make(adamw(1e-2)), make(adamw(1e-2), skip_spikes(sigma=6, window=8))
    a, b = plain.init(random(0)), guarded.init(random(0))
    for i in range(20):
        a, _ = plain.update(a, Gradients(random(i), metrics(10.0 * 0.5**i, 1.0)))
        b, report = guarded.update(b, Gradients(random(i), metrics(10.0 * 0.5**i, 1.0)))
        assert not report["skipped"]
        assert_equal(a.params, b.params)


def test_skip_spikes_waits_for_half_a_window():
    """Before that a spike passes: there is nothing to judge it by."""
    step = make(sgd(0.1), skip_spikes(sigma=6, window=8))
    for steps, skipped in ((2, False), (3, True)):
        state = step.init(random(0))
        for i in range(steps):
            state, _ = step.update(state, Gradients(random(i), metrics(1.0 + 0.01 * i)))
        assert step.update(state, Gradients(random(9), metrics(100.0)))[1]["skipped"] == skipped


@QUICK
@given(
    st.lists(st.floats(-5, 5), min_size=3, max_size=20),
    st.floats(0.5, 6),
    st.integers(4, 12),
    st.sampled_from(["loss", "grad_norm"]),
)
def test_skip_spikes_rule(values, sigma, window, of):
    """The border is ``sigma`` unbiased deviations above the mean of the window before, for either value."""
    step = make(sgd(0.1), skip_spikes(sigma, window))
    state = step.init(random(0))
    for i, value in enumerate(values):
        past = torch.tensor(values[max(0, i - window) : i], dtype=torch.float64)
        judged = i + 1 >= max(3, window // 2)
        if judged:
            border, room = past.mean() + sigma * past.std(), 1e-3 * sigma * past.std() + 1e-12
            for near, skipped in ((border - room, 0), (border + room, 1)):
                report = step.update(state, Gradients(random(i), {**metrics(), of: near}))[1]
                assert report["skipped"] == skipped
        state, report = step.update(state, Gradients(random(i), {**metrics(), of: torch.tensor(value, dtype=torch.float64)}))
        assert judged or not report["skipped"]
