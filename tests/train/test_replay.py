"""A short real run on text with a garbage document in it: the replay finds the step, and the document."""

import contextlib
import io
import json
import random
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from olmo_fn import tree
from olmo_fn.checkpoint import load, steps
from olmo_fn.cli import main as cli
from olmo_fn.core.chain import IGNORE
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.data.settings import Data
from olmo_fn.data.shuffle import shuffled
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.models.config import dense
from olmo_fn.replay.replay import largest_spike, replay
from olmo_fn.research import outliers
from olmo_fn.train.config import Config, Growth, Lora, Recipe, Run
from olmo_fn.train.folder import write_config
from olmo_fn.train.loop import train
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.optimizers import AdamW, ScheduleFree
from olmo_fn.train.schedules import Constant
from olmo_fn.transforms.lora import lora_loss


def main(words):
    """``olmo-fn replay``."""
    return cli.main(["replay", *map(str, words)])


ROOT = Path(__file__).parents[2]
ROWS, LENGTH, STEPS, SPIKE, ROW = 4, 64, 60, 47, 2  # the garbage is row ROW of step SPIKE
SEED = Data().order_seed


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run of 60 steps, checkpoints every 20."""
    folder = tmp_path_factory.mktemp("spike")
    text = Path(textwrap.__file__).read_text() * 4
    ids = np.array(byte_level().encode(text), np.uint16)[: STEPS * ROWS * LENGTH]
    assert len(ids) == STEPS * ROWS * LENGTH
    window = int(shuffled((SPIKE - 1) * ROWS, ROWS, STEPS * ROWS, ROWS, SEED, "keyed")[ROW])
    garbage = bytes(random.Random(0).choices(b"~^`\\|@#$%&", k=LENGTH))
    ids[window * LENGTH : (window + 1) * LENGTH] = list(garbage)
    ids.tofile(folder / "tokens.npy")
    byte_level().save(folder / "tokenizer.json")
    cfg = Config(
        model=dense(16, 1, 2, 32, vocab_size=257, init_method="llama"),
        data=Data(
            paths=(str(folder / "tokens.npy"),),
            heldout_fraction=0,
            dtype="uint16",
            tokenizer=str(folder / "tokenizer.json"),
            cache_dir=str(folder / "cache"),
        ),
        optim=AdamW(lr=3e-2),
        schedule=Constant(warmup=5),
        recipe=Recipe(ROWS, LENGTH, compile=False, accumulate=2, ema=0.9, dtype="float32", skip_sigma=0),
        run=Run(folder=str(folder / "run"), steps=STEPS, checkpoint_every=20, threads=1, sample=""),
    )
    with contextlib.redirect_stdout(io.StringIO()):
        train(cfg)
    return folder / "run", window, garbage.decode()


def again(run, tmp_path, **changes):
    """The same run, shorter and of another config: its folder, and what metrics.jsonl says."""
    cfg = replay(run[0], 1).cfg
    recipe = replace(cfg.recipe, accumulate=1, ema=0.0, **changes.pop("recipe", {}))
    where = replace(cfg.run, folder=str(tmp_path / "again"), steps=12, checkpoint_every=10)
    with contextlib.redirect_stdout(io.StringIO()):
        train(replace(cfg, recipe=recipe, run=where, **changes))
    return tmp_path / "again", {line["step"]: line for line in read_metrics(tmp_path / "again" / "metrics.jsonl")}


def each_row(found, loss, trained=("*",)):
    """Loss a token, and gradient norm for the trained leaves, of each row of a replayed step, by torch.func."""
    tokens = (found.batch["labels"] != IGNORE).sum()
    params, frozen = tree.partition(found.params, trained)

    def mean(params, row):
        return loss(tree.combine(params, frozen) if frozen else params, row)[0] / tokens

    rows = [{name: value[i : i + 1] for name, value in found.batch.items()} for i in range(len(found.batch["labels"]))]
    found = [torch.func.grad_and_value(mean)(params, row) for row in rows]
    counts = [(row["labels"] != IGNORE).sum() for row in rows]
    losses = [float(value * tokens / count) for (_, value), count in zip(found, counts, strict=True)]
    return losses, [float(sum(g.square().sum() for _, g in tree.items(grads)) ** 0.5) for grads, _ in found]


def mean_loss(found):
    return sum(s.loss * s.tokens for s in found.sequences) / sum(s.tokens for s in found.sequences)


def copy(run, tmp_path):
    return Path(shutil.copytree(run[0], tmp_path / "copy"))


def test_the_culprit_is_found(run):
    folder, window, garbage = run
    assert largest_spike(folder) == SPIKE
    found = replay(folder, SPIKE)
    assert (found.start, found.checkpoint.name, found.differences) == (40, "step40", ())
    worst = found.sequences[0]
    assert (worst.row, worst.text, worst.offset) == (ROW, garbage, window * LENGTH)
    assert worst.loss > 1.5 * found.sequences[1].loss
    norms = sorted(found.sequences, key=lambda s: s.row)
    assert outliers(torch.tensor([s.grad_norm for s in norms]), sigma=3.0) == [ROW]
    total = sum(s.loss * s.tokens for s in found.sequences) / sum(s.tokens for s in found.sequences)
    assert total == pytest.approx(found.metrics["loss"], rel=1e-5)


def test_the_replayed_state_is_the_checkpoint(run):
    found = replay(run[0], 60)
    saved, _ = load(run[0] / "checkpoints" / "step60")
    assert found.start == 40
    got = tree.flatten({"params": found.state.params, "slots": found.state.slots})
    for path, value in tree.items({"params": saved["params"], "slots": saved["slots"]}):
        assert torch.equal(got[path], value), path
    before = replay(run[0], 41)
    forty, _ = load(run[0] / "checkpoints" / "step40")
    assert all(torch.equal(p, tree.at(forty["params"], path)) for path, p in tree.items(before.params))


def test_the_step_without_the_culprit(run):
    """What one asks next: the same step with that row masked."""
    found = replay(run[0], SPIKE)
    grads = pipe(found.cfg.loss.build(found.cfg.model), grad())
    labels = found.batch["labels"].clone()
    labels[ROW] = IGNORE
    _, without = grads(found.params, {**found.batch, "labels": labels})
    neighbours = [line["loss"] for line in read_metrics(run[0] / "metrics.jsonl") if abs(line["step"] - SPIKE) in (1, 2)]
    assert float(without["loss"]) < max(neighbours) + 0.3 < found.metrics["loss"]


def test_without_checkpoints_it_begins_at_the_initial_weights(run, tmp_path):
    folder = copy(run, tmp_path)
    shutil.rmtree(folder / "checkpoints")
    found = replay(folder, 12)
    assert (found.start, found.checkpoint, found.differences) == (0, None, ())


def test_a_broken_checkpoint_is_passed_over(run, tmp_path):
    folder = copy(run, tmp_path)
    file = next((folder / "checkpoints" / "step40").glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    said = []
    found = replay(folder, SPIKE, said.append)
    assert (found.start, found.differences) == (20, ())
    assert len(said) == 1
    assert "step40" in said[0]


def test_a_changed_bit_of_the_data_is_seen(run, tmp_path):
    """The replay is compared with the record: another batch, even of a step in between, is not passed off as the old one."""
    folder = copy(run, tmp_path)
    cfg = replay(folder, 1).cfg
    ids = np.fromfile(cfg.data.paths[0], np.uint16)
    changed = int(shuffled((43 - 1) * ROWS, ROWS, STEPS * ROWS, ROWS, SEED, "keyed")[0])
    ids[changed * LENGTH + 10] ^= 1
    ids.tofile(tmp_path / "changed.npy")
    write_config(replace(cfg, data=replace(cfg.data, paths=(str(tmp_path / "changed.npy"),))), folder)
    assert replay(folder, 42).differences == ()
    assert replay(folder, 43).differences[0].startswith("step 43: loss is ")
    assert main([str(folder), "--step", "43"]) == 1


def test_the_command(run, capsys):
    folder, window, garbage = run
    assert main([str(folder), "--texts", "1"]) == 0
    out = capsys.readouterr().out
    assert f"replayed 7 steps from {folder}/checkpoints/step40: equal to metrics.jsonl, bit for bit (loss, ce" in out
    assert out.split("tokens  from\n")[1].startswith(f"  {ROW} ")  # the worst comes first
    assert out.count("  | ") == 1
    assert f"row {ROW}:\n  | {garbage}" in out
    assert f"tokens.npy at token {window * LENGTH:,}" in out
    assert main([str(folder), "--step", "3", "--chars", "5", "--texts", "4"]) == 0
    assert "the initial weights: equal" in capsys.readouterr().out


WRONG = {
    "no run": (lambda d: main([str(d / "gone")]), "gone' is not there; there are"),
    "a later step": (lambda d: main([str(d), "--step", "61"]), r"has no step 61; it has steps 1 to 60"),
    "step 0": (lambda d: main([str(d), "--step", "0"]), r"has no step 0; it has steps 1 to 60"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(run, capsys, name):
    call, message = WRONG[name]
    assert call(run[0]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert message in err


def test_a_run_that_began_elsewhere_needs_a_checkpoint(run, tmp_path, capsys):
    folder = copy(run, tmp_path)
    cfg = replay(folder, 1).cfg
    write_config(replace(cfg, run=replace(cfg.run, start_from="/elsewhere")), folder)
    assert steps(folder / "checkpoints") == [20, 40, 60]
    assert main([str(folder), "--step", "5"]) == 2
    assert "no whole checkpoint before step 5 (there are 20, 40, 60), and it began from /elsewhere" in capsys.readouterr().err
    assert replay(folder, 25).differences == ()


def test_too_few_steps_for_a_spike(run, tmp_path, capsys):
    folder = copy(run, tmp_path)
    lines = (folder / "metrics.jsonl").read_text().splitlines()[:5]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    assert main([str(folder)]) == 2
    assert "5 steps, too few to look for a spike; name one with --step" in capsys.readouterr().err
    (folder / "metrics.jsonl").unlink()
    assert main([str(folder), "--step", "5"]) == 2
    assert "it has no steps" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_the_spike(run, tmp_path):
    folder = copy(run, tmp_path)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[29]["loss"] = float("nan")
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert largest_spike(folder) == 30


def test_help_needs_no_torch():
    code = "import sys; from olmo_fn.cli.main import main\ntry: main(['replay', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert found.returncode == 0, found.stderr
    assert "--step" in found.stdout


@pytest.mark.slow
def test_a_compiled_run_is_replayed_bit_for_bit(run, tmp_path):
    cfg = replay(run[0], 1).cfg
    recipe = replace(cfg.recipe, compile=True)
    where = replace(cfg.run, folder=str(tmp_path / "run"), steps=8, checkpoint_every=3)
    with contextlib.redirect_stdout(io.StringIO()):
        train(replace(cfg, recipe=recipe, run=where))
    found = replay(tmp_path / "run", 8)
    assert (found.start, found.differences) == (6, ())


# --- what replay once got wrong: each of these printed other numbers than the run's ------------------------------------


@pytest.mark.parametrize("truncate", [False, True])
def test_a_growing_run(run, tmp_path, truncate):
    """Batch and length are those of the step; the rows are pieces of windows, named by their own offsets."""
    growth = Growth((2,), until=(4,), min_length=16, length_multiple=16, length_steps=8, truncate=truncate)
    folder, lines = again(run, tmp_path, growth=growth)
    tokens = np.fromfile(replay(run[0], 1).cfg.data.paths[0], np.uint16)
    shapes = {}
    for step in (1, 6, 12):
        found = replay(folder, step)
        assert found.differences == ()
        assert found.metrics["loss"] == lines[step]["loss"]
        assert mean_loss(found) == pytest.approx(lines[step]["loss"], rel=1e-5)
        for s in found.sequences:
            assert np.array_equal(tokens[s.offset : s.offset + len(s.ids)], s.ids)
        shapes[step] = tuple(found.batch["input_ids"].shape)
    assert shapes == {1: (2, 16) if truncate else (8, 16), 6: (4, 32) if truncate else (8, 32), 12: (4, 64)}


@pytest.mark.parametrize("step", [11, 5])
def test_adapters(run, tmp_path, step):
    """From a checkpoint and from the initial weights: losses of the adapted model, gradients of the adapters alone."""
    folder, lines = again(run, tmp_path, lora=Lora(4, alpha=16.0))
    found = replay(folder, step)
    assert found.differences == ()
    assert (found.start, found.checkpoint) == ((10, folder / "checkpoints" / "step10") if step > 10 else (0, None))
    loss = lora_loss(found.cfg.loss.build(found.cfg.model), 16.0)
    losses, norms = each_row(found, loss, ["lora.*"])
    rows = sorted(found.sequences, key=lambda s: s.row)
    assert [s.loss for s in rows] == pytest.approx(losses, rel=1e-5)
    assert [s.grad_norm for s in rows] == pytest.approx(norms, rel=1e-4)
    assert mean_loss(found) == pytest.approx(lines[step]["loss"], rel=1e-5)


def test_frozen_parameters_pull_at_nothing(run, tmp_path):
    folder, _ = again(run, tmp_path, recipe={"freeze": ("embed", "head*")})
    found = replay(folder, 3)
    loss = found.cfg.loss.build(found.cfg.model)
    trained = [path for path, _ in tree.items(found.params) if not path.startswith(("embed", "head"))]
    rows = sorted(found.sequences, key=lambda s: s.row)
    assert [s.grad_norm for s in rows] == pytest.approx(each_row(found, loss, trained)[1], rel=1e-4)


@pytest.mark.parametrize("step", [2, 11])
def test_normalized_weights(run, tmp_path, step):
    """From the initial weights too, which are normalized."""
    folder, lines = again(run, tmp_path, recipe={"normalize": True})
    found = replay(folder, step)
    assert found.differences == ()
    assert found.metrics["grad_norm"] == lines[step]["grad_norm"]


def test_schedule_free(run, tmp_path):
    """The rows are taken where the step takes its gradient, between its two sequences of weights."""
    folder, lines = again(run, tmp_path, optim=ScheduleFree(lr=3e-2))
    found = replay(folder, 12)
    assert found.differences == ()
    assert mean_loss(found) == pytest.approx(lines[12]["loss"], rel=1e-5)
    losses, _ = each_row(found, found.cfg.loss.build(found.cfg.model))
    assert np.mean(losses) != pytest.approx(lines[12]["loss"], rel=1e-3), "at the parameters it is another loss"
