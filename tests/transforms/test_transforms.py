"""Transforms around the step: skipping, clipping, noise scale, normalisation, merging, and OLMo-core's old bias correction."""

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

from olmo_fn import transforms, tree
from olmo_fn.core.gradients import Gradients, Grads
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, sgd
from olmo_fn.optim.base import Decay
from olmo_fn.spec import init
from olmo_fn.transforms import (
    accumulate_measured,
    clip_groups,
    clip_value,
    dims_of,
    first_step_bias,
    merge,
    noise_scale,
    normalize,
    skip_steps,
    unit_params,
)

FIXTURES = Path(__file__).parents[1] / "fixtures" / "optim"
CASES = json.loads((FIXTURES / "skip.json").read_text())
TENSORS = load_file(FIXTURES / "skip.safetensors")
QUICK = examples(25)
seeds = st.integers(0, 2**31)


def no_loss(params, batch):
    raise AssertionError("the loss is not used")


def make(*transforms):
    """A step whose gradients are given to ``update``."""
    return pipe(no_loss, grad(engine="func"), *transforms)


def random(seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    return {"embed": torch.randn(5, 4, generator=g) * scale, "blocks": {"0": {"w": torch.randn(4, 3, generator=g) * scale}}}


def metrics(loss=1.0, norm=1.0):
    return {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}


def assert_equal(a, b):
    """Bit for bit."""
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert torch.equal(*(x[path].reshape(-1).view(torch.uint8) for x in (a, b))), path


def chunks(grads, metrics):
    """A gradient function that gives these."""
    return Grads(lambda params, batch, execution: Gradients(tree.map(torch.clone, grads), dict(metrics)))


# --- skipping ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["skip_step_adamw_loop_nofix", "skip_step_adamw_foreach_nofix"])
def test_the_old_bias_correction_is_olmo_core(case):
    """``step_increment_bugfix=False``: parameters, moments and skipped steps after every step."""
    c, hyper, names = CASES[case], CASES[case]["hyper"], ("w", "t", "v", "e")
    optimizer = adamw(hyper["lr"], tuple(hyper["betas"]), hyper["eps"], Decay(hyper["weight_decay"], ()))
    states = {}
    for kind, wrapped in (("bug", first_step_bias(optimizer)), ("fixed", optimizer)):
        step = make(wrapped, skip_spikes(hyper["sigma_factor"], hyper["rolling_interval_length"]))
        state = step.init({n: TENSORS[f"{case}/param0.{n}"].clone() for n in names})
        for i, (loss, norm) in enumerate(zip(c["loss"], c["grad_norm"], strict=True)):
            grads = {n: TENSORS[f"{case}/grad.{i}.{n}"].clone() for n in names}
            state, report = step.update(state, Gradients(grads, metrics(loss, norm)))
            assert report["skipped"].item() == c["step_skipped"][i]
            for n in names if kind == "bug" else ():
                assert_close(state.params[n], TENSORS[f"{case}/param.{i + 1}.{n}"], rtol=1e-5, atol=1e-7)
                assert_close(state.slots["adamw_m"][n], TENSORS[f"{case}/state.{i + 1}.{n}.exp_avg"], rtol=1e-5, atol=1e-8)
                assert_close(state.slots["adamw_v"][n], TENSORS[f"{case}/state.{i + 1}.{n}.exp_avg_sq"], rtol=1e-5, atol=1e-8)
        assert state.slots["adamw"]["count"] == len(c["loss"]) - sum(c["step_skipped"])
        states[kind] = state
    assert not torch.allclose(states["bug"].params["w"], states["fixed"].params["w"], rtol=1e-2)  # the mutant
    assert_equal(states["bug"].slots["adamw_m"], states["fixed"].slots["adamw_m"])


@pytest.mark.parametrize("case", ["noop", "skip_step_lion"])
def test_skip_decisions_do_not_depend_on_the_optimizer(case):
    """OLMo-core's decisions for its other skip-step optimizers, from losses and norms alone."""
    c, hyper = CASES[case], CASES[case]["hyper"]
    step = make(sgd(0.0), skip_spikes(hyper["sigma_factor"], hyper["rolling_interval_length"]))
    state, skipped = step.init(random(0)), []
    for loss, norm in zip(c["loss"], c["grad_norm"], strict=True):
        state, report = step.update(state, Gradients(random(1), metrics(loss, norm)))
        skipped.append(report["skipped"].item())
    assert skipped == c["step_skipped"]
    assert 0 < sum(skipped) < len(skipped)


@QUICK
@given(seeds, st.lists(st.tuples(st.integers(1, 8), st.integers(0, 3)), max_size=3))
def test_skip_steps(seed, drawn):
    """These steps, ends included, change nothing but the step; all others are as without."""
    ranges = [(first, first + more) for first, more in drawn]
    plain, skipping = make(adamw(1e-2)), make(adamw(1e-2), skip_steps(ranges))
    a, b = plain.init(random(seed)), skipping.init(random(seed))
    for now in range(1, 12):
        grads, before = random(seed + now), b
        b, report = skipping.update(b, Gradients(tree.map(torch.clone, grads), metrics()))
        inside = any(first <= now <= last for first, last in ranges)
        assert report["skipped"] == inside
        assert b.step == now
        if inside:
            assert_equal(b._replace(step=before.step)._asdict(), before._asdict())
        else:
            a, _ = plain.update(a, Gradients(grads, metrics()))
            assert_equal(a.params, b.params)


@pytest.mark.parametrize("wrong", [(0, 3), (5, 4), (-1, 2)])
def test_no_range_of_steps(wrong):
    with pytest.raises(ValueError, match=f"skip_steps: {wrong[0]} to {wrong[1]} is no range"):
        skip_steps([wrong])


# --- clipping ---------------------------------------------------------------------------------------------------


@QUICK
@given(seeds, st.floats(0.01, 10))
def test_clip_value(seed, largest):
    grads = random(seed, 3.0)
    got, _ = clip_value(largest)(chunks(grads, {"loss": torch.ones(())}))({}, {})
    assert_equal(got, tree.map(lambda g: g.clamp(-largest, largest), grads))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("more", [(), (clip(1.0),)])
def test_clip_value_does_not_hide_what_is_not_finite(bad, more):
    """Clipped, an infinite gradient would pass for a large one: the step is skipped."""

    def loss(params, batch):
        return (params["w"] * torch.tensor([bad, 1.0])).sum(), {}

    step = pipe(loss, grad(engine="func"), clip_value(1.0), *more, sgd(0.1))
    state = step.init({"w": torch.zeros(2)})
    after, report = step(state, {"labels": torch.zeros(1, dtype=torch.int64)})
    assert report["skipped"] == 1
    assert_equal(after.params, state.params)


@QUICK
@given(seeds, st.floats(0.05, 5), st.floats(0.05, 5))
def test_clip_groups(seed, small, rest):
    """Each group as `clip` does it alone; the norm of all is that from before."""
    grads = random(seed)
    given = chunks(grads, {"loss": torch.ones(())})
    got, report = clip_groups({"embed": small, "default": rest}, grads)(given)({}, {})
    for group, names, max_norm in (("embed", ["embed"], small), ("default", ["blocks.*"], rest)):
        part = tree.partition(grads, names)[0]
        alone, alone_report = clip(max_norm)(chunks(part, {"loss": torch.ones(())}))({}, {})
        assert_close(tree.partition(got, names)[0], alone, rtol=1e-5, atol=0)
        assert report[f"grad_norm/{group}"] == alone_report["grad_norm"]
    assert_close(report["grad_norm"], SINGLE.sharing.norm(grads))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"embed": 1.0}, 'clip_groups: no group has blocks.0.w; add "default"'),
        ({"nothing*": 1.0, "default": 1.0}, "pattern 'nothing\\*' matches no parameter; there are embed, blocks.0.w"),
        ({"embed": 1.0, "e*": 1.0, "default": 1.0}, "clip_groups: embed is in two groups, 'embed' and 'e\\*'"),
    ],
)
def test_groups_that_do_not_fit(groups, message):
    with pytest.raises(ValueError, match=message) as error:
        clip_groups(groups, random(0))
    assert "\n" not in str(error.value)


# --- gradient noise scale ---------------------------------------------------------------------------------------


def noisy(dim, sigma):
    """A loss whose gradient for a token is a fixed vector plus noise of known size: tr Σ = dim · sigma²."""
    signal = torch.full((dim,), 0.5, dtype=torch.float64)

    def loss(params, batch):
        kept = batch["labels"] != -100
        return ((signal + sigma * batch["noise"]) @ params["w"])[kept].sum(), {}

    return loss, float(dim * sigma**2 / signal.square().sum())


def noisy_batches(steps, rows, dim, uneven):
    g = torch.Generator().manual_seed(0)
    for _ in range(steps):
        labels = torch.zeros(rows, 2, dtype=torch.int64)
        if uneven:
            labels[torch.rand(rows, 2, generator=g) < 0.4] = -100
            labels[0] = 0
        yield {"labels": labels, "noise": torch.randn(rows, 2, dim, dtype=torch.float64, generator=g)}


@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("sigma", [0.5, 3.0])
def test_noise_scale_is_the_known_one(uneven, sigma):
    """Over many batches the estimate is that of a problem whose noise is known; masks may be uneven."""
    loss, known = noisy(64, sigma)
    step = pipe(loss, grad(engine="func"), accumulate_measured(4), clip_value(0.1), sgd(0.0), noise_scale(0.99))
    state = step.init({"w": torch.zeros(64, dtype=torch.float64)})
    plain = pipe(loss, grad(engine="func"), accumulate(4), sgd(0.0))
    for batch in noisy_batches(200, 16, 64, uneven):
        state, report = step(state, batch)
    assert report["noise_scale"].item() == pytest.approx(known, rel=0.1)
    assert set(report) - {"noise_scale"} == set(plain(plain.init(state.params), batch)[1])


def test_noise_scale_needs_finite_values_and_parts():
    loss, _ = noisy(8, 1.0)
    step = pipe(loss, grad(engine="func"), accumulate_measured(2), sgd(0.0), noise_scale())
    state = step.init({"w": torch.zeros(8, dtype=torch.float64)})
    (batch,) = noisy_batches(1, 4, 8, False)
    state, _ = step(state, batch)
    after, _ = step(state, {**batch, "noise": batch["noise"] * math.nan})
    assert_equal(after.slots["noise_scale"], state.slots["noise_scale"])
    with pytest.raises(ValueError, match=r"noise_scale\(0.99\) needs accumulate_measured, which is nowhere before it"):
        pipe(loss, grad(engine="func"), accumulate(2), sgd(0.0), noise_scale())
    bare = noise_scale()(pipe(loss, grad(engine="func"), accumulate(2), sgd(0.0)))  # without a pipe that could see it
    with pytest.raises(ValueError, match="noise_scale needs accumulate_measured"):
        bare(bare.init(state.params), batch)
    with pytest.raises(ValueError, match=r"accumulate_measured\(1\)"):
        accumulate_measured(1)


# --- normalisation ----------------------------------------------------------------------------------------------


def test_normalize_keeps_rows_at_length_one():
    """Every matrix along the model's width, as in OLMo-core's nGPT; norms' gains are left alone; compiled donation too."""
    model = dense(d_model=8, n_layers=1, n_heads=2, hidden_size=12, vocab_size=16)
    specs = transformer.specs(model)
    dims = dims_of(specs)
    assert {dims[f"blocks.0.{name}"] for name in ("attention.w_q", "feed_forward.w_up")} == {0}
    assert {dims[name] for name in ("blocks.0.attention.w_out", "blocks.0.feed_forward.w_down", "embed")} == {1}
    assert not any("norm" in path for path in dims)
    step = pipe(transformer.loss(model), grad(), adamw(0.1), normalize(dims), ema(0.5), donate())
    plain = pipe(transformer.loss(model), grad(), adamw(0.1))
    params = unit_params(init(specs, 0), dims)
    state, bare = step.init(params), plain.init(tree.map(torch.clone, params))
    ids = torch.randint(16, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}
    expected = plain(bare, batch)[0].params
    for i in range(3):
        state, _ = step(state, batch)
        if i == 0:
            assert_close(state.params, unit_params(expected, dims))
        for path, p in tree.items(state.params):
            off = max((p.norm(dim=dims.get(path, 0)) - 1).abs().max().item(), 0)
            assert (off < 1e-6) == (path in dims), path


# --- merging ----------------------------------------------------------------------------------------------------


@QUICK
@given(seeds, st.integers(1, 3), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.sets(st.integers(1, 20), max_size=6))
def test_merge_is_the_mean_of_the_last_steps(seed, last, gaps, bad):
    """At each step of ``at`` the slot is the mean of the parameters after the last updates; else as without."""
    at = [sum(gaps[: i + 1]) + last * (i + 1) for i in range(len(gaps))]
    plain, merging = make(sgd(0.1)), make(sgd(0.1), merge(last, at), donate())
    a, b = plain.init(random(seed)), merging.init(random(seed))
    seen = []
    for now in range(1, at[-1] + 3):
        loss = math.nan if now in bad else 1.0
        grads = random(seed + now)
        a, report = plain.update(a, Gradients(tree.map(torch.clone, grads), metrics(loss)))
        b, _ = merging.update(b, Gradients(grads, metrics(loss)))
        assert_equal(a.params, b.params)
        seen.append(None if report["skipped"] else a.params)
        if now in at:
            window = [p for p in seen[-last:] if p is not None]
            if window:
                mean = tree.map(lambda *xs: torch.stack(xs).mean(0), *window)
                assert_close(b.slots["merge"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("last", "at"), [(0, [5]), (6, [5]), (3, [5, 7]), (3, [])])
def test_windows_that_do_not_fit(last, at):
    with pytest.raises(ValueError, match="merge: the last"):
        merge(last, at)


# --- they go together -------------------------------------------------------------------------------------------


def test_all_at_once_hides_nothing():
    """What they remember is in the state: from a copy of it, a step made anew gives the same bits."""
    parts = [first_step_bias(adamw(1e-2)), skip_spikes(window=8), skip_steps([(2, 2)]), normalize({"embed": 1}), merge(2, [4])]
    step = make(*parts)
    state = step.init(random(0))
    for i in range(3):
        state, _ = step.update(state, Gradients(random(i), metrics()))
    again = tree.map(torch.clone, state._asdict())
    a, _ = step.update(state, Gradients(random(9), metrics()))
    b, _ = make(*parts).update(type(state)(**again), Gradients(random(9), metrics()))
    assert_equal(a._asdict(), b._asdict())


def test_the_package_gives_functions():
    """No module hides the transform of its name."""
    assert all(callable(getattr(transforms, name)) for name in transforms.__all__)
