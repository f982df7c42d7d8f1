"""Per-example gradients, sharpness, gradient checks, a transform of one's own, derivatives through steps."""

from dataclasses import replace

import pytest
import torch
from torch.func import grad as derivative
from torch.func import hessian
from torch.testing import assert_close

from olmo_fn import spec, tree
from olmo_fn.core.chain import IGNORE, loss_tokens
from olmo_fn.core.compile import compile, has_compiler
from olmo_fn.core.gradients import Gradients, Grads
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.pipe import Transform, accumulate, clip, differentiable, donate, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, sgd
from olmo_fn.optim.schedules import warmup_cosine
from olmo_fn.research import (
    centralize,
    check_commutes,
    check_form,
    check_gradients,
    check_idempotent,
    hypergradient,
    lr_scale,
    mean_loss,
    outliers,
    per_example,
    per_example_loop,
    sharpness,
    top_eigenvalue,
    unroll,
    with_lr_scale,
)
from olmo_fn.research.check_gradients import slope

MODEL = dense(8, 1, 2, 8, vocab_size=11, init_std=0.3)
LOSS = transformer.loss(MODEL, z_loss=1e-2)


def params_of(seed=0, dtype=torch.float64):
    return spec.init(transformer.specs(MODEL), seed, dtype)


def batch_of(rows=4, length=9, seed=0, masked=0.2):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(11, (rows, length + 1), generator=g)
    labels = ids[:, 1:].masked_fill(torch.rand(rows, length, generator=g) < masked, IGNORE)
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


# --- per example ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 1, 3])
def test_per_example_is_the_gradient_of_each_row(chunk):
    params, batch = params_of(), batch_of()
    got = per_example(LOSS, params, batch, chunk)
    total = loss_tokens(batch)
    for i in range(4):
        row = {name: value[i : i + 1] for name, value in batch.items()}
        assert_close(got.loss[i], LOSS(params, row)[0])
        g = derivative(lambda p, row=row: LOSS(p, row)[0])(params)
        assert_close(got.grad_norm[i], SINGLE.sharing.norm(g) / total)
    assert got.tokens.tolist() == (batch["labels"] != IGNORE).sum(1).tolist()
    assert int(got.tokens.sum()) == int(total)


@pytest.mark.parametrize("engine", ["func", "tape"])
def test_one_after_the_other_is_the_same(engine):
    params, batch = params_of(), batch_of()
    grads = pipe(LOSS, grad(engine, dtype=torch.float64))
    for a, b in zip(per_example_loop(grads, params, batch), per_example(LOSS, params, batch), strict=True):
        assert_close(a, b)


def test_an_outlier_is_found():
    """A model that has learned one text well; a row of another stands out in a batch."""
    g = torch.Generator().manual_seed(1)
    period = torch.randint(11, (4,), generator=g)
    ids = torch.stack([period.roll(i).repeat(4)[:13] for i in range(8)])
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    step = pipe(LOSS, grad("func"), clip(1.0), adamw(3e-2))
    state = unroll(step, step.init(params_of(dtype=torch.float32)), [batch] * 40)
    odd = {name: value.clone() for name, value in batch.items()}
    odd["labels"][5] = torch.randint(11, (12,), generator=g)
    assert outliers(per_example(LOSS, state.params, odd).grad_norm) == [5]
    assert outliers(torch.ones(5)) == []


# --- sharpness --------------------------------------------------------------------------------------------------------


def dense_hessian(params, batch):
    paths = tree.flatten(params)
    sizes = [p.numel() for p in paths.values()]

    def flat_loss(x):
        parts = zip(paths.items(), x.split(sizes), strict=True)
        return mean_loss(LOSS, batch)(tree.unflatten((path, part.view(p.shape)) for (path, p), part in parts))

    return hessian(flat_loss)(torch.cat([p.flatten() for p in paths.values()]))


def test_sharpness_is_the_dense_top_eigenvalue():
    params, batch = params_of(), batch_of()
    H = dense_hessian(params, batch)
    expected = torch.linalg.eigvalsh(H)
    found = sharpness(LOSS, params, batch, tolerance=1e-6)
    assert_close(found.value, expected[-1].item(), rtol=1e-8, atol=0.0)
    assert found.products < 60 < len(H)
    assert expected[0] < 0  # a Hessian that is not definite: the top, not the largest in size
    v = torch.cat([x.flatten() for _, x in tree.items(found.vector)])
    assert_close(v.norm().item(), 1.0)
    assert float((H @ v - found.value * v).norm()) < 2e-6 * found.value
    again = sharpness(LOSS, params, batch, tolerance=1e-6, start=found.vector)
    assert again.products <= 3


@pytest.mark.parametrize("spectrum", [[1.0, 2.0, 2.0], [-5.0, -3.0, -1.0], [0.0, 0.0, 0.0], [7.0]])
def test_top_eigenvalue_of_hard_spectra(spectrum):
    """Repeated, all negative, zero, a single one: exact after as many products as there are dims."""
    values = torch.tensor(spectrum, dtype=torch.float64)
    found = top_eigenvalue(lambda v: {"x": values * v["x"]}, {"x": torch.ones(len(values), dtype=torch.float64)}, 1e-12)
    assert_close(found.value, max(spectrum), rtol=1e-10, atol=1e-10)
    assert all(x.isfinite().all() for x in found.vector.values())


def test_the_residual_is_a_bound():
    values = torch.linspace(0, 1, 200, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    start = {"x": torch.randn(200, generator=generator, dtype=torch.float64)}
    for most in (2, 5, 10, 20):
        found = top_eigenvalue(lambda v: {"x": values * v["x"]}, start, 0.0, most)
        assert found.products == most
        assert (values - found.value).abs().min() <= found.residual


# --- gradient checks --------------------------------------------------------------------------------------------------


def test_right_gradients_pass():
    found = check_gradients(LOSS, params_of(dtype=torch.float32), batch_of(), directions=1)
    paths = tree.flatten(transformer.specs(MODEL))
    assert {(c.engine, c.path) for c in found} == {(e, p) for e in ("func", "tape") for p in paths}
    assert max(c.error for c in found) < 1e-8


class Shifted(torch.autograd.Function):
    """The identity with a backward that is one percent off."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 1.01 * g


def wrong_for_both(chain):
    """The feed-forward stage sees one of its weights through a Function with a wrong backward."""

    def change(stage):
        def fn(p, x, ctx):
            p = {**p, "feed_forward": {**p["feed_forward"], "w_down": Shifted.apply(p["feed_forward"]["w_down"])}}
            return stage.fn(p, x, ctx)

        return stage._replace(fn=fn) if stage.name == "feed_forward" else stage

    return chain.changed(change)


def wrong_for_the_tape(chain):
    """The head's matrix has a gradient that is one percent off on the fast path; the plain form is right."""

    def change(stage):
        def fn(p, x, ctx):
            take = ctx.backend.weight_grads
            if take is not None:
                wrong = replace(ctx.backend, weight_grads=lambda weight, g: take(weight, lambda: 1.01 * g()))
                ctx = replace(ctx, backend=wrong)
            return stage.fn(p, x, ctx)

        return stage._replace(fn=fn) if stage.name == "head" else stage

    return chain.changed(change)


@pytest.mark.parametrize(
    ("mutant", "named"),
    [
        (wrong_for_both, r"blocks\.0\.feed_forward\.w_down \(engines func, tape: "),
        (wrong_for_the_tape, r"head\.w_out \(engine tape: "),
    ],
)
def test_a_wrong_backward_is_named(mutant, named):
    with pytest.raises(ValueError, match=named) as error:
        check_gradients(mutant(LOSS), params_of(), batch_of(), directions=1)
    assert str(error.value).count("differences") == 1  # that parameter and no other


# --- a transform of one's own -----------------------------------------------------------------------------------------


def test_centralize_keeps_the_laws():
    params, batch = params_of(), batch_of()
    grads = pipe(LOSS, grad("func", dtype=torch.float64))
    check_form(centralize(), grads, params, batch)
    check_idempotent(centralize(), grads, params, batch)
    check_commutes(centralize(), accumulate(2), grads, params, batch)
    got, plain = centralize()(grads)(params, batch)[0], grads(params, batch)[0]
    assert_close(got["blocks"]["0"]["attention"]["w_q"].sum(0), torch.zeros(8, dtype=torch.float64), rtol=0.0, atol=1e-14)
    assert torch.equal(got["embed"], plain["embed"])
    step = pipe(LOSS, grad("func", dtype=torch.float64), centralize(), clip(1.0), adamw(1e-2))
    before = step.init(params)
    after, _ = step(before, batch)
    assert after.step == 1


def test_the_laws_bite():
    params, batch = params_of(), batch_of()
    grads = pipe(LOSS, grad("func", dtype=torch.float64))

    def transform(name, change):
        def apply(inner):
            def gradients(params, batch, execution):
                g, metrics = inner(params, batch, execution)
                return Gradients(change(g, params), metrics)

            return Grads(gradients)

        return Transform(name, Grads, Grads, apply)

    halve = transform("halve()", lambda g, p: tree.map(lambda x: x / 2, g))
    with pytest.raises(AssertionError, match=r"halve\(\) twice is not halve\(\) once for embed"):
        check_idempotent(halve, grads, params, batch)
    check_commutes(halve, accumulate(2), grads, params, batch)
    with pytest.raises(AssertionError, match=r"sign\(\) and accumulate\(2\) do not commute"):
        check_commutes(transform("sign()", lambda g, p: tree.map(torch.sign, g)), accumulate(2), grads, params, batch)
    with pytest.raises(AssertionError, match=r"half\(\) makes embed .*float32.* out of .*float64"):
        check_form(transform("half()", lambda g, p: tree.map(torch.Tensor.float, g)), grads, params, batch)
    with pytest.raises(AssertionError, match=r"noise\(\) gives other numbers the second time for embed"):
        check_form(transform("noise()", lambda g, p: tree.map(torch.rand_like, g)), grads, params, batch)
    with pytest.raises(AssertionError, match=r"write\(\) overwrites params\.embed"):
        check_form(transform("write()", lambda g, p: tree.map(lambda x, q: (q.add_(1), x)[1], g, p)), grads, params_of(), batch)


# --- through the step -------------------------------------------------------------------------------------------------

OPTIMIZERS = {"sgd": lambda: sgd(warmup_cosine(1.0, 2, 9)), "adamw": lambda: adamw(warmup_cosine(1.0, 2, 9))}
FIRST_SCALE = {"sgd": 0.3, "adamw": 0.02}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_hypergradient_is_the_difference(name):
    """Through three whole steps with clipping, accumulation, skipping and an average of the weights."""
    step = pipe(
        LOSS,
        grad("func", dtype=torch.float64),
        accumulate(2),
        clip(0.7),
        OPTIMIZERS[name](),
        lr_scale(),
        skip_spikes(),
        ema(0.9),
        differentiable(),
    )
    batches = [batch_of(8, 12, seed, masked=0.0) for seed in range(3)]
    objective = mean_loss(LOSS, batch_of(seed=9))
    scale = FIRST_SCALE[name]
    start = with_lr_scale(step.init(params_of()), scale)
    value, found = hypergradient(step, start, batches, objective)
    f = lambda s: objective(unroll(step, with_lr_scale(start, s), batches).params)  # noqa: E731
    assert_close(value, f(scale))
    assert_close(float(found), slope(lambda t: float(f(scale + t)), 1e-4 * scale), rtol=1e-6, atol=0.0)
    assert found.abs() > 1e-3
    metrics = step(start, batches[0])[1]
    assert metrics["grad_norm"] > 0.7  # the clip is active, and differentiated too


def test_hypergradient_of_the_first_weights():
    step = pipe(LOSS, grad("func", dtype=torch.float64), sgd(0.2), differentiable())
    batches, objective, params = [batch_of(seed=seed) for seed in range(2)], mean_loss(LOSS, batch_of(seed=9)), params_of()
    _, found = hypergradient(step, step.init(params), batches, objective, wrt="params")
    v = spec.init(tree.map(lambda s: s._replace(init=spec.Init("normal", 1.0)), transformer.specs(MODEL)), 5, torch.float64)
    f = lambda t: objective(unroll(step, step.init(tree.map(lambda p, d: p + t * d, params, v)), batches).params)  # noqa: E731
    along = sum((g * tree.at(v, path)).sum() for path, g in tree.items(found))
    assert_close(float(along), slope(lambda t: float(f(t)), 1e-5), rtol=1e-6, atol=0.0)


def test_differentiable_is_invisible():
    parts = (LOSS, grad("func", dtype=torch.float64), accumulate(2), clip(0.5), adamw(1e-2), skip_spikes())
    plain, tracked = pipe(*parts), pipe(*parts, differentiable())
    a, b = (unroll(step, step.init(params_of()), [batch_of(seed=s) for s in range(3)]) for step in (plain, tracked))
    for path, p in tree.items(a.params):
        assert torch.equal(p, tree.at(b.params, path))


def test_what_has_no_derivative_is_said():
    objective = mean_loss(LOSS, batch_of())
    step = pipe(LOSS, grad("func"), sgd(0.1), lr_scale())
    with pytest.raises(ValueError, match=r"add differentiable\(\)"):
        hypergradient(step, step.init(params_of()), [batch_of()], objective)
    tape = pipe(LOSS, grad("tape", dtype=torch.float64), sgd(0.1), lr_scale(), differentiable())
    with pytest.raises(ValueError, match="engine tape cannot be inside"):
        hypergradient(tape, tape.init(params_of()), [batch_of()], objective)
    if has_compiler():
        fast = pipe(LOSS, grad("func"), sgd(0.1), lr_scale(), differentiable(), compile())
        with pytest.raises(ValueError, match=r"leave compile\(\) out of the pipe"):
            hypergradient(fast, fast.init(params_of()), [batch_of()], objective)
    for order in ((donate(), differentiable()), (differentiable(), donate())):
        with pytest.raises(ValueError, match=r"donate\(\) overwrites what differentiable\(\) must keep"):
            pipe(LOSS, grad("func"), sgd(0.1), *order)


def test_rows_that_no_batch_used_have_a_derivative():
    """Their second moment is 0, where the root has none; clipping would carry the NaN to all others."""
    step = pipe(LOSS, grad("func", dtype=torch.float64), clip(0.1), adamw(1.0), lr_scale(), differentiable())
    few = [{"input_ids": torch.tensor([[1, 2 + i]]), "labels": torch.tensor([[2, 3]])} for i in range(2)]
    start, objective = with_lr_scale(step.init(params_of()), 0.02), mean_loss(LOSS, batch_of())
    _, found = hypergradient(step, start, few, objective)
    expected = slope(lambda t: float(objective(unroll(step, with_lr_scale(start, 0.02 + t), few).params)), 1e-6)
    assert_close(float(found), expected, rtol=1e-6, atol=0.0)


def test_a_derivative_that_is_not_finite_is_an_error():
    step = pipe(LOSS, grad("func", dtype=torch.float64), sgd(1e300), lr_scale(), differentiable())
    with pytest.raises(ValueError, match=r"slots\.lr_scale\.scale is not finite; take fewer steps"):
        hypergradient(step, step.init(params_of()), [batch_of()] * 2, mean_loss(LOSS, batch_of()))
