"""A model with experts out of a dense one: its first logits are those of the dense model, and it trains on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hf_peers import directory, with_tokenizer

from olmo_fn import spec, tree
from olmo_fn.checkpoint import load, save
from olmo_fn.cli import main as cli
from olmo_fn.convert.upcycle import Upcycle, upcycled, with_experts
from olmo_fn.formats.huggingface import open_directory
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Model, MultiToken, PeriNorm, PreNorm, SwiGLU, dense
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.folder import read_config, write_config
from olmo_fn.train.schedules import Cosine
from olmo_fn.train.session import load_parameters

IDS = torch.randint(40, (2, 17), generator=torch.Generator().manual_seed(0))
QUICK = ["--recipe.no-compile", "--run.threads", "1", "--run.sample=", "--run.eval-tokens", "100"]
SWIGLU = SwiGLU(hidden_size=12)
MODELS = {
    "reordered": dense(8, 3, 2, 12, vocab_size=40, init_std=0.4),
    "peri-tied": Model(8, 2, 40, PeriNorm(mixer=Attention(n_heads=2), feed_forward=SWIGLU), tie_embeddings=True, init_std=0.4),
    "pattern": Model(
        8,
        4,
        40,
        pattern=tuple(
            PreNorm(mixer=Attention(n_heads=2, n_kv_heads=n), feed_forward=SwiGLU(hidden_size=4 * n)) for n in (1, 2)
        ),
        init_std=0.4,
    ),
    "multi-token": replace(dense(8, 2, 2, 12, vocab_size=40, init_std=0.4), multi_token=MultiToken(depth=1)),
}


def made_of(model: Model, **settings) -> tuple[Model, tree.Tree, tree.Tree]:
    """The model with experts, its parameters, and those of the dense one."""
    params = tree.map(lambda p: p if p.ndim > 1 else p + 0.3, spec.init(transformer.specs(model), 1))
    made = with_experts(model, Upcycle("dense", "run", **settings))
    pick = upcycled(model, made, lambda path: tree.at(params, path), seed=3)
    return made, tree.map_with_path(lambda path, _: pick(path), transformer.specs(made)), params


@pytest.mark.parametrize("settings", [{}, {"num_experts": 4, "top_k": 4}, {"num_experts": 5, "top_k": 1}, {"dense_layers": 1}])
@pytest.mark.parametrize("name", MODELS)
def test_the_first_logits_are_those_of_the_dense_model(name, settings):
    model = MODELS[name]
    made, params, before = made_of(model, **settings)
    expected = transformer.logits(model, before, {"input_ids": IDS})
    found = transformer.logits(made, params, {"input_ids": IDS})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    batch = {"input_ids": IDS[:, :-1], "labels": IDS[:, 1:].contiguous()}
    no_aux = replace(made.block.feed_forward, balance_loss=0.0, router_z_loss=0.0) if not made.pattern else None
    alone = replace(made, block=replace(made.block, feed_forward=no_aux)) if no_aux else made  # mtp has those of its block
    (_, a), (_, b) = transformer.loss(model)(before, batch), transformer.loss(alone)(params, batch)
    for loss in ("ce", "mtp") if model.multi_token.depth else ("ce",):
        assert b[loss].item() == pytest.approx(a[loss].item(), rel=1e-6)
    loads = [b[name] for name in b if name.startswith("load/")]
    assert loads, "tokens are sent to experts"


def test_with_weights_that_do_not_add_up_to_1_the_logits_are_others():
    """So the test bites."""
    made, params, before = made_of(MODELS["reordered"])
    wrong = replace(made, block=replace(made.block, feed_forward=replace(made.block.feed_forward, weight_norm=None)))
    found = transformer.logits(wrong, params, {"input_ids": IDS})
    assert not torch.allclose(found, transformer.logits(MODELS["reordered"], before, {"input_ids": IDS}), rtol=1e-2)


def test_routers_are_random_and_by_their_seed():
    _, params, _ = made_of(MODELS["reordered"])
    routers = [params["blocks"][str(i)]["moe"]["w_router"] for i in range(3)]
    assert not routers[0].equal(routers[1])
    assert routers[0].unique().numel() == routers[0].numel()


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    return with_tokenizer(directory("llama", tmp_path_factory.mktemp("hf") / "dir", torch.bfloat16, vocab_size=300))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokens") / "part-0.npy"
    np.save(path, np.random.default_rng(0).integers(3, 299, 4000).astype(np.uint16))
    return str(path)


def logits_of(run):
    session, params, _ = load_parameters(run)
    return session.cfg, transformer.logits(session.cfg.model, params, {"input_ids": IDS})


def test_of_a_directory(published, tokens, tmp_path, capsys, monkeypatch):
    """By the command; and what it says to type next trains."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "upcycle", str(published), "run", "--num-experts", "4", "--dense-layers", "1"]) == 0
    said = capsys.readouterr().out
    found = open_directory(published)
    params = tree.unflatten((path, found.parameter(path)) for path in found.names)
    cfg, logits = logits_of("run")
    assert cfg.model.block.feed_forward.num_experts == 4
    torch.testing.assert_close(logits, transformer.logits(found.model, params, {"input_ids": IDS}), rtol=1e-5, atol=1e-5)
    assert " for a token), from " in said
    line = next(line for line in said.splitlines() if line.startswith("train on:")).partition("olmo-fn ")[2]
    words = [tokens if "part-" in word else word for word in line.split()]
    more = ["--run.steps", "2", "--recipe.sequence-length", "16", "--recipe.batch-size", "2", "--run.checkpoint-every", "0"]
    assert cli.main([*words, *more, *QUICK]) == 0
    assert (tmp_path / "run" / "tokenizer.json").is_file()
    _, trained = logits_of("run-2")
    assert not trained.equal(logits)


def run_of(folder, model, step=7):
    """A run with one checkpoint."""
    params = spec.init(transformer.specs(model), 2)
    recipe, start = Recipe(batch_size=2, sequence_length=16, ema=0.9), Run(folder=str(folder), steps=9)
    cfg = Config(model, recipe=recipe, run=start, schedule=Cosine(warmup=0))
    write_config(cfg, folder)
    slots = {"ema": tree.map(lambda p: 2 * p, params)}
    save({"params": params, "slots": slots}, folder / "checkpoints", step=step, meta={})
    return params


@pytest.mark.parametrize("weights", ["params", "ema"])
def test_of_a_run(weights, tmp_path, capsys):
    model = MODELS["reordered"]
    params = run_of(tmp_path / "dense", model)
    words = ["convert", "upcycle", str(tmp_path / "dense"), str(tmp_path / "run"), "--weights", weights, "--step", "7"]
    assert cli.main(words) == 0
    cfg, logits = logits_of(tmp_path / "run")
    chosen = params if weights == "params" else tree.map(lambda p: 2 * p, params)
    expected = transformer.logits(model, chosen, {"input_ids": IDS})
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
    assert (cfg.recipe, cfg.run.folder) == (read_config(tmp_path / "dense").recipe, str(tmp_path / "run"))
    found, _ = load(tmp_path / "run" / "checkpoints" / "step0")
    assert found["params"]["blocks"]["1"]["moe"]["experts"]["w_up"].shape == (8, 8, 12)
    assert f"olmo-fn train {tmp_path / 'run'} --run.start-from {tmp_path / 'run'}" in capsys.readouterr().out


def refused(capsys, *words):
    capsys.readouterr()
    assert cli.main(["convert", "upcycle", *map(str, words)]) == 2
    return capsys.readouterr().err.strip()


def test_bad_input(published, tmp_path, capsys):
    run_of(tmp_path / "dense", MODELS["reordered"])
    assert cli.main(["convert", "upcycle", str(tmp_path / "dense"), str(tmp_path / "sparse")]) == 0
    new = tmp_path / "new"
    assert "has experts already, 8 in a layer; give a dense model" in refused(capsys, tmp_path / "sparse", new)
    assert "is there already" in refused(capsys, tmp_path / "dense", tmp_path / "sparse")
    assert "--top-k is 9, and there are 8 experts (--num-experts)" in refused(capsys, tmp_path / "dense", new, "--top-k", 9)
    assert "--dense-layers is 3, and the model has 3 layers" in refused(capsys, tmp_path / "dense", new, "--dense-layers", 3)
    assert "is no run, which --step and --weights are of" in refused(capsys, published, new, "--step", 3)
    assert "has no checkpoint of step 3; it has 7" in refused(capsys, tmp_path / "dense", new, "--step", 3)
    gemma = directory("gemma3", tmp_path / "gemma")
    assert "feed-forward networks of the kind geglu, or with biases" in refused(capsys, gemma, new)
    olmoe = directory("olmoe", tmp_path / "olmoe")
    assert "has experts already, 6 in a layer" in refused(capsys, olmoe, new)
    assert "has no config.json" in refused(capsys, tmp_path, new) or "is not there" in refused(capsys, tmp_path, new)
    assert not new.exists()


def test_a_dense_run_is_no_start_for_one_with_experts(tmp_path, capsys):
    run_of(tmp_path / "dense", MODELS["reordered"])
    words = ["train", "olmo2-tiny", "--model.feed-forward.name", "moe", "--run.start-from", str(tmp_path / "dense")]
    assert cli.main([*words, "--run.folder", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "has no experts, and this model has" in said
    assert f"olmo-fn convert upcycle {tmp_path / 'dense'} RUN" in said
    assert not (tmp_path / "run").exists()
