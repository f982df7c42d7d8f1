"""Runs of a hybrid by the commands: training, going on, generating, exporting, and on ranks that share sequences."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from helpers import same_bits

from olmo_fn.cli import main as cli
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.load import load_model
from olmo_fn.generate.sample import sample
from olmo_fn.models import transformer
from olmo_fn.train.session import load_parameters

FLAGS = """--model.d-model 24 --model.vocab-size 300 --recipe.no-compile --recipe.sequence-length 32 --recipe.batch-size 4
--recipe.dtype float32 --run.threads 1 --run.sample= --run.eval-tokens 500 --run.log-every 1 --schedule.name constant
--schedule.warmup 2"""
SMALL = FLAGS.split()


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """Flags of a small data set."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("The word of the number is x.\ndef f(x):\n    return x\n" * 300)
    words = ["tokenize", str(folder / "text.txt"), "--output", str(folder / "out"), "--tokenizer", "bpe", "--vocab-size", "300"]
    assert cli.main(words) == 0
    return ["--data.paths", f"{folder}/out/part-*.npy", "--data.tokenizer", f"{folder}/out/tokenizer.json"]


def train(tokens, folder, *more, steps=6):
    words = ["train", "olmo-hybrid-tiny", *SMALL, *tokens, "--run.folder", str(folder), "--run.steps", str(steps), *more]
    assert cli.main(words) == 0
    return folder


def parameters(folder):
    return load_parameters(folder)[1]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line and "step" in line]


@pytest.fixture(scope="module")
def run(tokens, tmp_path_factory):
    return train(tokens, tmp_path_factory.mktemp("runs") / "hybrid")


def test_a_run_that_goes_on_has_the_bits_of_one_that_was_not_interrupted(run, tokens, tmp_path):
    """Law 6: matrices by Muon, convolutions and rates by AdamW, all of it state."""
    train(tokens, tmp_path / "half", steps=3)
    assert cli.main(["train", str(tmp_path / "half" / "config.yaml"), "--run.steps", "6"]) == 0
    assert same_bits(parameters(tmp_path / "half"), parameters(run))


def test_documents_and_accumulation(tokens, tmp_path):
    """Law 4 in a run: the same losses in parts, with documents that do not see each other."""
    whole = train(tokens, tmp_path / "whole", "--data.mask-documents", steps=3)
    parts = train(tokens, tmp_path / "parts", "--data.mask-documents", "--recipe.accumulate", "2", steps=3)
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_generating_is_the_forward_pass_token_by_token(run, capsys):
    """Greedy, of prompts of different lengths in one batch; and by the command."""
    model, _ = load_model(run)
    prompts = [[5, 9, 200, 17, 4], [8], [33, 2, 2]]
    rows = zip(*sample(model.cfg, model.params, prompts, Sampling(max_tokens=12, temperature=0)), strict=True)
    for prompt, row in zip(prompts, rows, strict=True):
        ids = list(prompt)
        for token in row:
            logits = transformer.logits(model.cfg, model.params, {"input_ids": torch.tensor([ids])})[0, -1]
            assert token is None or int(logits.argmax()) == token
            if token is None:
                break
            ids.append(token)
    capsys.readouterr()
    assert cli.main(["generate", str(run), "def ", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.startswith("def ")


def test_transformers_computes_the_same(run, tmp_path, capsys):
    assert cli.main(["convert", "to-hf", str(run), str(tmp_path / "hf"), "--verify"]) == 0
    assert "the same model" in capsys.readouterr().out
    assert cli.main(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert same_bits(parameters(tmp_path / "back"), parameters(run))


@pytest.mark.parametrize("mesh", ["--mesh.cp 2", pytest.param("--mesh.dp-shard 2", marks=pytest.mark.slow)])
def test_ranks_share_the_work(run, tokens, tmp_path, mesh):
    shared = train(tokens, tmp_path / "shared", "--nproc", "2", *mesh.split())
    assert losses(shared) == pytest.approx(losses(run), rel=1e-3)


def test_a_mixer_of_every_layer_is_a_flag(tokens, tmp_path, capsys):
    """Also without a pattern; and what does not fit is said in one line."""
    words = ["train", "olmo2-tiny", "--model.mixer.name", "gated-delta", "--model.n-value-heads", "6", *SMALL, *tokens]
    assert cli.main([*words, "--run.folder", str(tmp_path / "run"), "--run.steps", "2"]) == 0
    assert "name: gated-delta" in (tmp_path / "run" / "config.yaml").read_text()
    capsys.readouterr()
    for flags, said in {
        "--model.conv-size 0": "--model.conv-size is 0; it must be at least 1",
        "--model.n-value-heads 4": "--model.n-value-heads 4 is no multiple of --model.n-heads 3",
        "--model.rule fast": "--model.rule 'fast' is unknown; There are auto, chunked, fla",
    }.items():
        assert cli.main([*words, "--dry-run", *flags.split()]) == 2
        assert said in capsys.readouterr().err
    assert cli.main([*words, "--run.folder", str(tmp_path / "fla"), "--model.rule", "fla"]) == 2
    assert "--model.rule fla needs a GPU, and the tensors are on cpu; choose chunked, or auto" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--model.n-heads 4", "--model.dropout 0.1", "--model.mixer.name gated-delta"])
def test_flags_of_one_block_do_not_change_a_pattern_in_silence(flag, capsys):
    assert cli.main(["train", "olmo-hybrid-tiny", *flag.split(), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert re.search(r"error: --model\.\S+: the layers of this model repeat a pattern of 4 blocks", said), said


def test_a_run_that_chose_a_gpus_kernels_is_read_on_a_cpu(run, tmp_path, capsys):
    """Evaluating computes what the run computes, by what there is."""
    text = (run / "config.yaml").read_text()
    assert "rule: auto" in text
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    (copy / "config.yaml").write_text(text.replace("rule: auto", "rule: fla"))
    said = []
    for folder in (run, copy):
        assert cli.main(["evaluate", str(folder), str(Path(__file__))]) == 0
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1]
