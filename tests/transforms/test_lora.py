"""Freezing and LoRA: what is not trained keeps its bits and costs nothing, and merged is adapted."""

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from strategies import batches, models
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.checkpoint import load, save
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.spec import Init, Spec, abstract, init
from olmo_fn.transforms import freeze, merge, train_only
from olmo_fn.transforms.lora import lora, lora_loss, lora_specs, merge_lora

QUICK = examples(12)
MODEL = dense(d_model=8, n_layers=2, n_heads=2, hidden_size=12, vocab_size=16, init_std=0.3)
SPECS = transformer.specs(MODEL)


def batch_of(seed=0):
    ids = torch.randint(16, (4, 9), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def assert_equal(a, b):
    """Bit for bit."""
    a, b = tree.flatten(a), tree.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        assert torch.equal(*(x[path].reshape(-1).view(torch.uint8) for x in (a, b))), path


def random_adapters(adapters, seed):
    """Adapters with a B that is not zero."""
    specs = tree.map(lambda s: s._replace(init=Init("normal", 0.3)), adapters)
    return init(specs, seed)


# --- freezing ---------------------------------------------------------------------------------------------------


@QUICK
@given(st.data(), models(), st.sampled_from(["tape", "func"]), st.sampled_from(["none", "full", "feed_forward"]))
def test_freeze(data, model, engine, remat):
    """Frozen parameters keep their bits, have no gradient and no slots; the others' gradients are those of all."""
    specs = transformer.specs(model)
    paths = list(tree.flatten(specs))
    patterns = data.draw(st.lists(st.sampled_from([*paths, "*norm", "blocks.0.*", "embed"]), min_size=1, max_size=4))
    frozen = {path for path in paths if tree.matches(path, patterns)}
    if len(frozen) == len(paths):
        return
    batch = data.draw(batches(model.vocab_size))
    loss, params = transformer.loss(model, z_loss=1e-3), init(specs, 0)
    engines = {"engine": engine, "remat": remat if engine == "tape" else "none"}
    step = pipe(loss, grad(**engines), accumulate(2), adamw(1e-2), ema(0.9), freeze(*patterns, parameters=specs), donate())
    everything, _ = grad(**engines)(loss)(params, batch)
    state = step.init(tree.map(torch.clone, params))
    assert {path for path, _ in tree.items(state.slots["ema"])} == set(paths) - frozen
    seen = tree.flatten(step.grads(state.params, batch, step.execution)[0])
    assert set(seen) == set(paths) - frozen
    assert_close(seen, {path: tree.at(everything, path) for path in seen}, rtol=1e-4, atol=1e-6)
    state, report = step(state, batch)
    assert_close(report["grad_norm"], SINGLE.sharing.norm(seen), rtol=1e-4, atol=1e-7)
    for path, p in tree.items(state.params):
        assert torch.equal(p, tree.at(params, path)) == (path in frozen), path
    assert list(tree.flatten(state.params)) == paths


def test_freeze_refuses():
    with pytest.raises(ValueError, match="pattern 'nothing' matches no parameter"):
        freeze("nothing", parameters=SPECS)
    with pytest.raises(ValueError, match=r"pattern 'lora\.\*' matches no parameter"):
        train_only("lora.*", parameters=SPECS)
    with pytest.raises(ValueError, match=r"freeze: \* freezes every parameter"):
        freeze("*", parameters=SPECS)


# --- LoRA -------------------------------------------------------------------------------------------------------


@QUICK
@given(st.data(), models(), st.floats(0.5, 32))
def test_lora_starts_at_the_model_and_merges_back(data, model, alpha):
    """With B = 0 the loss is the model's, to the bit; with any B, the merged model's. The mutant: another alpha."""
    specs = transformer.specs(model)
    patterns = data.draw(st.sampled_from([["*.w_*"], ["*.attention.w_q"], ["embed", "*w_down"], ["*.w_out"]]))
    adapters = lora_specs(specs, 1, patterns)
    batch, params = data.draw(batches(model.vocab_size)), init(specs, 0)
    loss = transformer.loss(model)
    adapted = lora(adapters, alpha)(loss).fn
    total, _ = loss(params, batch)
    assert torch.equal(adapted({**params, **init(adapters, 1)}, batch)[0], total)
    both = {**params, **random_adapters(adapters, 1)}
    merged = merge_lora(both, alpha)
    assert tree.flatten(merged).keys() == tree.flatten(params).keys()
    assert_close(adapted(both, batch)[0], loss(merged, batch)[0], rtol=1e-5, atol=1e-5)
    assert_close(lora_loss(loss, alpha)(both, batch)[0], loss(merged, batch)[0], rtol=1e-5, atol=1e-5)
    mutant = merge_lora(both, 2 * alpha)
    for path, p in tree.items(params):
        if f"lora.{path}.a" not in tree.flatten(adapters):
            assert tree.at(merged, path) is p
        else:
            assert torch.linalg.matrix_rank(tree.at(merged, path) - p, atol=1e-5) == 1
            assert not torch.allclose(tree.at(mutant, path), tree.at(merged, path))


@pytest.mark.parametrize("engine", [{}, {"remat": "full"}, {"engine": "func"}])
def test_lora_trains_adapters_only(engine):
    """Gradients are those of the whole loss; only adapters move, only they have slots; the loss falls."""
    adapters = lora_specs(SPECS, 2)
    loss, both, names = transformer.loss(MODEL), {**SPECS, **adapters}, set(tree.flatten(adapters))
    step = pipe(loss, lora(adapters), grad(**engine), clip(1.0), adamw(5e-2), train_only("lora.*", parameters=both), donate())
    params = init(SPECS, 0)
    state = step.init({**tree.map(torch.clone, params), **random_adapters(adapters, 1)})
    full, _ = torch.func.grad(lora_loss(loss, 16.0), has_aux=True)(state.params, batch_of())
    grads, _ = pipe(loss, lora(adapters), grad(**engine))(state.params, batch_of())
    assert_close(tree.flatten(grads), tree.map(lambda g: g / 32, tree.flatten(full)), rtol=1e-3, atol=1e-6)
    assert set(tree.flatten(state.slots["adamw_m"])) == names
    losses = []
    for _ in range(20):
        state, report = step(state, batch_of())
        losses.append(report["loss"].item())
    assert losses[-1] < losses[0] - 0.1
    assert_equal({k: v for k, v in state.params.items() if k != "lora"}, params)
    merged, _ = loss(merge_lora(state.params, 16.0), batch_of())
    assert_close(merged / 32, step(state, batch_of())[1]["loss"], rtol=1e-5, atol=1e-5)


def test_adapters_saved_alone(tmp_path):
    """The adapters' checkpoint holds nothing else, and the model with them is the one that was."""
    adapters, params = lora_specs(SPECS, 2), init(SPECS, 0)
    both = {**params, **random_adapters(adapters, 1)}
    path = save({"params": {"lora": both["lora"]}}, tmp_path, step=1)
    again = load(path, {"params": abstract(adapters)})[0]["params"]
    assert_equal(merge_lora({**init(SPECS, 0), **again}, 16.0), merge_lora(both, 16.0))
    numbers = 4 * sum(spec.size for _, spec in tree.items(adapters))
    assert sum(file.stat().st_size for file in path.rglob("*.safetensors")) < numbers + 20_000


def test_stacked_matrices():
    """An adapter of a stack of matrices is one for each."""
    specs = {"w": Spec((3, 4, 5), ("experts", "embed", "mlp"), Init("normal", 1.0))}
    adapters = lora_specs(specs, 2, ["w"])
    both = {**init(specs, 0), **random_adapters(adapters, 1)}
    a, b = both["lora"]["w"]["a"], both["lora"]["w"]["b"]
    merged = merge_lora(both, 4.0)["w"]
    for i in range(3):
        assert_close(merged[i], both["w"][i] + 2 * b[i] @ a[i])


@pytest.mark.parametrize(
    ("rank", "patterns", "message"),
    [
        (0, ["*w_q"], "lora: rank 0 of blocks.0.attention.w_q, which is 8 x 8; it must be from 1 to 7"),
        (8, ["*w_q"], "lora: rank 8 of blocks.0.attention.w_q, which is 8 x 8; it must be from 1 to 7"),
        (2, ["*.w_typo"], "pattern '\\*.w_typo' matches no parameter"),
        (2, ["*attention_norm"], "lora: blocks.0.attention_norm is no matrix, its shape is \\(8,\\)"),
    ],
)
def test_lora_refuses(rank, patterns, message):
    with pytest.raises(ValueError, match=message) as error:
        lora_specs(SPECS, rank, patterns)
    assert "\n" not in str(error.value)


def test_with_merging_over_time():
    """LoRA, the mean of the last steps and freezing in one step: the mean is of adapters only."""
    adapters = lora_specs(SPECS, 1)
    both = {**SPECS, **adapters}
    step = pipe(
        transformer.loss(MODEL), lora(adapters), grad(), adamw(1e-2), merge(2, [2]), train_only("lora.*", parameters=both)
    )
    state = step.init({**init(SPECS, 0), **init(adapters, 0)})
    seen = []
    for i in range(2):
        state, _ = step(state, batch_of(i))
        seen.append(state.params["lora"])
    assert_close(state.slots["merge"]["lora"], tree.map(lambda a, b: (a + b) / 2, *seen))
    assert set(state.slots["merge"]) == {"lora"}


def test_tables_of_the_vocabulary_are_adapted_too():
    """They are not products like the others: the sum is made, and both engines go through it."""
    adapters = lora_specs(SPECS, 2, ["embed", "head.w_out"])
    params = {**init(SPECS, 0, torch.float64), **init(adapters, 1, torch.float64)}
    params = tree.map_with_path(lambda path, p: p + 0.1 if path.endswith(".b") else p, params)
    loss = lora(adapters)(transformer.loss(MODEL))
    func, tape = (pipe(loss, grad(engine, dtype=torch.float64))(params, batch_of(0))[0] for engine in ("func", "tape"))
    for path, g in tree.items(func):
        assert_close(tree.at(tape, path), g, rtol=1e-9, atol=1e-12)
