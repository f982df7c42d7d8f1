"""Laws over every optimizer, each with a mutant that breaks it; those over every transform are in test_laws_transforms.py."""

from functools import partial

import pytest
import torch
from helpers import caught, late_copy, mean_of_means, same_bits, through_a_checkpoint
from optimizers import (
    MATRIX,
    NORMAL,
    OPTIMIZERS,
    SPECS,
    WHOLE,
    exact,
    flat_pairs,
    gradients,
    metrics,
    shapes,
    step_of,
    wrap_with,
)
from torch._dynamo.utils import counters

from olmo_fn import tree
from olmo_fn.core.compile import compile
from olmo_fn.core.gradients import Gradients
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes, with_execution
from olmo_fn.optim import adamw, sgd
from olmo_fn.optim.base import Rule, optimizer
from olmo_fn.optim.schedules import warmup_linear
from olmo_fn.spec import Init, Spec, abstract, init

torch.set_num_threads(1)

AROUND = {
    "plain": [],
    "all": [skip_spikes(sigma=6, window=8), ema(0.9), donate()],
}
every_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=list(OPTIMIZERS))
around = pytest.mark.parametrize("more", AROUND.values(), ids=list(AROUND))


def drive(step, steps=3, state=None, dtype=torch.float32):
    state = step.init(init(SPECS, 0, dtype)) if state is None else state
    for i in range(int(state.step), steps):
        state, report = step.update(state, Gradients(gradients(i, dtype), metrics(1.0 + 0.01 * i)))
        assert not report["skipped"]
    return state


def mutant(update=None, start=None, scalars=lambda s: {}, **more):
    """SGD, but for what is given."""
    rule = Rule(
        start or (lambda path, p: {"slot": torch.zeros_like(p)}),
        update or (lambda p, g, slots, s: (s["lr"] * g, slots)),
        scalars,
        **more,
    )
    return optimizer("mutant", rule, 0.1)


# --- init works on shapes alone ---------------------------------------------------------------------------------------


def law_abstract(step):
    """The state of meta tensors has names, shapes and dtypes of the real one, and no memory."""
    real, shape = step.init(init(SPECS, 0)), step.init(abstract(SPECS))
    assert shapes(real) == shapes(shape)
    assert all(x.is_meta for _, x in tree.items(shape._asdict()))


@every_optimizer
@around
def test_init_on_abstract_shapes(make, more):
    law_abstract(step_of(make(0.01), *more))


def test_init_on_abstract_shapes_catches():
    caught(law_abstract, step_of(mutant(start=lambda path, p: {"slot": torch.zeros(p.shape)})))


# --- the state keeps names, shapes and dtypes -------------------------------------------------------------------------


def law_keeps(step, dtype=torch.float32):
    state = step.init(init(SPECS, 0, dtype))
    before = shapes(state)
    assert shapes(drive(step, 2, state, dtype)) == before


@every_optimizer
@around
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_shapes_and_dtypes(make, more, dtype):
    law_keeps(step_of(make(0.01), *more), dtype)


def test_keeps_shapes_catches():
    start = lambda path, p: {"slot": p.new_zeros(())}  # noqa: E731
    caught(law_keeps, step_of(mutant(lambda p, g, slots, s: (s["lr"] * g, {"slot": g}), start, elementwise=False)))


# --- nothing is compiled again after the first step -------------------------------------------------------------------


def law_compiles_once(transform, *more):
    """Dynamo alone: the guards are what makes it compile again, and Inductor takes long."""
    step = step_of(transform, *more)
    step = with_execution(step, kernel=wrap_with("eager"))
    torch._dynamo.reset()
    state = drive(step, 1)
    first = counters["stats"]["unique_graphs"]
    assert first > 0
    after = drive(step, 4, state)
    assert counters["stats"]["unique_graphs"] == first
    assert max(float((x - y).abs().max()) for x, y in flat_pairs(after, drive(step_of(transform, *more), 4))) < 1e-5


@every_optimizer
def test_compiles_once(make):
    law_compiles_once(make(0.01), *AROUND["all"])


def test_compiles_once_catches():
    """A mutant with a number that is Python's and changes from step to step."""

    class Count:
        t = 0

    def scalars(s):
        Count.t += 1
        return {}

    caught(law_compiles_once, mutant(lambda p, g, slots, s: (s["lr"] * g / Count.t, slots), scalars=scalars))


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_inductor(name):
    """Compiled for real, the steps are those of the eager function."""
    eager, compiled = (drive(step_of(OPTIMIZERS[name](0.01), *AROUND["all"], *c), 5) for c in ([], [compile()]))
    for x, y in flat_pairs(eager, compiled):
        assert (x - y).abs().max() < (2e-4 if exact(name) else 5e-3)


# --- accumulation -----------------------------------------------------------------------------------------------------


REGRESSION = {"w": Spec((4, 4), ("embed", "mlp"), Init("zeros")), "b": Spec((4,), ("mlp",), Init("zeros"))}


def regression(params, batch):
    """Sum of squares over the rows that count."""
    out = batch["x"] @ params["w"].to(batch["x"]) + params["b"].to(batch["x"])
    error = (out - batch["y"]).square().sum(-1) * (batch["labels"][:, 0] >= 0)
    return error.sum(), {}


def rows(n=8, masked=3):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator, dtype=torch.float64)
    y = x @ torch.randn(4, 4, generator=generator, dtype=torch.float64) + 1
    labels = torch.zeros(n, 1, dtype=torch.int64)
    labels[:masked] = -100
    return {"x": x, "y": y, "labels": labels}


def law_accumulates(make, split):
    found = []
    for parts in ([], [split]):
        step = pipe(regression, grad("func", dtype=torch.float64), *parts, make(0.01, REGRESSION))
        state = step.init(init(REGRESSION, 0, torch.float64))
        for _ in range(3):
            state, _ = step(state, rows())
        found.append(state)
    assert max(float((x - y).abs().max()) for x, y in flat_pairs(*found)) < 1e-9


@pytest.mark.parametrize("name", filter(exact, OPTIMIZERS))
def test_survives_accumulation(name):
    law_accumulates(OPTIMIZERS[name], accumulate(2))


def test_accumulation_catches():
    caught(law_accumulates, OPTIMIZERS["adamw"], mean_of_means(2))


# --- a skipped step is inert, bit for bit; donation is invisible ------------------------------------------------------


def law_skip_is_inert(step):
    state = drive(step)
    kept = tree.map(torch.clone, state._asdict())
    for bad in ({"loss": float("nan")}, {"norm": float("inf")}, {"loss": 1e9}):
        grads = tree.map(lambda g: g * float("nan"), gradients(9))
        state, report = step.update(state, Gradients(grads, metrics(**bad)))
        assert report["skipped"]
        kept["slots"]["skip_spikes"] = state.slots["skip_spikes"]  # its business
        assert same_bits(state.params, kept["params"])
        assert same_bits(state.slots, kept["slots"])


@every_optimizer
@pytest.mark.parametrize("more", [[], [donate()]], ids=["plain", "donate"])
def test_a_skipped_step_is_inert(make, more):
    law_skip_is_inert(step_of(make(0.01), skip_spikes(sigma=6, window=4), ema(0.9), *more))


def test_a_skipped_step_catches():
    """A mutant that writes into the parameter itself."""
    writes = mutant(lambda p, g, slots, s: (0 * p, {"slot": slots["slot"].add_(1)}))
    caught(law_skip_is_inert, step_of(writes, skip_spikes(sigma=6, window=4)))


def law_donate(transform, given):
    kept, donated = (drive(step_of(transform, ema(0.9), *more), 4) for more in ([], [given]))
    assert same_bits(kept._asdict(), donated._asdict())


@every_optimizer
def test_donate_is_invisible(make):
    law_donate(make(0.01), donate())


def test_donate_catches():
    caught(law_donate, adamw(0.01), late_copy())


# --- what a leaf says of itself ---------------------------------------------------------------------------------------


def law_elementwise(transform, matrix=(4, 3)):
    """``elementwise`` if and only if halves of a flattened parameter move as the whole does."""
    specs = {"w": Spec(matrix, ("embed", "mlp"), NORMAL)}
    params, grads = init(specs, 0), [init(specs, i + 1) for i in range(2)]

    def run(cut):
        step = step_of(transform)
        leaf = step.leaf("w")
        state = step.init({"w": cut(params["w"])})
        for g in grads:
            state, _ = step.update(state, Gradients({"w": cut(g["w"])}, metrics()))
        return leaf, state.params["w"].reshape(-1)

    halves = [run(lambda x, i=i: x.reshape(2, -1, matrix[1])[i].contiguous())[1] for i in range(2)]
    leaf, whole = run(lambda x: x.clone())
    assert leaf.elementwise == torch.allclose(torch.cat(halves), whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [*WHOLE.values(), *MATRIX.values()], ids=[*WHOLE, *MATRIX])
def test_elementwise_is_true(make):
    law_elementwise(make(0.01))


def test_elementwise_catches():
    caught(law_elementwise, mutant(lambda p, g, slots, s: (s["lr"] * g / g.norm(), slots)))


def law_batch(transform):
    """A stack of matrices moves as each of them would alone."""
    stacked = init({"w": Spec((3, 5, 4), ("experts", "embed", "mlp"), NORMAL)}, 0, torch.float64)["w"]
    grads = [init({"w": Spec((3, 5, 4), (), NORMAL)}, i + 1, torch.float64)["w"] for i in range(3)]

    def run(p, of):
        step = step_of(transform)
        state = step.init({"w": p})
        if "dion_q" in state.slots:  # which starts at random: the same for both
            state.slots["dion_q"]["w"].copy_(torch.ones_like(state.slots["dion_q"]["w"]).tril())
        for g in grads:
            state, _ = step.update(state, Gradients({"w": of(g)}, metrics()))
        return state.params["w"]

    whole = run(stacked, lambda g: g)
    alone = [run(stacked[i].contiguous(), lambda g, i=i: g[i].contiguous()) for i in range(3)]
    assert torch.allclose(whole, torch.stack(alone), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", [*filter(exact, MATRIX), "adafactor"])
def test_a_stack_is_a_batch_of_matrices(name):
    law_batch({**MATRIX, **WHOLE}[name](0.01))


def test_a_stack_catches():
    caught(law_batch, mutant(lambda p, g, slots, s: (s["lr"] * g / g.norm(), slots), elementwise=False))


# --- a transform added later ------------------------------------------------------------------------------------------


def law_added_later(make, restore):
    """It begins its own slots, from the parameters of that step, and all others are as they were."""
    old, new = step_of(make(0.01)), step_of(make(0.01), skip_spikes(window=4), ema(0.9))
    state = drive(old, 2)
    found, names = restore(new, state)
    assert sorted(names) == ["ema", "skip_spikes"]
    assert same_bits({k: v for k, v in found.slots.items() if k not in names}, state.slots)
    assert same_bits(found.params, state.params)
    assert same_bits(found.slots["ema"], state.params)
    assert same_bits(drive(new, 4, found).params, drive(old, 4, state).params)
    assert restore(new, found)[1] == ()


@every_optimizer
def test_a_transform_added_later(make):
    law_added_later(make, partial(through_a_checkpoint, specs=SPECS))


def test_a_transform_added_later_catches():
    def all_anew(step, state):
        return step.init(state.params)._replace(step=state.step), ["ema", "skip_spikes"]

    caught(law_added_later, OPTIMIZERS["adamw"], all_anew)


# --- convergence ------------------------------------------------------------------------------------------------------


def quadratic(params, batch):
    target = torch.arange(12.0).reshape(4, 3) / 4
    return ((params["w"] - target).square() * torch.tensor([1.0, 2.0, 4.0])).sum(), {}


def factorisation(params, batch):
    target = torch.outer(torch.tensor([1.0, -1.0, 2.0, 0.5]), torch.tensor([1.0, 0.5, -1.0]))
    return (params["a"] @ params["b"] - target).square().sum(), {}


SMALL = Init("normal", 0.3)
PROBLEMS = {
    "quadratic": (quadratic, {"w": Spec((4, 3), ("embed", "mlp"), SMALL)}, {"labels": torch.zeros(1, 1, dtype=torch.int64)}),
    "regression": (regression, REGRESSION, tree.map(lambda x: x.float() if x.is_floating_point() else x, rows(16, 0))),
    "factorisation": (
        factorisation,
        {"a": Spec((4, 2), ("embed", "mlp"), SMALL), "b": Spec((2, 3), ("mlp", "embed"), SMALL)},
        {"labels": torch.zeros(1, 1, dtype=torch.int64)},
    ),
}
RATES = {
    **{"sgd": 0.05, "momentum": 0.02, "nesterov": 0.02, "adafactor": 0.3},
    **{"muon": 0.3, "normuon": 0.3},
}


def law_converges(make, lr, problem):
    loss, specs, batch = PROBLEMS[problem]
    step = pipe(loss, grad(engine="func"), clip(10.0), make(warmup_linear(lr, 5, 250, 0.0), specs, weight_decay=0.0))
    state = step.init(init(specs, 1))
    state, first = step(state, batch)
    for _ in range(249):
        state, last = step(state, batch)
    assert last["loss"] < 1e-2 * first["loss"]


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_converges(name, problem):
    law_converges(OPTIMIZERS[name], RATES.get(name, 0.1), problem)


def test_converges_catches():
    """A mutant that climbs."""
    caught(law_converges, lambda lr, specs, **o: sgd(lambda step: -lr(step)), 0.01, "quadratic")
