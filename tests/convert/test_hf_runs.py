"""Runs that begin from a Hugging Face directory, and directories that runs leave: by the commands, with real transformers."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import same_bits
from hf_peers import TEMPLATE, directory, with_tokenizer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmo_fn import tree
from olmo_fn.checkpoint import steps
from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.formats import verify
from olmo_fn.formats.huggingface import open_directory, write_directory
from olmo_fn.formats.text_files import KEPT
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.load import load_model
from olmo_fn.generate.text import generate_text
from olmo_fn.models.config import dense
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.loop import train
from olmo_fn.train.schedules import Cosine
from olmo_fn.train.session import load_parameters, open_run

QUICK = ["--recipe.no-compile", "--recipe.sequence-length", "16", "--recipe.batch-size", "4", "--recipe.dtype", "float32"]
QUICK += ["--run.threads", "1", "--run.sample=", "--run.eval-tokens", "500"]
CONSTANT = ["--schedule.name", "constant", "--schedule.warmup", 0]
TEXT_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A published model: bf16, with a tokenizer."""
    folder = directory("olmo3", tmp_path_factory.mktemp("published") / "Olmo-3-tiny", torch.bfloat16, vocab_size=300)
    return with_tokenizer(folder)


@pytest.fixture(scope="module")
def tokens(source, tmp_path_factory):
    """What its tokenizer makes of a text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("The word of the number is x.\ndef f(x):\n    return x\n" * 300)
    words = [
        "tokenize",
        str(folder / "text.txt"),
        "--output",
        str(folder / "tokens"),
        "--tokenizer",
        str(source / "tokenizer.json"),
    ]
    assert cli.main(words) == 0
    return str(folder / "tokens" / "part-00000.npy")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_FN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no pictures, which take a second each


def run(*words):
    assert cli.main([str(word) for word in words]) == 0


def refused(capsys, *words):
    capsys.readouterr()
    assert cli.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def weights(folder):
    return {name: tensor for file in sorted(Path(folder).glob("*.safetensors")) for name, tensor in load_file(file).items()}


def greedy(folder, prompt, count=24):
    """What transformers generates."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).input_ids
    out = model.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=0, pad_token_id=0)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


def ours(run, prompt, count=24):
    model, _ = load_model(run)
    return generate_text(model, prompt, Sampling(max_tokens=count, temperature=0.0), healing=False)


# --- out and in again -----------------------------------------------------------------------------------------


def test_everything_beside_the_weights_is_carried_along_unchanged(source, capsys):
    run("convert", "from-hf", source, "run")
    run("convert", "to-hf", "run", "out", "--verify")
    for name in TEXT_FILES:
        assert Path("out", name).read_bytes() == (source / name).read_bytes(), name
    assert AutoTokenizer.from_pretrained("out").chat_template == TEMPLATE
    assert "the same model" in capsys.readouterr().out
    assert json.loads(Path("out/config.json").read_text())["dtype"] == "bfloat16"
    assert same_bits(weights("out"), weights(source))
    text = greedy("out", "The number")
    assert text == ours("run", "The number")
    assert len(text) > 5


def test_files_and_dtype_are_handed_on_to_the_runs_that_come_of_it(source, tokens):
    run("convert", "from-hf", source, "run")
    more = ["--data.paths", tokens, "--run.steps", 1, "--run.folder", "next", *CONSTANT, *QUICK]
    run("train", "run", "--run.start-from", "run", "--run.start-with", "params", *more)
    run("average", "next", "-o", "mean")
    run("convert", "to-hf", "mean", "out")
    assert Path("out/tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert {tensor.dtype for tensor in weights("out").values()} == {torch.bfloat16}


def test_the_dtype_is_chosen(source, capsys):
    run("convert", "from-hf", source, "run")
    run("convert", "to-hf", "run", "out", "--dtype", "float32")
    assert same_bits({name: x.bfloat16() for name, x in weights("out").items()}, weights(source))
    assert AutoModelForCausalLM.from_pretrained("out").dtype == torch.float32
    assert "out is there already" in refused(capsys, "convert", "to-hf", "run", "out")
    assert "run is there already" in refused(capsys, "convert", "from-hf", source, "run")


def test_float16_that_ends_below_a_weight_is_refused(source, capsys):
    found = open_directory(source)
    params = {path: found.parameter(path) for path in found.names}
    params["blocks.1.attention.w_k"][3, 4] = 1e5
    with pytest.raises(ValueError, match=r"layers.1.self_attn.k_proj.weight holds 1e\+05, and float16 ends at 65,504"):
        write_directory(Path("out"), found.model, params.items(), torch.float16)
    assert list(Path().iterdir()) == []


def test_several_shards_have_an_index_that_transformers_reads(source):
    found = open_directory(source)
    params = ((path, found.parameter(path)) for path in found.names)
    write_directory(Path("out"), found.model, params, torch.bfloat16, shard_bytes=20_000)
    assert len(list(Path("out").glob("model-*-of-*.safetensors"))) > 3
    assert same_bits(weights("out"), weights(source))
    assert same_bits(dict(AutoModelForCausalLM.from_pretrained("out").state_dict()), weights(source))
    assert same_bits(*({path: x.parameter(path) for path in found.names} for x in (found, open_directory("out"))))


def test_verify_needs_transformers(source, monkeypatch, capsys):
    run("convert", "from-hf", source, "run")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'olmo-fn[huggingface]'" in refused(capsys, "convert", "to-hf", "run", "out", "--verify")
    assert not Path("out").exists()


def test_verify_tells_another_model(source, monkeypatch):
    run("convert", "from-hf", source, "run")
    run("convert", "to-hf", "run", "out")
    said, same = verify.compare(Path("out"))
    assert same
    assert "differ by at most" in said
    real = verify.their_logits
    monkeypatch.setattr(verify, "their_logits", lambda path, ids: real(path, ids) * 1.01)
    assert not verify.compare(Path("out"))[1]


# --- training from one ----------------------------------------------------------------------------------------


def test_a_directory_alone_is_enough_to_train(source, tokens, capsys):
    run("train", "--init.from-hf", source, "--data.paths", tokens, "--run.steps", 2, "--run.folder", "tuned", *QUICK)
    said = capsys.readouterr().out
    assert f"weights of {source}: Olmo3ForCausalLM" in said
    assert "lr 1e-05, 2 steps of 4 x 16 tokens" in said
    first = open_run("tuned").first_state().params
    found = open_directory(source)
    assert same_bits(first, tree.unflatten((path, found.parameter(path)) for path in found.names))
    assert Path("tuned/tokenizer.json").is_file()
    run("convert", "to-hf", "tuned", "out")
    assert weights("out")["model.norm.weight"].dtype == torch.bfloat16
    assert Path("out/tokenizer_config.json").read_bytes() == (source / "tokenizer_config.json").read_bytes()
    assert greedy("out", "The") is not None


def test_adapters_on_an_imported_model_are_merged_when_it_is_written(source, tokens):
    lora = ["--lora.rank", 2, "--lora.alpha", 64, "--optim.lr", 0.05, "--schedule.warmup", 0]
    run("train", "--init.from-hf", source, "--data.paths", tokens, "--run.steps", 3, "--run.folder", "tuned", *lora, *QUICK)
    run("convert", "to-hf", "tuned", "out", "--dtype", "float32", "--verify")
    _, params, _ = load_parameters("tuned")
    found, before = open_directory("out"), open_directory(source)
    changed = 0
    for path in found.names:
        assert torch.equal(found.parameter(path), tree.at(params, path)), path
        changed += not torch.equal(found.parameter(path), before.parameter(path))
    assert changed == 3 * 7  # the matrices of three blocks
    assert greedy("out", "def ", 10) == ours("tuned", "def ", 10)


def test_a_run_goes_on_from_its_own_checkpoint_without_the_directory(source, tokens, tmp_path):
    copy = with_tokenizer(directory("olmo3", tmp_path / "copy", torch.bfloat16, vocab_size=300))
    words = [
        "train",
        "--init.from-hf",
        copy,
        "--data.paths",
        tokens,
        "--run.folder",
        "tuned",
        "--schedule.name",
        "constant",
        *QUICK,
    ]
    run(*words, "--run.steps", 2)
    (copy / "model.safetensors").unlink()
    run("train", "tuned", "--run.steps", 3)
    assert steps("tuned/checkpoints") == [2, 3]


def test_a_preset_that_is_another_model_is_refused_with_what_differs(source, tokens, capsys):
    line = refused(capsys, "train", "olmo2-tiny", "--init.from-hf", source, "--data.paths", tokens)
    for flag in ("--model.d-model 192 (there 32)", "--model.n-layers 4 (there 3)", "--model.vocab-size 4096 (there 300)"):
        assert flag in line
    assert "--model.init-method" not in line


def test_the_same_model_by_a_preset_is_taken(source, tokens):
    shape = {"d-model": 32, "n-layers": 3, "n-heads": 4, "n-kv-heads": 2, "hidden-size": 48, "vocab-size": 300}
    flags = [word for name, value in shape.items() for word in (f"--model.{name}", value)]
    flags += ["--model.window-pattern", 5, 5, -1, "--model.norm-eps", 1e-5]
    more = ["--data.paths", tokens, "--run.steps", 1, "--schedule.warmup", 0, "--run.folder", "tuned"]
    run("train", "olmo2-tiny", "--init.from-hf", source, *flags, *more, *QUICK)
    assert Path("tuned", KEPT, "config.json").is_file()


def test_a_start_that_makes_no_sense_is_refused(source, tokens, capsys):
    assert "leave out one" in refused(
        capsys, "train", "--init.from-hf", source, "--run.start-from", "other", "--data.paths", tokens
    )
    assert "--init.from-hf needs --data.paths" in refused(capsys, "train", "--init.from-hf", source)
    assert "is not there" in refused(capsys, "train", "--init.from-hf", "nowhere", "--data.paths", tokens)
    assert f"olmo-fn train --init.from-hf {source}" in refused(capsys, "train", source)
    export = ["train", "--init.from-hf", source, "--data.paths", tokens, "--export.hf-every", 2, "--run.folder", "tuned"]
    assert "ema are not kept; give --recipe.ema" in refused(capsys, *export, "--export.weights", "ema")
    export = ["train", "olmo2-tiny", "--export.hf-every", 2, "--model.clip-qkv", 3]
    assert "--export.hf-every 2: no architecture of transformers computes this model" in refused(capsys, *export)
    assert not Path("tuned").exists()


# --- directories on the way -----------------------------------------------------------------------------------


def test_directories_are_written_while_the_run_goes_on(source, tokens):
    words = ["--export.hf-every", 2, "--export.keep-last", 2, "--run.checkpoint-every", 0, "--run.keep-last", 1]
    cfg = ["--init.from-hf", source, "--data.paths", tokens, "--run.steps", 5, "--run.folder", "tuned", *CONSTANT]
    run("train", *cfg, *words, *QUICK)
    assert sorted(path.name for path in Path("tuned/hf").iterdir()) == ["step4", "step5"]
    _, params, _ = load_parameters("tuned", step=5)
    found = open_directory("tuned/hf/step5")
    for path in found.names:
        assert torch.equal(found.parameter(path), tree.at(params, path).bfloat16().float()), path
    assert not same_bits(weights("tuned/hf/step4"), weights("tuned/hf/step5"))
    assert greedy("tuned/hf/step4", "The") is not None


def test_what_a_killed_export_left_is_removed_and_is_no_directory(source, tokens):
    words = ["train", "--init.from-hf", source, "--data.paths", tokens, "--run.folder", "tuned", "--export.hf-every", 1]
    words += [*CONSTANT, *QUICK]
    run(*words, "--run.steps", 1)
    Path("tuned/hf/.partial-step1-abc").mkdir()
    run("train", "tuned", "--run.steps", 2)
    assert sorted(path.name for path in Path("tuned/hf").iterdir()) == ["step1", "step2"]


# --- runs of our own ------------------------------------------------------------------------------------------


def test_a_run_of_its_own_is_loaded_by_transformers_with_its_own_tokenizer(tokens, source):
    cfg = Config(
        model=dense(32, 2, 4, 48, vocab_size=320, n_kv_heads=2, init_std=0.2),
        data=Data(paths=(tokens,), tokenizer=str(source / "tokenizer.json")),
        recipe=Recipe(batch_size=4, sequence_length=48, compile=False, ema=0.5, dtype="float32"),
        run=Run(folder="own", steps=3, threads=1, sample=""),
    )
    train(replace(cfg, schedule=Cosine(warmup=0)))
    run("convert", "to-hf", "own", "out", "--verify")
    assert greedy("out", "The number") == ours("own", "The number")
    assert json.loads(Path("out/generation_config.json").read_text()) == {"eos_token_id": 0}
    assert AutoTokenizer.from_pretrained("out").eos_token == "<|endoftext|>"
    run("convert", "to-hf", "own", "averaged", "--weights", "ema")
    _, ema, _ = load_parameters("own", weights="ema")
    found = open_directory("averaged")
    assert all(torch.equal(found.parameter(path), tree.at(ema, path)) for path in found.names)
    assert not same_bits(weights("averaged"), weights("out"))
    assert np.isfinite(weights("out")["lm_head.weight"].numpy()).all()


def test_a_model_that_no_architecture_has_is_refused(tokens, capsys):
    model = dense(16, 1, 2, 24, vocab_size=300, clip_qkv=3.0)
    recipe = Recipe(batch_size=4, sequence_length=16, compile=False, dtype="float32")
    cfg = Config(model=model, data=Data(paths=(tokens,)), recipe=recipe, run=Run(folder="own", steps=1, threads=1, sample=""))
    train(replace(cfg, schedule=Cosine(warmup=0)))
    line = refused(capsys, "convert", "to-hf", "own", "out")
    assert (
        "no architecture of transformers computes this model; as Olmo2ForCausalLM it would differ in --model.clip-qkv 3.0"
        in line
    )
    assert not Path("out").exists()
