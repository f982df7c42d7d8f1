"""One table of laws over every transform, each with a mutant that breaks it; sharding and order hold for optimizers, too."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import caught, same_bits, through_a_checkpoint
from optimizers import NORMAL, OPTIMIZERS, exact, flat_pairs, shapes, wrap_with
from torch._dynamo.utils import counters
from torch.distributed.tensor import DTensor

from olmo_fn import tree
from olmo_fn.core.gradients import Gradients, Grads
from olmo_fn.core.pipe import Transform, accumulate, clip, differentiable, donate, ema, grad, pipe, skip_spikes, with_execution
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.optim import adamw, muon, partition
from olmo_fn.optim.base import Rule, optimizer
from olmo_fn.parallel.shard import shard
from olmo_fn.research import centralize, lr_scale
from olmo_fn.spec import Init, Spec, abstract, count, init
from olmo_fn.transforms import (
    accumulate_measured,
    clip_groups,
    clip_value,
    dims_of,
    first_step_bias,
    freeze,
    gradient_noise,
    merge,
    noise_scale,
    normalize,
    skip_steps,
    train_only,
)
from olmo_fn.transforms.lora import lora, lora_specs

DOUBLE = torch.float64
SPECS = {
    "embed": Spec((6, 4), ("vocab", "embed"), NORMAL),
    "blocks": {
        "square": Spec((4, 4), ("embed", "mlp"), NORMAL),
        "thin": Spec((2, 1), ("embed", "mlp"), NORMAL),  # of which half has the shape of soap's smaller square
        "short": Spec((2, 3), ("embed", "mlp"), NORMAL),  # of which half has the shape of a mean over rows
        "experts": Spec((2, 3, 4), ("experts", "mlp", "embed"), NORMAL),
        "norm": Spec((4,), ("embed",), Init("ones")),
        "bias": Spec((3,), ("mlp",), Init("zeros")),
    },
}
ADAPTERS = lora_specs(SPECS, 1, ["blocks.square"])
BOTH = {**SPECS, **ADAPTERS}


def loss(params, batch):
    """Squares of random projections of all parameters, summed over the rows that count."""
    flat = [p.reshape(-1) for _, p in tree.items(params)]
    parts = batch["x"].split([p.numel() for p in flat], dim=1)
    error = sum(x.to(p) @ p for x, p in zip(parts, flat, strict=True)) - 1
    return (error.square() * (batch["labels"][:, 0] >= 0)).sum(), {}


def batch(seed, bad=False):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, count(SPECS), generator=g, dtype=DOUBLE) / 10
    labels = torch.zeros(8, 1, dtype=torch.int64)
    labels[:3] = -100  # uneven parts
    return {"x": x * float("inf") if bad else x, "labels": labels}


def chain(*, first=(), parts=(), grads=(), optim=None, after=(), dtype=DOUBLE):
    return [*first, grad("func", dtype=dtype), *parts, *grads, optim or adamw(0.01), *after]


GRADS = {
    "clip": clip(0.1),
    "clip_value": clip_value(0.01),
    "clip_groups": clip_groups({"embed": 0.01, "default": 0.1}, SPECS),
    "centralize": centralize(),
    "gradient_noise": gradient_noise(0.01),
}
OPTIMS = {
    "first_step_bias": first_step_bias(adamw(0.01)),
    "partition": partition({"matrix": muon(0.01, dtype=torch.float32), "default": adamw(0.01)}, SPECS),
}
STEPS = {
    "skip_spikes": [skip_spikes(sigma=6, window=8)],
    "skip_steps": [skip_steps([(2, 2)])],
    "ema": [ema(0.9)],
    "merge": [merge(2, [3, 5])],
    "normalize": [normalize(dims_of(SPECS))],
    "freeze": [freeze("embed", "*.bias", parameters=SPECS)],
    "train_only": [train_only("blocks.*", parameters=SPECS)],
    "lr_scale": [lr_scale()],
    "noise_scale": [noise_scale(0.9)],
    "donate": [donate()],
    "differentiable": [differentiable()],
}
TOGETHER = ("normalize", "skip_spikes", "skip_steps", "noise_scale", "lr_scale", "ema", "merge", "freeze", "donate")
TABLE = {
    **{name: {"grads": [transform]} for name, transform in GRADS.items()},
    **{name: {"optim": transform} for name, transform in OPTIMS.items()},
    **{name: {"after": transforms} for name, transforms in STEPS.items()},
    "lora": {"first": [lora(ADAPTERS)], "after": [train_only("lora.*", parameters=BOTH)]},
    "all": {"grads": [GRADS["clip_value"], GRADS["clip"]], "after": [STEPS[name][0] for name in TOGETHER]},
}
every_transform = pytest.mark.parametrize("name", TABLE)


def specs_of(name):
    return BOTH if name == "lora" else SPECS


def measured(name, n):
    """What splits the batch in ``n`` parts; the noise scale needs at least two."""
    return [accumulate_measured(2 * n)] if name in ("noise_scale", "all") else [accumulate(n)] if n > 1 else []


def step_of(name, *more, n=1, **options):
    return pipe(loss, *chain(**TABLE[name], parts=measured(name, n), **options), *more)


def run(step, steps=3, state=None, specs=SPECS, dtype=DOUBLE):
    state = step.init(init(specs, 0, dtype)) if state is None else state
    for i in range(int(state.step), steps):
        state, _ = step(state, batch(i))
    return state


def mutant(control=lambda slot: slot, update=lambda p, g, slots, s: (s["lr"] * g, slots), start=None, parts=()):
    """SGD with a number of its own, but for what is given."""
    rule = Rule(start or (lambda path, p: {"slot": torch.zeros_like(p)}), update)
    inner = pipe(loss, *chain(parts=parts, optim=optimizer("mutant", rule, 0.1)))

    def wrong(state, signals, metrics):
        own, scalars, metrics = inner.control(state, signals, metrics)
        return {**own, "own": {"x": control(state.slots["own"]["x"])}}, scalars, metrics

    return replace(inner, init_control=lambda: {**inner.init_control(), "own": {"x": torch.zeros(())}}, control=wrong)


# --- init on abstract shapes; shapes and dtypes stay ------------------------------------------------------------------


def law_form(step, specs=SPECS, dtype=DOUBLE):
    """The state of meta tensors has names, shapes and dtypes of the real one; two steps later they are the same."""
    real, shape = step.init(init(specs, 0, dtype)), step.init(abstract(specs, dtype))
    assert all(x.is_meta for _, x in tree.items(shape._asdict()))
    assert shapes(real) == shapes(shape)
    assert shapes(run(step, 2, real)) == shapes(shape)


@every_transform
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_form(name, dtype):
    law_form(step_of(name, dtype=torch.float32), specs_of(name), dtype)


def test_form_catches():
    law_form(mutant())
    caught(law_form, mutant(lambda x: x.double()))
    caught(law_form, mutant(start=lambda path, p: {"slot": torch.zeros(p.shape, dtype=p.dtype)}))


# --- nothing is compiled again after the first step -------------------------------------------------------------------


def law_compiles_once(step, specs=SPECS):
    """Dynamo alone, since its guards are what makes it compile again."""
    torch._dynamo.reset()
    compiled = with_execution(step, kernel=wrap_with("eager"))
    state = run(compiled, 1, specs=specs)
    first = counters["stats"]["unique_graphs"]
    assert first > 0
    run(compiled, 3, state)
    assert counters["stats"]["unique_graphs"] == first


@pytest.mark.parametrize("name", [name for name in TABLE if name != "differentiable"])  # which is not for compiled updates
def test_compiles_once(name):
    law_compiles_once(step_of(name), specs_of(name))


def test_compiles_once_catches():
    """A mutant with something of Python's that changes from step to step."""
    names = []

    def control(x):
        names.append("x")
        return x

    caught(law_compiles_once, mutant(control, lambda p, g, slots, s: (sum(s["lr"] * g for _ in names), slots)))


# --- accumulation; donation -------------------------------------------------------------------------------------------


def law_same_parameters(a, b, specs=SPECS):
    assert max(float((x - y).abs().max()) for x, y in flat_pairs(run(a, specs=specs), run(b, specs=specs))) < 1e-9


@every_transform
def test_survives_accumulation(name):
    law_same_parameters(step_of(name), step_of(name, n=2), specs_of(name))


def sum_of_means():
    """A mutant: both parts of the batch divide by their own tokens."""

    def apply(inner):
        def of(params, batch, execution):
            rows = {k: v for k, v in batch.items() if k != "loss_tokens"}
            parts = [{k: v.chunk(2)[i] for k, v in rows.items()} for i in range(2)]
            grads, reports = zip(*(inner(params, part, execution) for part in parts), strict=True)
            return Gradients(tree.map(torch.add, *grads), reports[0])

        return Grads(of)

    return Transform("sum_of_means", Grads, Grads, apply)


def test_accumulation_catches():
    caught(law_same_parameters, mutant(), mutant(parts=[sum_of_means()]))


@pytest.mark.parametrize("name", [name for name in TABLE if name not in ("differentiable", "donate", "all")])
def test_donation_is_invisible(name):
    kept, donated = (run(step_of(name, *more), 4, specs=specs_of(name)) for more in ([], [donate()]))
    assert same_bits(kept._asdict(), donated._asdict())


# --- a step that is not finite --------------------------------------------------------------------------------------


def law_inert(step, specs=SPECS):
    state = run(step, 2, specs=specs)
    before = tree.map(torch.clone, state._asdict())
    state, report = step(state, batch(2, bad=True))
    assert report["skipped"]
    assert same_bits({**state._asdict(), "step": before["step"]}, before)


@every_transform
def test_a_step_that_is_not_finite_changes_nothing(name):
    law_inert(step_of(name), specs_of(name))


def test_a_step_that_is_not_finite_catches():
    law_inert(mutant())
    caught(law_inert, mutant(lambda x: x + 1))


# --- a transform added later ------------------------------------------------------------------------------------------

ADDS = {"skip_spikes": ["skip_spikes"], "ema": ["ema"], "merge": ["merge", "merge_window"], "lr_scale": ["lr_scale"]}
ADDS |= {"noise_scale": ["noise_scale"]}
ADDS["all"] = sorted(name for names in ADDS.values() for name in names)
LATER = [name for name in TABLE if name not in ("lora", "partition")]  # another model, another optimizer


def law_added_later(new, adds, restore):
    """It begins its own slots, from the parameters of that step; all others that it has are as they were."""
    state = run(pipe(loss, *chain()), 2)
    found, names = restore(new, state)
    assert sorted(names) == adds
    old = tree.flatten(state.slots)
    kept = tree.flatten({k: v for k, v in found.slots.items() if k not in names})
    assert same_bits(kept, {path: old[path] for path in kept})
    assert same_bits(found.params, state.params)
    for slot in {"ema", "merge"} & set(names):
        begun = tree.flatten(found.slots[slot])
        assert same_bits(begun, {path: p for path, p in tree.items(state.params) if path in begun})
    assert restore(new, found)[1] == ()


@pytest.mark.parametrize("name", LATER)
def test_added_later(name):
    law_added_later(step_of(name), ADDS.get(name, []), partial(through_a_checkpoint, specs=SPECS, dtype=DOUBLE))


def test_added_later_catches():
    def all_anew(step, state):
        return step.init(state.params)._replace(step=state.step), ["ema"]

    caught(law_added_later, step_of("ema"), ["ema"], all_anew)


# --- sharding ---------------------------------------------------------------------------------------------------------


def sharded_steps(connection, made):
    """Two steps on this rank; its state whole, and what of it is no DTensor placed like its parameter, or has moved."""
    step, specs = build(made, lambda specs: [shard(connection, specs)])
    state = step.init(init(specs, 0, DOUBLE))
    before = placements(state)
    wrong = [path for path, where in before.items() if not placed_like_its_parameter(step, state, path, where)]
    state = run(step, 2, state)
    assert placements(state) == before
    whole = tree.map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, state._asdict())
    return tree.flatten(whole), wrong


def placements(state):
    return {path: (x.placements if isinstance(x, DTensor) else None) for path, x in tree.items(state._asdict())}


def placed_like_its_parameter(step, state, path, where):
    """A slot lies as its parameter does, unless the optimizer says that it is unlike it: that, and all else, is whole
    on every rank.
    """
    kind, _, rest = path.partition(".")
    slot, _, of = ("", "", rest) if kind == "params" else rest.partition(".")
    own = tree.flatten(state.params).get(of)
    return where == (None if own is None or slot in step.leaf(of).unlike else own.placements)


def build(made, more):
    kind, name = made
    if kind == "mutant":
        return pipe(loss, *chain(grads=[local_mean()]), *more(SPECS)), SPECS
    if kind == "optimizer":
        return pipe(loss, *chain(optim=OPTIMIZERS[name](0.01, SPECS)), skip_spikes(), ema(0.9), *more(SPECS)), SPECS
    return step_of(name, *more(specs_of(name))), specs_of(name)


def all_sharded(connection, everything):
    return [sharded_steps(connection, made) for made in everything]


def law_sharded(pool, everything):
    for rank in pool.run(all_sharded, everything, mesh=Mesh(dp_shard=2)):
        for made, (found, wrong) in zip(everything, rank, strict=True):
            assert not wrong, made
            step, specs = build(made, lambda specs: [])
            alone = tree.flatten(run(step, 2, specs=specs)._asdict())
            assert found.keys() == alone.keys()
            near = {"rtol": 1e-7, "atol": 1e-7} if exact(made[1]) else {"rtol": 2e-2, "atol": 2e-2}
            for path, x in found.items():
                torch.testing.assert_close(x, alone[path], **near, msg=lambda m, at=(*made, path): f"{at}: {m}")


def test_sharded_is_alone(pool):
    """Every optimizer and transform on two ranks, in fp64 but for the iterations of Muon and what is kept in bf16."""
    law_sharded(pool, [*(("optimizer", name) for name in OPTIMIZERS), *(("transform", name) for name in TABLE)])


def local_mean():
    """A mutant: it subtracts the mean of the part that is here."""

    def apply(inner):
        def of(params, batch, execution):
            grads, report = inner(params, batch, execution)
            return Gradients(tree.map(lambda g: g - g.mean(), grads), report)

        return replace(inner, fn=of)

    return Transform("local_mean()", Grads, Grads, apply)


def test_sharded_catches(pool):
    caught(law_sharded, pool, [("mutant", "")])


# --- the order --------------------------------------------------------------------------------------------------------

FIRST = [grad("func"), adamw(1e-3)]
WRONG = {
    "lora after grad": ([grad("func"), lora(ADAPTERS)], "put it before grad('func') (the order is"),
    "clip before grad": ([clip(1.0)], "put grad() before it (the order is"),
    "clip after the optimizer": ([*FIRST, clip(1.0)], "put it before adamw(...) (the order is"),
    "clip after more": ([*FIRST, ema(0.9), clip_value(1.0)], "follows ema(0.9), which is a Step; put it before adamw(...)"),
    "accumulate after the optimizer": ([*FIRST, accumulate(2)], "put it before adamw(...)"),
    "two optimizers": ([*FIRST, muon(1e-3)], "leave out one of the two, or join them with partition"),
    "two gradients": ([grad("func"), grad()], "leave out one of the two (the order is"),
    "no optimizer": ([grad("func"), ema(0.9)], "put an optimizer such as adamw(1e-3) before it"),
    "nothing": ([donate()], "put grad() and an optimizer such as adamw(1e-3) before it"),
    "accumulate after clip": (
        [grad("func"), clip(1.0), accumulate(2)],
        "accumulate(2) after clip(1.0) would clip every part of the batch by itself; put accumulate(2) before clip(1.0)",
    ),
    "ema after freeze": ([*FIRST, STEPS["freeze"][0], ema(0.9)], "put ema(0.9) before freeze(embed, *.bias)"),
    "merge after train_only": ([*FIRST, STEPS["train_only"][0], merge(2, [3])], "put merge(2, 1 times) before train_only"),
    "normalize after ema": ([*FIRST, ema(0.9), STEPS["normalize"][0]], "put normalize(5 parameters) before ema(0.9)"),
    "two averages": ([*FIRST, ema(0.9), ema(0.99)], "ema(0.99) after ema(0.9) would share its slot; leave out one of them"),
    "noise_scale alone": ([*FIRST, noise_scale()], "noise_scale(0.99) needs accumulate_measured, which is nowhere before it"),
    "measured after clip": ([grad("func"), clip(1.0), accumulate_measured(2)], "put accumulate_measured(2) before clip(1.0)"),
    "donate and differentiable": ([*FIRST, donate(), differentiable()], "leave one of them out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_order_is_refused(name):
    transforms, message = WRONG[name]
    with pytest.raises(ValueError) as error:  # noqa: PT011
        pipe(loss, *transforms)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
