"""Several runs at once are the same runs, one after the other."""

from functools import partial

import pytest
import torch
from optimizers import OPTIMIZERS, beside, exact
from torch.testing import assert_close

from olmo_fn import spec, tree
from olmo_fn.core.compile import compile, has_compiler
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.optim import adamw, sgd, soap
from olmo_fn.optim.schedules import warmup_cosine
from olmo_fn.research import compiled, lr_scale, many, stack, train_many, unstack, with_lr_scale

MODEL = dense(16, 2, 2, 24, vocab_size=30, init_std=0.3)
K, STEPS = 4, 6


def step_of(*more, dtype=torch.float64, engine="func", optimizer=None):
    return pipe(
        transformer.loss(MODEL, z_loss=1e-3),
        grad(engine, dtype=dtype),
        accumulate(2),
        clip(1.0),
        optimizer or adamw(warmup_cosine(3e-2, 2, 20)),
        skip_spikes(sigma=1.0, window=4),  # so eager that it skips some steps, others in each run
        ema(0.9),
        *more,
    )


def batches(n=STEPS, seed=0, lead=()):
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        ids = torch.randint(30, (*lead, 4, 10), generator=g)
        made.append({"input_ids": ids[..., :-1].contiguous(), "labels": ids[..., 1:].contiguous()})
    return made


def starts(step, dtype=torch.float64):
    return [step.init(spec.init(transformer.specs(MODEL), seed, dtype)) for seed in range(K)]


def one_after_the_other(step, states, data):
    ends, lines = [], []
    for state, own in zip(states, data, strict=True):
        metrics = []
        for batch in own:
            state, line = step(state, batch)
            metrics.append(line)
        ends.append(state)
        lines.append(stack(metrics))
    return ends, {name: torch.stack([line[name] for line in lines], dim=1) for name in lines[0]}


def assert_same_runs(got, expected, **tolerance):
    (states, metrics), (others, lines) = got, expected
    assert len(states) == len(others) == K
    for a, b in zip(states, others, strict=True):
        for x, y in zip(a, b, strict=True):
            for path, leaf in tree.items(y):
                assert_close(tree.at(x, path) if path else x, leaf, msg=lambda m, p=path: f"{p}: {m}", **tolerance)
    assert metrics.keys() == lines.keys()
    for name in lines:
        assert_close(metrics[name], lines[name], **tolerance)


def test_seeds():
    step, data = step_of(), batches()
    got = train_many(step, starts(step), data)
    assert_same_runs(got, one_after_the_other(step, starts(step), [data] * K), rtol=1e-9, atol=1e-11)
    skipped = got[1]["skipped"]
    assert skipped.shape == (STEPS, K)
    assert 0 < skipped.sum() < skipped.numel()
    assert (skipped.any(1) & ~skipped.all(1)).any(), "no step that only some of the runs skipped"


def test_each_run_with_data_of_its_own():
    step = step_of()
    data = [batches(seed=seed) for seed in range(K)]
    got = train_many(step, starts(step), [stack(at_once) for at_once in zip(*data, strict=True)], batch_per_run=True)
    assert_same_runs(got, one_after_the_other(step, starts(step), data), rtol=1e-9, atol=1e-11)


# soap's longer sides have covariances that are not of full rank at first, of which rounding chooses the eigenvectors
VMAPPED = {name: make for name, make in OPTIMIZERS.items() if exact(name)} | {
    "soap": beside(partial(soap, every=2, max_dim=16, eps=1e-4))
}


@pytest.mark.parametrize("make", VMAPPED.values(), ids=list(VMAPPED))
def test_every_optimizer(make):
    step = step_of(optimizer=make(0.01, transformer.specs(MODEL)))
    alone = one_after_the_other(step, starts(step), [batches(3)] * K)
    assert_same_runs(train_many(step, starts(step), batches(3)), alone, rtol=1e-5, atol=1e-6)


def test_learning_rates_with_a_schedule():
    """One step with lr_scale, K scales: each run is that of a schedule with its own peak."""
    peaks = [1e-3, 3e-3, 1e-2, 3e-2]
    data = batches()
    step = step_of(lr_scale(), optimizer=adamw(warmup_cosine(1.0, 2, 20)))
    state = starts(step)[0]
    states, metrics = train_many(step, [with_lr_scale(state, peak) for peak in peaks], data)
    for i, peak in enumerate(peaks):
        plain = step_of(optimizer=adamw(warmup_cosine(peak, 2, 20)))
        (end,), lines = one_after_the_other(plain, starts(plain)[:1], [data])
        assert_close(metrics["lr"][:, i], lines["lr"][:, 0], rtol=1e-12, atol=0.0)
        assert_close(states[i].params, end.params, rtol=1e-9, atol=1e-11)
    assert metrics["lr"][0].unique().numel() == K


def test_learning_rate_as_an_input():
    """Without a slot: the step is built inside the function that is vmapped, and the schedule closes over the rate."""
    rates, batch = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64), batches(1)[0]
    params = spec.init(transformer.specs(MODEL), 0, torch.float64)

    def after(rate):
        step = step_of(optimizer=sgd(lambda step: rate))
        return step(step.init(params), batch)[0].params

    got = unstack(torch.func.vmap(after)(rates))
    for params_of_run, rate in zip(got, rates, strict=True):
        assert_close(params_of_run, after(rate), rtol=1e-9, atol=1e-11)


def test_donation_writes_into_the_stacked_state():
    step, data = step_of(donate()), batches(1)
    stacked = stack(starts(step))
    memory = stacked.params["embed"].data_ptr()
    after, _ = many(step)(stacked, data[0])
    assert after.params["embed"].data_ptr() == memory
    plain = step_of()
    expected, _ = many(plain)(stack(starts(plain)), data[0])
    assert_close(after.params, expected.params, rtol=0.0, atol=0.0)


def test_stack_and_unstack_are_inverse():
    step = step_of()
    states = starts(step)
    for state, back in zip(states, unstack(stack(states)), strict=True):
        assert type(back) is type(state)
        assert all(torch.equal(tree.at(back.params, path), p) for path, p in tree.items(state.params))
        assert torch.equal(back.slots["skip_spikes"]["history"], state.slots["skip_spikes"]["history"])


def test_what_cannot_be_vmapped_is_said():
    step = step_of(engine="tape")
    with pytest.raises(ValueError, match=r"engine tape cannot be inside vmap.*grad\(engine='func'\)"):
        train_many(step, starts(step), batches(1))
    if has_compiler():
        with pytest.raises(ValueError, match=r"compile\(\) cannot be inside vmap"):
            many(step_of(compile()))
    with pytest.raises(ValueError, match=r"no slot lr_scale; add lr_scale\(\)"):
        with_lr_scale(starts(step_of())[0], 2.0)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compiled_runs_are_the_eager_ones():
    model = modified(MODEL, n_layers=1)
    step = pipe(transformer.loss(model), grad("func"), clip(1.0), adamw(3e-2))
    data = batches(3)
    eager = fast = stack([step.init(spec.init(transformer.specs(model), seed)) for seed in range(K)])
    run = compiled(many(step), eager, data[0])
    for batch in data:
        eager, expected = many(step)(eager, batch)
        fast, metrics = run(fast, batch)
        assert_close(metrics["loss"], expected["loss"], rtol=1e-5, atol=1e-5)
    assert_close(fast.params, eager.params, rtol=1e-3, atol=1e-4)  # Adam magnifies rounding where gradients are near 0
    with pytest.raises(ValueError, match="compiled for other shapes"):
        run(fast, {name: value[:2] for name, value in data[0].items()})
