"""What the functions refuse, say or take: one row a mistake that somebody made, silent or answered from deep inside before."""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import Broken, batch_of, caught, params_of, same_bits, through_a_checkpoint

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE, Aux
from olmo_fn.core.layout import Sweep
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.core.random import normal, philox
from olmo_fn.core.tape import forward_backward, forward_only
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, constant, muon, partition, sgd
from olmo_fn.optim.schedules import scale, then
from olmo_fn.parallel.shard import shard
from olmo_fn.research import many, stack
from olmo_fn.spec import Box, abstract, init
from olmo_fn.testing import Layout, assert_equivalent
from olmo_fn.transforms import gradient_noise
from olmo_fn.transforms.lora import lora, lora_specs

DOUBLE = torch.float64
MODEL = dense(d_model=8, n_layers=2, n_heads=2, hidden_size=12, vocab_size=16, init_std=0.3)
WIDER = dense(d_model=16, n_layers=2, n_heads=2, hidden_size=12, vocab_size=16)
DEEPER = dense(d_model=8, n_layers=3, n_heads=2, hidden_size=12, vocab_size=16)
SPECS = transformer.specs(MODEL)
PARAMS = init(SPECS, 0)
LOSS = transformer.loss(MODEL)
BATCH = batch_of(16)
IDS, LABELS = BATCH["input_ids"], BATCH["labels"]
STEP = pipe(LOSS, grad(), clip(1.0), adamw(1e-3))
STATE = STEP.init(PARAMS)
W = {"w": torch.zeros(2)}


def with_label(value):
    return {**BATCH, "labels": LABELS.index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(value))}


def plain(loss, optimizer=None):
    """One step with a loss that is a function of the differences."""
    step = pipe(lambda p, b: loss(p["w"] - b["labels"]), grad("func"), optimizer or sgd(0.1))
    return step(step.init(W), {"labels": torch.tensor([3, 4])})


# --- batches ----------------------------------------------------------------------------------------------------------

BATCHES = {
    "use-4 a label of -1": (with_label(-1), "labels has -1 at row 1, position 2, which is no token; where there is no loss"),
    "use-4 a label beyond": (with_label(16), "labels has 16 at row 1, position 2, which is no token; the vocabulary has 16"),
    "use-4 -200": (with_label(-200), "where there is no loss a label is -100"),
    "use-4 an id beyond": ({**BATCH, "input_ids": IDS + 16}, "input_ids has"),
    "use-4 a negative id": ({**BATCH, "input_ids": IDS - 16}, "input_ids has"),
    "use-4 attention_mask": (
        {**BATCH, "attention_mask": IDS},
        "'attention_mask'] is nothing that the model knows; padding goes",
    ),
    "use-4 position_ids": ({**BATCH, "position_ids": IDS}, "positions begin at 0"),
    "use-4 another key": ({**BATCH, "extra": IDS}, "it takes input_ids, labels, documents, rows, sources, loss_tokens"),
    "use-4 no labels": ({"input_ids": IDS}, "a batch has input_ids and labels (B, T) int64; this one has input_ids"),
    "use-4 a misspelt key": (
        {"input_ids": IDS, "label": LABELS},
        "this one has input_ids, label: did you mean labels by label?",
    ),
    "use-4 no ids": ({"labels": LABELS}, "a batch has input_ids and labels (B, T) int64; this one has labels"),
    "use-4 one row of ids": (
        {k: x[0] for k, x in BATCH.items()},
        "input_ids is (8,) int64, and must be (B, T) int64: input_ids.v",
    ),
    "use-4 numpy": ({k: x.numpy() for k, x in BATCH.items()}, "a NumPy ndarray; make it a tensor: torch.as_tensor("),
    "use-4 a list": ({**BATCH, "labels": LABELS.tolist()}, "batch['labels'] is a list; make it a tensor"),
    "use-4 int32": (
        {k: x.int() for k, x in BATCH.items()},
        "input_ids is (4, 8) int32, and must be (B, T) int64: input_ids.long()",
    ),
    "use-4 float labels": ({**BATCH, "labels": LABELS.float()}, "labels is (4, 8) float32, and must be (4, 8) int64, as"),
    "use-4 other lengths": ({**BATCH, "labels": LABELS[:, :4]}, "labels is (4, 4) int64, and must be (4, 8) int64"),
    "use-4 other documents": ({**BATCH, "documents": IDS[:2]}, "documents is (2, 8) int64, and must be (4, 8)"),
    "use-4 tokens of each row": ({**BATCH, "loss_tokens": torch.ones(4)}, "loss_tokens is"),
    "use-4 a tuple": ((IDS, LABELS), "a batch is a dict of tensors, not a tuple"),
}


@pytest.mark.parametrize("engine", ["tape", "func"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_wrong_batch_is_refused(name, engine):
    batch, message = BATCHES[name]
    grads = pipe(LOSS, grad(engine), accumulate(2))
    step = sgd(0.1)(grads)
    for use in (partial(step, step.init(PARAMS)), partial(grads, PARAMS)):
        with pytest.raises(ValueError, match=r"\w") as error:
            use(batch)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_every_batch_of_a_shape_is_looked_at():
    STEP(STATE, BATCH)
    with pytest.raises(ValueError, match="labels has -1"):
        STEP(STATE, with_label(-1))


def test_the_loss_alone_and_logits_refuse_a_wrong_batch():
    with pytest.raises(ValueError, match="labels has 16"):
        LOSS(PARAMS, with_label(16))
    with pytest.raises(ValueError, match=r"a batch has input_ids and labels"):
        LOSS(PARAMS, {"input_ids": IDS})
    with pytest.raises(ValueError, match="input_ids has"):
        transformer.logits(MODEL, PARAMS, {"input_ids": IDS + 16})
    assert transformer.logits(MODEL, PARAMS, {"input_ids": IDS}).shape == (4, 8, 16)


def test_labels_that_are_the_ids_are_told():
    """The convention of programs that shift inside; a text of one token has such labels as well."""
    with pytest.warns(UserWarning, match="a label is the token after it"):
        STEP(STATE, {"input_ids": IDS, "labels": IDS})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        STEP(STATE, {"input_ids": IDS * 0, "labels": IDS * 0})
        STEP(STATE, BATCH)


def test_a_batch_without_a_label():
    """Loss 0 of 0 tokens, a skipped step, and not a bit of the state changes; one empty part of two is as ever."""
    for engine in ("tape", "func"):
        for parts in (1, 2):
            step = pipe(LOSS, grad(engine), accumulate(parts), clip(1.0), adamw(1e-3), skip_spikes(), ema(0.9))
            before, _ = step(step.init(PARAMS), BATCH)
            after, metrics = step(before, {**BATCH, "labels": torch.full_like(LABELS, IGNORE)})
            assert {name: float(metrics[name]) for name in ("loss", "ce", "grad_norm", "skipped")} == {
                "loss": 0.0,
                "ce": 0.0,
                "grad_norm": 0.0,
                "skipped": 1.0,
            }
            assert same_bits({**after._asdict(), "step": before.step}, before._asdict())


# --- parameters and states --------------------------------------------------------------------------------------------

DONATED = pipe(LOSS, grad(), adamw(1e-3), donate())
BARE = pipe(LOSS, grad(), clip(1.0))
ADAPTERS = lora_specs(SPECS, 2)
ADAPTED = pipe(LOSS, lora(ADAPTERS), grad(), sgd(0.1))
GIVEN = {
    "use-4 a wider model": (
        lambda: STEP.init(params_of(WIDER)),
        "embed is (16, 16) and must be (16, 8); blocks.0.attention.w_q is (16, 16) and must be (8, 8); blocks.0.attention.w_k",
    ),
    "use-4 a deeper model": (lambda: STEP.init(params_of(DEEPER)), "blocks.2.attention.w_q is none of them"),
    "use-4 one leaf more": (lambda: STEP.init({**PARAMS, "bias": torch.zeros(3)}), "bias is none of them"),
    "use-4 a leaf too few": (
        lambda: STEP.init({**PARAMS, "head": {"norm": PARAMS["head"]["norm"]}}),
        "not the parameters of the loss: head.w_out is missing",
    ),
    "use-4 gradients of others": (lambda: STEP.grads(params_of(WIDER), BATCH), "embed is (16, 16) and must be (16, 8)"),
    "use-4 the loss of others": (lambda: LOSS(params_of(WIDER), BATCH), "embed is (16, 16) and must be (16, 8)"),
    "use-4 adapters forgotten": (lambda: ADAPTED.init(PARAMS), "lora.blocks.0.attention.w_q.a is missing"),
    "use-4 other adapters": (
        lambda: ADAPTED.init({**PARAMS, **init(lora_specs(SPECS, 3), 0)}),
        "lora.blocks.0.attention.w_q.a is (3, 8) and must be (2, 8)",
    ),
    "use-4 whole numbers": (lambda: STEP.init({**PARAMS, "embed": IDS}), "embed is torch.int64; a parameter is a tensor of"),
    "use-4 init(specs)": (lambda: STEP.init(SPECS), "a Spec and not yet a tensor; init(transformer.specs(model), seed=0)"),
    "use-4 init(model)": (lambda: STEP.init(MODEL), "not a Model; init(transformer.specs(model), seed=0) makes them"),
    "use-4 nothing": (lambda: pipe(print, grad("func"), sgd(0.1)).init({}), "no parameters"),
    "use-4 init of a model": (lambda: init(MODEL, 0), "init(transformer.specs(model), seed=0)"),
    "use-4 init of tensors": (lambda: init(PARAMS, 0), "init makes parameters of a tree of Spec"),
    "use-4 step(params, batch)": (
        lambda: STEP(PARAMS, BATCH),
        "takes (state, batch), and this is a dict: step.init(params) first",
    ),
    "use-4 no optimizer": (
        lambda: BARE.init(PARAMS),
        "pipe(loss, grad('tape'), clip(1.0)) gives gradients and has no state; put",
    ),
}
"""What a step is given."""


def spent():
    first = DONATED.init(PARAMS)
    second, _ = DONATED(first, BATCH)
    DONATED(second, BATCH)
    return first, second


GIVEN |= {
    "use-4 after donate()": (lambda: DONATED(spent()[0], BATCH), "this state is spent: a step with donate() has written"),
    "use-4 after donate(), later": (lambda: STEP(spent()[1], BATCH), "this state is spent"),
    "use-4 after donate(), changed": (lambda: DONATED(spent()[0]._replace(slots={}), BATCH), "this state is spent"),
}

# --- how a step is made -----------------------------------------------------------------------------------------------

MADE = {
    "use-4 an engine": (lambda: grad("function"), "grad('function'): engines are tape and func"),
    "use-4 float16": (
        lambda: grad(dtype=torch.float16),
        "gradients underflow in float16 without a scaler of the loss; use torch.f",
    ),
    "use-4 int8": (lambda: grad(dtype=torch.int8), "use torch.float32, torch.bfloat16, torch.float64"),
    "use-4 no loss": (
        lambda: pipe(grad(), clip(1.0)),
        "the first argument of a pipe is the loss, (params, batch) -> (sum, metrics)",
    ),
    "use-4 a model": (lambda: pipe(MODEL, grad()), "this one is a Model; begin with a loss such as transformer.loss(model)"),
    "use-4 a step": (lambda: pipe(STEP, grad()), "this one is a Step"),
    "use-4 no call": (lambda: pipe(LOSS, grad, clip(1.0)), "'grad' is no transform; call it: grad(...)"),
    "use-4 a model's fields": (
        lambda: transformer.loss(dense(32, 2, 3, 64)),
        "n_heads 3 does not divide d_model 32; choose one of 1, 2, 4, 8, 16, 32, or give head_dim",
    ),
    "use-4 a loss that is a number": (lambda: plain(lambda x: x.sum()), "a loss returns (sum of losses, metrics), such as"),
    "use-4 a loss that is no sum": (lambda: plain(lambda x: (x, {})), "this one returned a sum of shape (2,)"),
    "use-4 a metric that is a float": (lambda: plain(lambda x: (x.sum(), {"a": 1.0})), "a float as the metric 'a'"),
    "use-4 nothing returned": (lambda: plain(lambda x: None), "this one returned a NoneType; give the sum and not the mean"),
    "use-5 a schedule of words": (lambda: plain(lambda x: (x.sum(), {}), sgd(lambda s: "1e-3")), "this is a str"),
    "use-5 a rate of words": (lambda: plain(lambda x: (x.sum(), {}), sgd("1e-3")), "a learning rate is a number"),
    "use-5 noise before accumulate": (
        lambda: pipe(LOSS, grad(), gradient_noise(0.1), accumulate(2)),
        "would add the same noise with every part of the batch; put accumulate(2) before gradient_noise(0.1, seed=0)",
    ),
    "use-5 double parameters": (
        lambda: assert_equivalent(partial(pipe_of, MODEL, torch.float32), SPECS, [Layout(Mesh())], [BATCH]),
        "is torch.float32, and the parameters are torch.float64: give grad(dtype=torch.float64) in the recipe",
    ),
}


@pytest.mark.parametrize("name", GIVEN | MADE)
def test_a_mistake_is_answered_in_one_line(name):
    make, message = (GIVEN | MADE)[name]
    with pytest.raises(ValueError, match=r"\w") as error:
        make()
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def pipe_of(model, dtype):
    return pipe(transformer.loss(model), grad(dtype=dtype), sgd(0.1))


def test_the_names_of_a_long_list_are_few():
    with pytest.raises(ValueError, match=r"and 22 more$"):
        STEP.init(params_of(WIDER))


def test_donated_parameters_stay_those_of_the_caller():
    given = tree.map(torch.clone, PARAMS)
    state = DONATED.init(given)
    memory = state.params["embed"].data_ptr()
    for _ in range(2):
        state, _ = DONATED(state, BATCH)
    assert state.params["embed"].data_ptr() == memory
    assert same_bits(given, PARAMS)
    assert not same_bits(state.params, PARAMS)


def test_many_states_are_spent_together():
    step = pipe(LOSS, grad("func"), sgd(0.1), donate())
    states = stack([step.init(PARAMS)] * 2)
    many(step)(states, BATCH)
    with pytest.raises(ValueError, match="this state is spent"):
        many(step)(states, BATCH)


def test_a_step_in_torch_compile_is_refused():
    compiled = torch.compile(STEP, backend="eager")
    with pytest.raises(ValueError, match=r"put compile\(\) at the end of the pipe"):
        compiled(STATE, BATCH)
    STEP(STATE, BATCH)


def test_a_pipe_prints_what_was_typed():
    made = pipe(LOSS, lora(ADAPTERS), grad(), accumulate(2), clip(1.0), adamw(1e-3), skip_spikes(), donate())
    names = "lora(alpha=16.0), grad('tape'), accumulate(2), clip(1.0), adamw(...), skip_spikes(6.0, window=128), donate()"
    assert repr(made) == f"pipe(loss, {names})"
    assert repr(ema(0.9)(STEP)) == "pipe(loss, grad('tape'), clip(1.0), adamw(...), ema(0.9))"
    assert repr(made.grads) == "pipe(loss, lora(alpha=16.0), grad('tape'), accumulate(2), clip(1.0))"


# --- schedules --------------------------------------------------------------------------------------------------------

RATES = {
    "use-5 if": (lambda s: 1e-3 if s < 2 else 1e-4, [1e-3, 1e-4]),
    "use-5 math": (lambda s: 1e-3 * math.cos(s), [1e-3 * math.cos(1), 1e-3 * math.cos(2)]),
    "use-5 then": (then(lambda s: 0.3, 1, lambda s: 0.1 / (1 + int(s))), [0.3, 0.05]),
    "use-5 scale": (scale(lambda s: 0.5, lambda s: 1 / int(s)), [0.5, 0.25]),
    "use-5 an integer": (lambda s: 2, [2.0, 2.0]),
}


@pytest.mark.parametrize("name", RATES)
def test_a_schedule_may_give_plain_numbers(name):
    """In fp64, as the package's own are."""
    schedule, expected = RATES[name]
    step = pipe(LOSS, grad(), sgd(schedule))
    state = step.init(PARAMS)
    for rate in expected:
        state, metrics = step(state, BATCH)
        assert metrics["lr"].dtype == DOUBLE
        assert float(metrics["lr"]) == rate


def test_plain_numbers_are_the_constant_schedule():
    ends = []
    for lr in (0.1, lambda s: 0.1, constant(0.1)):
        step = pipe(LOSS, grad("func"), adamw(lr))
        ends.append(many(step)(stack([step.init(PARAMS)] * 2), BATCH)[0].params)
    assert same_bits(ends[0], ends[1])
    assert same_bits(ends[0], ends[2])


# --- a changed chain is the changed model -----------------------------------------------------------------------------


def halved(model, dtype=DOUBLE):
    """A recipe whose loss has another head than the model's: its loss is half as large."""
    chain = transformer.loss(model)
    *stages, last = chain.stages

    def head(p, x, ctx):
        _, aux = last.fn(p, x, ctx)
        return None, Aux(aux.loss / 2, aux.metrics)

    return pipe(replace(chain, stages=(*stages, last._replace(fn=head))), grad(dtype=dtype), sgd(0.1))


def stock(chain, *more):
    """The stages of the stock model, whatever the chain is."""
    return forward_backward(transformer.loss(MODEL), *more)


OF_STOCK = Sweep(stock, forward_only)
"""A mutant of the sweep, in the ranks."""


def stays_changed(pool, layout):
    whole = pipe(transformer.loss(MODEL), grad(dtype=DOUBLE))(params_of(MODEL), BATCH)[1]["loss"]
    assert halved(MODEL).grads(params_of(MODEL), BATCH)[1]["loss"] == whole / 2
    assert_equivalent(partial(halved, MODEL), SPECS, [layout], [BATCH], pool=pool)


LAYOUTS = {"dp_shard": Layout(Mesh(dp_shard=2)), "tp": Layout(Mesh(tp=2)), "pp": Layout(Mesh(pp=2))}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_changed_chain_stays_changed_in_every_layout(pool, name):
    stays_changed(pool, LAYOUTS[name])


@pytest.mark.parametrize("name", ["dp_shard", "tp"])
def test_a_changed_chain_catches(pool, name):
    target = "olmo_fn.core.tape.LOCAL_SWEEP"
    caught(stays_changed, Broken(pool, target, OF_STOCK), LAYOUTS[name])


def test_parameters_of_changed_stages_are_their_own():
    """A changed stage may use more than the model has; what no stage uses is foreign all the same."""
    *stages, last = LOSS.stages

    def head(p, x, ctx):
        _, aux = last.fn(p, x, ctx)
        return None, Aux(aux.loss * p["gain"], aux.metrics)

    chain = replace(LOSS, stages=(*stages, last._replace(params=(*last.params, ("gain", "gain")), fn=head)))
    step = pipe(chain, grad(), sgd(0.1))
    state, _ = step(step.init({**PARAMS, "gain": torch.ones(())}), BATCH)
    assert float(state.params["gain"]) != 1.0
    with pytest.raises(ValueError, match="bias is none of them"):
        step.init({**PARAMS, "gain": torch.ones(()), "bias": torch.ones(())})


def refused_on_ranks(connection):
    """What `shard` and its ``init`` say of another model's specs and parameters."""
    told = []
    step = shard(connection, SPECS)(pipe(LOSS, grad(), sgd(0.1)))
    for wrong in (
        lambda: shard(connection, transformer.specs(WIDER))(pipe(LOSS, grad(), sgd(0.1))),
        lambda: step.init(params_of(WIDER)),
        lambda: step.init({**PARAMS, "bias": torch.zeros(3)}),
        lambda: step(step.init(PARAMS), with_label(-1)),
    ):
        with pytest.raises(ValueError, match=r"\w") as error:
            wrong()
        told.append(str(error.value))
    return told


def test_ranks_refuse_what_one_process_refuses(pool):
    for specs, params, more, batch in pool.run(refused_on_ranks, mesh=Mesh(dp_shard=2)):
        assert "embed is (16, 16) and must be (16, 8)" in specs
        assert "embed is (16, 16) and must be (16, 8)" in params
        assert "bias is none of them" in more
        assert "which is no token" in batch or "another rank" in batch


# --- noise that depends on the step -----------------------------------------------------------------------------------


def noisy(model, seed=3, dtype=DOUBLE, engine="tape", std=0.1):
    optimizer = partition({"matrix": muon(0.01, dtype=dtype), "default": sgd(0.1)}, transformer.specs(model))
    return pipe(
        transformer.loss(model), grad(engine, dtype=dtype), accumulate(2), gradient_noise(std, seed), clip(1.0), optimizer
    )


def test_philox_is_that_of_the_paper():
    """The known answers of Random123."""
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    for counter, key, expected in (
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ):
        assert tuple(int(word) for word in philox(tuple(map(torch.tensor, counter)), key)) == expected


def test_noise_is_normal_and_of_everything():
    at = torch.arange(200_000)
    x = normal(1, torch.tensor(3), "a", at)
    assert abs(float(x.mean())) < 0.01
    assert abs(float(x.var()) - 1) < 0.01
    assert abs(float((x**4).mean()) - 3) < 0.1
    others = [normal(2, torch.tensor(3), "a", at), normal(1, torch.tensor(4), "a", at), normal(1, torch.tensor(3), "b", at)]
    for y in (*others, x.roll(1)):
        assert abs(float((x * y).mean())) < 0.01
    part = Box((3, 2), (2, 5))
    whole = normal(1, torch.tensor(3), "a", Box.whole((7, 9)).entries((7, 9)))
    assert torch.equal(whole[part.slices], normal(1, torch.tensor(3), "a", part.entries((7, 9))))


def run(step, steps, state=None):
    state = step.init(params_of(MODEL)) if state is None else state
    for _ in range(steps):
        state, _ = step(state, BATCH)
    return state


def test_noise_resumes_with_the_same_bits():
    step = noisy(MODEL)
    assert same_bits(run(step, 4)._asdict(), run(step, 4)._asdict())
    found, _ = through_a_checkpoint(step, run(step, 2), SPECS, DOUBLE)
    assert same_bits(run(noisy(MODEL), 2, found)._asdict(), run(step, 4)._asdict())
    assert not same_bits(run(noisy(MODEL, seed=4), 1).params, run(step, 1).params)


def test_noise_of_each_step_is_another():
    quiet, loud = (
        pipe(LOSS, grad(dtype=DOUBLE), *more, sgd(1.0)) for more in ([], [gradient_noise(lambda s: s.double().sqrt(), 0)])
    )
    first = quiet.init(params_of(MODEL))
    noise = []
    for n in range(2):
        start = first._replace(step=torch.tensor(n))
        added = tree.map(torch.sub, quiet(start, BATCH)[0].params, loud(start, BATCH)[0].params)
        noise.append(torch.cat([x.flatten() for _, x in tree.items(added)]) / math.sqrt(n + 1))
    assert abs(float((noise[0] * noise[1]).mean())) < 0.15
    for x in noise:
        assert abs(float(x.square().mean()) - 1) < 0.2


def test_noise_is_the_same_in_every_layout(pool):
    layouts = [*LAYOUTS.values(), Layout(Mesh(dp_replicate=2)), Layout(Mesh(cp=2))]
    assert_equivalent(partial(noisy, MODEL), SPECS, layouts, [batch_of(16, rows=8)] * 2, pool=pool)


def no_entries(self, path, local):
    """A mutant: every rank takes the first entries of the parameter."""
    return torch.arange(local.numel()).view(local.shape)


def test_noise_in_layouts_catches(pool):
    broken = Broken(pool, "olmo_fn.parallel.sharded_placement.ShardedPlacement.entries", no_entries)
    with pytest.raises(AssertionError):
        assert_equivalent(partial(noisy, MODEL), SPECS, [LAYOUTS["dp_shard"]], [BATCH], pool=broken)


def test_noise_of_many_runs_at_once():
    """Runs that are at different steps, and different seeds, have each the noise that they have alone."""
    step = noisy(MODEL, engine="func")
    states = [run(step, n) for n in (0, 2)]
    both, _ = many(step)(stack(states), BATCH)
    for i, state in enumerate(states):
        alone, _ = step(state, BATCH)
        torch.testing.assert_close(tree.map(lambda x, i=i: x[i], both.params), alone.params, rtol=1e-9, atol=1e-9)
    start = step.init(params_of(MODEL))
    seeds = torch.tensor([3, 4])
    at_once = torch.func.vmap(lambda seed: noisy(MODEL, seed, engine="func")(start, BATCH)[0].params)(seeds)
    for i, seed in enumerate(seeds.tolist()):
        alone, _ = noisy(MODEL, seed, engine="func")(start, BATCH)
        torch.testing.assert_close(tree.map(lambda x, i=i: x[i], at_once), alone.params, rtol=1e-9, atol=1e-9)


def test_abstract_states_need_no_numbers():
    assert all(x.is_meta for _, x in tree.items(DONATED.init(abstract(SPECS)).params))
