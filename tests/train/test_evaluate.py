"""``olmo-fn evaluate``: the loss of a trained model on sets of texts is what the run found, and what the formula says."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import yaml

from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.evaluate import Evaluate, evaluate
from olmo_fn.models.config import dense
from olmo_fn.train.config import Config, Lora, Recipe, Run
from olmo_fn.train.events import Evaluated, Observer
from olmo_fn.train.loop import train
from olmo_fn.train.observers import read_evaluations
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import Constant
from olmo_fn.train.session import open_run

TEXT = "Each event is told once. " * 20


class Kept(Observer):
    def __init__(self):
        self.found = []

    def __call__(self, event):
        if isinstance(event, Evaluated):
            self.found.append(event)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Token files of random bytes and of a text, and a mask for the text."""
    folder, chance = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    chance.integers(1, 250, 3000).astype(np.uint16).tofile(folder / "train.npy")
    for name in ("web", "code"):
        chance.integers(1, 128, 300).astype(np.uint16).tofile(folder / f"{name}.npy")
    (folder / "text.txt").write_text(TEXT)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXT, TEXT[:50])))
    ids = byte_level().encode_documents([TEXT])[0].astype(np.uint16)
    ids.tofile(folder / "text.npy")
    (np.arange(len(ids)) % 2 == 0).tofile(folder / "mask.npy")
    byte_level().save(folder / "tokenizer.json")
    return folder


def trained(folder, name, lora=0, start=""):
    sets = (str(folder / "text.npy"), f"web={folder / 'web.npy'}", f"code={folder / 'code.npy'}")
    tokenizer = str(folder / "tokenizer.json")
    kept = Kept()
    cfg = Config(
        model=dense(8, 2, 2, 12, vocab_size=257, init_method="llama"),
        data=Data((str(folder / "train.npy"),), sets, dtype="uint16", tokenizer=tokenizer, cache_dir=str(folder / "cache")),
        optim=AdamW(lr=0.05),
        schedule=Constant(warmup=0),
        recipe=Recipe(4, 16, compile=False, dtype="float32", ema=0.5),
        lora=Lora(lora, patterns=("*.w_q",)),
        run=Run(
            str(folder / name),
            steps=4,
            eval_every=2,
            checkpoint_every=2,
            threads=1,
            sample="",
            start_from=start,
            eval_tokens=250,
        ),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg, [kept])
    return folder / name, kept.found


@pytest.fixture(scope="module")
def run(folder):
    return trained(folder, "run")


def test_sets_are_events_and_lines(run):
    """use-15: several named sets while training."""
    where, events = run
    assert [(event.step, event.name) for event in events] == [
        (step, name) for step in (2, 4) for name in ("heldout", "web", "code")
    ]
    assert [line["loss"] for line in read_evaluations(where / "metrics.jsonl")] == [event.values["loss"] for event in events]


@pytest.mark.parametrize("kind", ["plain", "lora", "pp"])
def test_the_command_finds_what_the_run_found(kind, run, folder):
    """use-15: to the bit; with adapters merged; of a run whose config divides the work among processes that are not there."""
    where, events = trained(folder, "lora", lora=2, start=str(run[0])) if kind == "lora" else run
    before = (where / "config.yaml").read_text()
    if kind == "pp":
        cfg = yaml.safe_load(before)
        cfg["mesh"] |= {"pp": 2, "dp_shard": 2}
        (where / "config.yaml").write_text(yaml.safe_dump(cfg))
    path, found = evaluate(Evaluate(str(where)))
    (where / "config.yaml").write_text(before)
    assert path.name == "step4"
    assert {name: loss.loss for name, loss in found.items()} == {
        event.name: event.values["loss"] for event in events if event.step == 4
    }


def test_files_are_sets(run, folder):
    """use-15: token files, text and jsonl are the same tokens; a step; names; and the figures are what the formula says."""
    files = (str(folder / "text.npy"), f"x={folder / 'text.txt'}", f"both={folder / 'web.npy'}", f"both={folder / 'code.npy'}")
    _, found = evaluate(Evaluate(str(run[0]), (*files, str(folder / "text.jsonl"))))
    assert [*found] == [files[0], "both", "x", str(folder / "text.jsonl")]
    one = found[files[0]]
    assert one == found["x"]
    assert one.tokens == len(TEXT) + 1
    assert one.bits_per_byte == pytest.approx(one.loss * one.tokens / math.log(2) / len(TEXT), rel=1e-12)
    assert one.perplexity == math.exp(one.loss)
    assert found["both"].tokens == 600
    assert found[str(folder / "text.jsonl")].tokens == len(TEXT) + 52
    _, cut = evaluate(Evaluate(str(run[0]), (files[0],), tokens=250, step=2))
    assert cut[files[0]].loss == next(event.values["loss"] for event in run[1] if (event.step, event.name) == (2, "heldout"))


def test_weights_are_those_that_are_asked_for(run, folder):
    session = open_run(run[0])
    state = session.newest(run[0]).state
    _, found = evaluate(Evaluate(str(run[0]), weights="ema"))
    assert found["web"] == session.evaluate(state, "ema", "web")
    assert found["web"] != session.evaluate(state, "params", "web")


def test_a_label_mask_leaves_predictions_out(run, folder):
    """replay.md: held-out evaluation scored what the mask excludes. Both halves add up to the whole."""
    text, mask = str(folder / "text.npy"), np.fromfile(folder / "mask.npy", bool)
    (~mask).tofile(folder / "other.npy")
    whole, one, other = (
        evaluate(Evaluate(str(run[0]), (text,), masks))[1][text]
        for masks in ((), (str(folder / "mask.npy"),), (str(folder / "other.npy"),))
    )
    assert one.tokens == mask.sum()
    assert one.tokens + other.tokens == whole.tokens
    assert one.loss * one.tokens + other.loss * other.tokens == pytest.approx(whole.loss * whole.tokens, rel=1e-6)
    assert one.bits_per_byte == pytest.approx(one.loss * one.tokens / math.log(2) / mask[:-1].sum())


def test_bytes_are_those_of_the_text(folder, run):
    """reports-18: a tokenizer that changes the text would count its own bytes; those of the text are counted before."""
    (folder / "big.txt").write_text("ÄÖÜ " * 30)
    lower = json.loads((folder / "tokenizer.json").read_text())
    lower["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}]}
    own = shutil.copytree(run[0], folder / "lossy")
    (own / "tokenizer.json").write_text(json.dumps(lower))
    _, found = evaluate(Evaluate(str(own), (f"text={folder / 'big.txt'}",)))
    assert found["text"].tokens == 4 * 30 + 1
    bits = found["text"].loss * found["text"].tokens / math.log(2)
    assert found["text"].bits_per_byte == pytest.approx(bits / (7 * 30))


def test_an_evaluation_can_be_given_up(run):
    """reports-33: between two batches."""
    session, asked = open_run(run[0]), []
    state = session.newest(run[0]).state
    assert session.evaluate(state, given_up=lambda: asked.append(1) or len(asked) > 3) is None
    assert len(asked) == 5


def test_the_command_line(run, folder, capsys):
    files = [f"web={folder / 'web.npy'}", f"text={folder / 'text.txt'}"]
    assert cli.main(["evaluate", str(run[0]), *files]) == 0
    heading, names, *rows = capsys.readouterr().out.splitlines()
    assert heading == str(run[0] / "checkpoints" / "step4")
    assert names.split() == ["set", "tokens", "loss", "perplexity", "bits", "per", "byte"]
    assert [row.split()[0] for row in rows] == ["web", "text"]
    assert cli.main(["evaluate", str(run[0]), *files, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [f"{line['loss']:.4f}" for line in lines] == [row.split()[2] for row in rows]
    assert all(line["perplexity"] == pytest.approx(math.exp(line["loss"])) for line in lines)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{run}", "{folder}/nothing.npy"], "no token file matches"),
        (["{run}", "web={folder}/nothing.txt"], "no such file"),
        (["{run}", "{folder}/text.npy", "--mask-paths", "{folder}/web.npy"], "has 600 entries"),
        (["{run}", "{folder}/text.npy", "--weights", "merge"], "--recipe.merge-last was 0"),
        (["{run}", "{folder}/text.npy", "--step", "3"], "has no checkpoint of step 3; it has 2, 4"),
        (["{run}", "--tokens", "-1"], "--tokens is -1; it must not be negative"),
        (["{folder}", "{folder}/text.npy"], "is no run"),
    ],
)
def test_mistakes(words, message, run, folder, capsys):
    assert cli.main(["evaluate", *(word.format(run=run[0], folder=folder) for word in words)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_no_figure_where_nothing_is_predicted(folder, capsys):
    """reports-19: all of the held-out text that is read is masked."""
    (np.arange(300) > 260).tofile(folder / "nothing.npy")
    cfg = open_run(trained(folder, "first")[0]).cfg
    heldout = {"heldout_paths": (str(folder / "web.npy"),), "heldout_mask_paths": (str(folder / "nothing.npy"),)}
    data = replace(cfg.data, **heldout)
    result = train(replace(cfg, data=data, run=replace(cfg.run, folder=str(folder / "none"))))
    assert result.heldout is None
    said = capsys.readouterr().out
    assert "held-out after" not in said
    assert "none of them is predicted, so there is no loss" in said
    assert cli.main(["evaluate", str(folder / "none")]) == 2
    assert "nothing is predicted" in capsys.readouterr().err
