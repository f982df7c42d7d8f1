"""The laws of the design, each with a mutant that breaks it: a law that catches nothing is no law.

3 init, 4 accumulation, 5 invisible transforms, 6 resuming, 8 data order, 9 engines, 10 pipe.
"""

import itertools
import tempfile
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from helpers import examples, late_copy, mean_of_means, params_of, same_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, boxes, models, part_of

from olmo_fn import tree
from olmo_fn.checkpoint import load, save
from olmo_fn.core.chain import NOTHING, Aux, Backend, Chain, Stage
from olmo_fn.core.compile import compile
from olmo_fn.core.gradients import Gradients, Grads, Signals
from olmo_fn.core.pipe import Transform, accumulate, clip, donate, ema, grad, pipe, skip_spikes, with_execution
from olmo_fn.core.step import State
from olmo_fn.data.instances.fixed import Windows
from olmo_fn.data.loader import Loader
from olmo_fn.data.prefetch import prefetch
from olmo_fn.data.shuffle import permutation, shuffled
from olmo_fn.data.sizes import Phase, Sizes, constant_sizes
from olmo_fn.data.tokens import open_tokens
from olmo_fn.models import transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.optim import adamw, sgd
from olmo_fn.spec import Init, Spec, init, init_leaf

DOUBLE = torch.float64
SMALL = dense(8, 2, 2, 12, vocab_size=17, n_kv_heads=1, window_pattern=(3, -1), init_std=0.3)
ALIKE = modified(SMALL, window_pattern=())  # one kind of block: less to compile


def batch_of(cfg, rows=4, length=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(cfg.vocab_size, (rows, length + 1), generator=generator)
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def distance(a, b):
    """The largest difference of two trees over the largest entry of the first, leaf by leaf."""
    b = tree.flatten(b)
    return max(
        float((x.double() - b[path].double()).abs().max() / x.double().abs().max().clamp(min=1e-30))
        for path, x in tree.items(a)
        if x.numel()
    )


def as_tree(state):
    return {"step": state.step, "params": state.params, "slots": state.slots}


def train(step, params, steps, cfg=SMALL, state=None):
    state = step.init(params) if state is None else state
    for i in range(int(state.step), steps):
        state, _ = step(state, batch_of(cfg, seed=i))
    return state


# --- 3: init depends on (seed, path) alone ----------------------------------------------------------------------------


def law_init(initialise):
    """The same leaf comes out of any order of the tree, of a part of it, and of its rows alone."""
    shapes = {"a": Spec((6, 5), ("x", "y"), Init("normal", 1.0)), "b": Spec((4,), ("x",), Init("trunc_normal", 2.0))}
    whole = initialise(shapes, 3)
    for part in ({"b": shapes["b"], "a": shapes["a"]}, {"b": shapes["b"]}):
        assert same_bits(initialise(part, 3), {name: whole[name] for name in part})
    assert not torch.equal(initialise(shapes, 4)["a"], whole["a"])


def one_generator(shapes, seed):
    """A mutant: leaves drawn one after the other from one generator, as frameworks do."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(spec.shape, generator=generator) for name, spec in shapes.items()}


def test_law_3_init():
    law_init(init)
    with pytest.raises(AssertionError):
        law_init(one_generator)


@examples(50)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=3), st.integers(0, 2**40), st.data())
def test_law_3_parts(shape, seed, data):
    """A rank makes its own part without the rest, bit for bit."""
    spec = Spec(tuple(shape), ("x",) * len(shape), Init("trunc_normal", 0.5))
    box = data.draw(boxes(shape))
    assert torch.equal(init_leaf(spec, seed, "w", box), part_of(init_leaf(spec, seed, "w"), box))


# --- 4: accumulation equals one big batch -----------------------------------------------------------------------------


def law_accumulate(split, cfg, batch):
    loss, params = transformer.loss(cfg, z_loss=1e-2), params_of(cfg)
    whole, metrics = pipe(loss, grad(dtype=DOUBLE))(params, batch)
    parts, more = pipe(loss, grad(dtype=DOUBLE), split)(params, batch)
    assert distance(whole, parts) < 1e-11
    assert distance(metrics, more) < 1e-11


@examples(15)
@given(st.data(), models(), st.sampled_from([2, 4]))
def test_law_4_accumulate(data, cfg, n):
    """With uneven loss masks, documents, tied weights."""
    law_accumulate(accumulate(n), cfg, data.draw(batches(cfg.vocab_size)))


def test_law_4_catches():
    batch = batch_of(SMALL)
    batch["labels"][0, 2:] = -100
    law_accumulate(accumulate(2), SMALL, batch)
    with pytest.raises(AssertionError):
        law_accumulate(mean_of_means(2), SMALL, batch)


# --- 5: compile, remat and donate are identities ----------------------------------------------------------------------


def law_invisible(loss, cfg, batch, **options):
    params = params_of(cfg)
    expected, metrics = pipe(loss, grad(dtype=DOUBLE))(params, batch)
    found, more = pipe(loss, grad(dtype=DOUBLE, **options))(params, batch)
    assert same_bits(expected, found)
    assert same_bits(metrics, more)


@examples(15)
@given(st.data(), models(), st.sampled_from(["full", "selective", "every-2"]))
def test_law_5_remat(data, cfg, remat):
    law_invisible(transformer.loss(cfg, z_loss=1e-2), cfg, data.draw(batches(cfg.vocab_size)), remat=remat)


@examples(15)
@given(st.data(), models())
def test_law_5_remat_of_halves(data, cfg):
    """Stages of another size add the residual's cotangents in another order: equal up to rounding."""
    loss, params = transformer.loss(cfg), params_of(cfg)
    batch = data.draw(batches(cfg.vocab_size))
    expected, _ = pipe(loss, grad(dtype=DOUBLE))(params, batch)
    found, _ = pipe(loss, grad(dtype=DOUBLE, remat="feed_forward"))(params, batch)
    assert distance(expected, found) < 1e-11


def test_law_5_remat_catches():
    """A mutant: a stage that draws from the global generator is not the same when it runs again."""
    torch.manual_seed(0)
    chain = transformer.loss(SMALL)

    def noisy(p, x, ctx):
        return x + 0.1 * torch.randn_like(x) + p["feed_forward_norm"].sum() * x, NOTHING

    stages = tuple(s._replace(fn=noisy) if s.name == "feed_forward" else s for s in chain.stages)
    with pytest.raises((AssertionError, RuntimeError)):
        law_invisible(replace(chain, stages=stages), SMALL, batch_of(SMALL), remat="full")


def law_donate(transform, optimizer):
    loss = transformer.loss(SMALL)
    parts = (grad(dtype=DOUBLE), clip(1.0), optimizer, skip_spikes(), ema(0.9))
    kept = train(pipe(loss, *parts), params_of(SMALL), 4)
    given_away = train(pipe(loss, *parts, transform), params_of(SMALL), 4)
    assert same_bits(as_tree(kept), as_tree(given_away))


def test_law_5_donate():
    law_donate(donate(), adamw(1e-2))


def test_law_5_donate_catches():
    with pytest.raises(AssertionError):
        law_donate(late_copy(), adamw(1e-2))


def law_compile(loss, execution, remat):
    """Compiled steps equal eager ones: fp64, 3 whole steps."""
    parts = (grad(dtype=DOUBLE, remat=remat), clip(1.0), adamw(1e-2), skip_spikes())
    expected = train(pipe(loss, *parts), params_of(ALIKE), 3, ALIKE)
    found = train(pipe(loss, *parts, donate(), execution), params_of(ALIKE), 3, ALIKE)
    assert distance(as_tree(expected), as_tree(found)) < 1e-10


@pytest.mark.parametrize("remat", ["none", pytest.param("full", marks=pytest.mark.slow)])
def test_law_5_compile(remat):
    law_compile(transformer.loss(ALIKE, z_loss=1e-2), compile(), remat)


def test_law_5_compile_catches():
    """A mutant: a wrapper that changes the numbers a little, such as by computing in less precision."""
    from olmo_fn.core.step import Step

    def lossy(fn, *constants):
        return lambda *args: fn(*constants, *args) * (1 + 1e-7) if fn.__name__ == "add_normed" else fn(*constants, *args)

    execution = Transform("lossy()", Step, Step, lambda step: with_execution(step, fuse=lossy))
    with pytest.raises(AssertionError):
        law_compile(transformer.loss(ALIKE), execution, "none")


# --- 6: run(a + b) equals run(a), save, load, run(b) ------------------------------------------------------------------


def law_resume(recipe, store):
    """Bitwise; the loaded half knows nothing of the first but what ``store`` gave back."""
    whole = train(recipe(), params_of(SMALL, dtype=torch.float32), 7)
    first = train(recipe(), params_of(SMALL, dtype=torch.float32), 3)
    second = train(recipe(), None, 7, state=store(first))
    assert same_bits(as_tree(whole), as_tree(second))


def recipe():
    loss = transformer.loss(SMALL, z_loss=1e-3)
    return pipe(loss, grad(), accumulate(2), clip(0.5), adamw(1e-2), skip_spikes(6.0, window=8), ema(0.9), donate())


def through_a_checkpoint(state):
    with tempfile.TemporaryDirectory() as folder:
        found, _ = load(save(as_tree(state), folder, step=int(state.step)))
    return State(found["step"], found["params"], found["slots"])


def forgetting(name):
    """A mutant: one slot starts anew, as the skip history does in OLMo-core."""

    def store(state):
        fresh = recipe().init(state.params)
        return State(state.step, state.params, {**state.slots, name: fresh.slots[name]})

    return store


def test_law_6_resume():
    law_resume(recipe, through_a_checkpoint)


@pytest.mark.parametrize("name", ["adamw", "adamw_m", "adamw_v", "ema", "skip_spikes"])
def test_law_6_catches(name):
    with pytest.raises(AssertionError):
        law_resume(recipe, forgetting(name))


# --- 9: the engines agree; custom backwards survive -------------------------------------------------------------------


@examples(15)
@given(st.data(), models())
def test_law_9_engines(data, cfg):
    """torch.func through the whole loss, and the sweep with the head's own pullback."""
    loss, params = transformer.loss(cfg, z_loss=1e-2), params_of(cfg)
    batch = data.draw(batches(cfg.vocab_size))
    expected, metrics = pipe(loss, grad("func", dtype=DOUBLE))(params, batch)
    found, more = pipe(loss, grad("tape", dtype=DOUBLE))(params, batch)
    assert distance(expected, found) < 1e-10
    assert distance(metrics, more) < 1e-12


class Liar(torch.autograd.Function):
    """Identity forward; the backward is seven times the right one, on purpose: who drops it gives itself away."""

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 7 * g


@dataclass(frozen=True)
class LiarsContext:
    backend: Backend


def lie(w, x=None):
    return Liar.apply(w if x is None else x * w).sin()


def lying_stage(p, x, ctx):
    return ctx.backend.fuse(lie)(p["w"], *([] if x is None else [x])), NOTHING


def last_stage(p, x, ctx):
    return None, Aux((x * p["w"]).sum())


LIARS = Chain(
    lambda batch, backend: LiarsContext(backend),
    (
        Stage("first", (("w", "a"),), lying_stage),
        Stage("attention", (("w", "b"),), lying_stage, block=0),
        Stage("head", (("w", "c"),), last_stage),
    ),
)


def law_custom_backward(gradients):
    """Two liars in a row: the gradient of the first parameter has both factors, that of the second one."""
    params = {name: torch.rand(3, generator=torch.Generator().manual_seed(i), dtype=DOUBLE) for i, name in enumerate("abc")}
    batch = {"labels": torch.tensor([1])}
    a, b, c = params.values()
    inner = a.sin()
    expected = {"a": 49 * c * (inner * b).cos() * b * a.cos(), "b": 7 * c * (inner * b).cos() * inner}
    found = gradients(params, batch)
    assert distance(expected, {name: found[name] for name in expected}) < 1e-12


@pytest.mark.parametrize("engine", ["tape", "func"])
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("compiled", [False, True])
def test_law_9_custom_backward(engine, remat, compiled):
    if engine == "func" and remat != "none":
        with pytest.raises(ValueError, match="engine tape for remat"):
            pipe(LIARS, grad(engine, remat))
        return
    step = pipe(LIARS, grad(engine, remat, DOUBLE), sgd(0.1), *([compile()] if compiled else []))
    law_custom_backward(lambda params, batch: step.grads(params, batch, step.execution)[0])


def test_law_9_catches():
    """A mutant that torch itself has: compiled torch.func.grad drops the backward of a Function applied to a leaf.

    Pytorch issue 193279. One applied to what another operation made keeps it, on torch 2.13.
    """
    torch._dynamo.reset()
    broken = torch.compile(torch.func.grad(lambda params, batch: LIARS(params, batch)[0]))
    with pytest.raises(AssertionError):
        law_custom_backward(broken)


# --- 10: the algebra of pipe ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transforms", "message"),
    [
        ((clip(1.0),), r"clip\(1.0\) takes a Grads, but it follows the loss, which is a Loss"),
        ((grad(), adamw(1e-3), accumulate(2)), r"accumulate\(2\) takes a Grads, but it follows adamw"),
        ((grad(), donate()), r"donate\(\) takes a Step, but it follows grad"),
        ((grad(), grad()), r"takes a Loss, but it follows grad"),
    ],
)
def test_law_10_order(transforms, message):
    with pytest.raises(ValueError, match=message):
        pipe(transformer.loss(SMALL), *transforms)


@examples(15)
@given(st.floats(1e-3, 10.0), st.integers(0, 100))
def test_law_10_clip_idempotent(max_norm, seed):
    loss, params, batch = transformer.loss(SMALL), params_of(SMALL), batch_of(SMALL, seed=seed)
    once, metrics = pipe(loss, grad(dtype=DOUBLE), clip(max_norm))(params, batch)
    twice, _ = pipe(loss, grad(dtype=DOUBLE), clip(max_norm), clip(max_norm))(params, batch)
    assert distance(once, twice) < 1e-5
    norm = sum(float(g.square().sum()) for _, g in tree.items(once)) ** 0.5
    assert norm <= max_norm * (1 + 1e-9)
    assert norm == pytest.approx(min(max_norm, float(metrics["grad_norm"])), rel=1e-5)


def law_on_the_way(change):
    """What a step's update does to gradients on its way is what a called Grads does: at least fp32, and the factor."""
    loss, params, batch = transformer.loss(SMALL), params_of(SMALL, dtype=torch.float32), batch_of(SMALL)
    step = pipe(loss, grad(dtype=torch.bfloat16), clip(0.1), sgd(lr=0.5))
    raw = step.grads.fn(params, batch, step.execution)
    assert any(g.dtype == torch.bfloat16 for _, g in tree.items(raw.tree))
    assert 0 < float(raw.signals.scale) < 1
    expected, _ = step.update(step.init(params), raw.finished())
    found, _ = replace(step, grads=Grads(change(step.grads.fn)))(step.init(params), batch)
    assert same_bits(as_tree(expected), as_tree(found))


def forgotten_factor(fn):
    """A mutant: the factor gets lost."""

    def gradients(*args):
        return fn(*args)._replace(signals=Signals())

    return gradients


def narrow_factor(fn):
    """A mutant: the factor is applied in the dtype of the computation."""

    def gradients(*args):
        grads, metrics, signals = fn(*args)
        return Gradients(tree.map(lambda g: g * signals.scale.to(g.dtype), grads), metrics)

    return gradients


def test_law_10_on_the_way():
    law_on_the_way(lambda fn: fn)


@pytest.mark.parametrize("mutant", [forgotten_factor, narrow_factor])
def test_law_10_on_the_way_catches(mutant):
    with pytest.raises(AssertionError):
        law_on_the_way(mutant)


def gradients_of(values):
    """A Grads stage that gives a fixed gradient, and as loss the next of ``values``."""
    values = iter(values)

    def gradients(params, batch, execution):
        loss = {"loss": torch.tensor(next(values), dtype=DOUBLE)}
        return Gradients(tree.map(torch.ones_like, params), loss)

    return Transform("gradients_of", Grads, Grads, lambda inner: Grads(gradients))


def law_skip(skip, losses):
    """Without a spike: the identity. With one: parameters and slots keep their bits, and the next step goes on."""

    def run(values, *transforms):
        step = pipe(transformer.loss(SMALL), grad(), gradients_of(values), adamw(1e-2), ema(0.9), *transforms)
        state = step.init(params_of(SMALL))
        for _ in values:
            before = state
            state, metrics = step(state, {})
        return before, state, metrics

    calm = run(losses)[1]
    watched = run(losses, skip)[1]
    watched.slots.pop("skip_spikes", None)
    assert same_bits(as_tree(calm), as_tree(watched))
    for spike in (1e3, float("nan"), float("inf")):
        before, after, metrics = run([*losses, spike], skip)
        assert float(metrics["skipped"]) == 1
        for part in (before, after):
            part.slots.pop("skip_spikes", None)
        assert same_bits({"p": before.params, "s": before.slots}, {"p": after.params, "s": after.slots})
        assert int(after.step) == int(before.step) + 1
        again = run([*losses, spike, losses[-1]], skip)[2]
        assert float(again["skipped"]) == 0


def zeroed_gradient():
    """A mutant: a spike's gradient is set to zero, so that decay and momentum move the parameters all the same."""
    from olmo_fn.core.step import Step

    def apply(step):
        def gradients(params, batch, execution):
            grads, metrics, signals = step.grads.fn(params, batch, execution)
            if metrics["loss"] < 100:
                return Gradients(grads, metrics, signals)
            return Gradients(tree.map(torch.zeros_like, grads), {**metrics, "loss": torch.tensor(1.0)}, signals)

        return replace(step, grads=Grads(gradients))

    return Transform("zeroed_gradient()", Step, Step, apply)


LOSSES = [3.0, 2.9, 2.95, 2.8, 2.85, 2.7]


def test_law_10_skip():
    law_skip(skip_spikes(6.0, window=8), LOSSES)
    with pytest.raises(AssertionError):
        law_skip(zeroed_gradient(), LOSSES)


# --- 8: data order ----------------------------------------------------------------------------------------------------

sizes = st.tuples(st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**40))


def indices(step, batch_size, num_instances, seed):
    """The instances of a step, in batches of a constant size."""
    return shuffled(step * batch_size, batch_size, num_instances, batch_size, seed)


def law_order(order, batch_size, num_instances, seed):
    """``order`` visits no instance twice in an epoch, leaves out less than a batch, differs between epochs,
    and depends on nothing but its arguments."""
    per_epoch = num_instances // batch_size
    steps = range(2 * per_epoch)
    forward = [order(step, batch_size, num_instances, seed).tolist() for step in steps]
    for epoch in range(2):
        seen = [i for row in forward[epoch * per_epoch : (epoch + 1) * per_epoch] for i in row]
        assert len(seen) == len(set(seen)) == per_epoch * batch_size > num_instances - batch_size
        assert all(0 <= i < num_instances for i in seen)
    if num_instances > 50 and batch_size < num_instances // 2:
        assert forward[:per_epoch] != forward[per_epoch:]
    resumed = {step: order(step, batch_size, num_instances, seed).tolist() for step in reversed(steps)}
    assert [resumed[step] for step in steps] == forward


@given(sizes)
def test_law_8_bijection_and_resume(case):
    batch_size, num_instances, seed = case
    law_order(indices, batch_size, num_instances + batch_size, seed)


@given(st.sampled_from([0, 19, 20, 39, 40, 60]), st.integers(1, 8))
def test_law_8_data_parallel(data, step, world):
    """The ranks of any world read together the same batch, each its own rows and no instance that it has no row of."""

    class Noted(Windows):
        def read(self, numbers):
            asked.append(numbers.tolist())
            return super().read(numbers)

    asked = []
    phases = (Phase(0, 8, 8), Phase(20, 6, 4), Phase(40, 5, 2, used=6))
    noted = Noted(data.instances.files, data.instances.sequence_length, data.instances.vocab_size)
    loader = replace(data, instances=noted, sizes=Sizes(8, phases))
    whole, rows = loader(step), loader.sizes.rows(step)
    (instances,), asked[:] = asked[:], []
    bounds = [rows * rank // world for rank in range(world + 1)]
    parts = [loader(step, slice(*pair)) for pair in itertools.pairwise(bounds)]
    for name in whole:
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    for numbers, pair in zip(asked, itertools.pairwise(bounds), strict=True):
        assert numbers == list(dict.fromkeys(instances[row * len(instances) // rows] for row in range(*pair)))


@given(st.integers(1, 5), st.integers(0, 30), st.integers(1, 4))
def test_law_8_read_ahead_and_resume_point(data, batch_size, start, depth):
    """Batches do not depend on how far they are read ahead, nor on the step that reading starts at."""
    whole = [data(step)["input_ids"] for step in range(40)]
    ahead = [batch["input_ids"] for batch in prefetch(data, start, 40, depth)]
    assert all(torch.equal(a, b) for a, b in zip(ahead, whole[start:], strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "tokens.npy"
    np.arange(1000, dtype=np.uint16).tofile(path)
    windows = Windows((open_tokens(str(path), "uint16"),), 8, 1000)
    return Loader(windows, constant_sizes(7, 8), seed=3, num_instances=120)


class Stateful:
    """A mutant: the order of a generator that goes on."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, step, batch_size, num_instances, seed):
        return self.generator.permutation(num_instances)[:batch_size]


def without_epoch(step, batch_size, num_instances, seed):
    start = step % (num_instances // batch_size) * batch_size
    return permutation(num_instances, seed, 1)[start : start + batch_size]


def with_replacement(step, batch_size, num_instances, seed):
    return np.random.default_rng((seed, step)).integers(0, num_instances, batch_size)


def over_the_edge(step, batch_size, num_instances, seed):
    """Batches run over the end of an epoch, so an instance can be twice in one epoch's batches."""
    start = step * batch_size
    epochs = [permutation(num_instances, seed, 1 + (start + i) // num_instances) for i in range(batch_size)]
    return np.array([order[(start + i) % num_instances] for i, order in enumerate(epochs)])


@pytest.mark.parametrize("mutant", [Stateful(), without_epoch, with_replacement, over_the_edge])
def test_law_8_catches(mutant):
    law_order(indices, 7, 101, 0)
    with pytest.raises(AssertionError):
        law_order(mutant, 7, 101, 0)
