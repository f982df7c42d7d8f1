"""Whole runs: killed and gone on with, stopped, resumed, refused; and what they leave in their folder."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import ROOT, context, python

from olmo_fn import tree
from olmo_fn.checkpoint import load, newest_whole, steps
from olmo_fn.core.compile import compile, has_compiler, prepare_cache
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.data.settings import Data
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import Cosine

SAME = ("step", "loss", "ce", "z", "grad_norm", "lr", "skipped", "tokens")


def run_of(folder, tokens, **run):
    """A run of a very small model; eager, so that it starts at once."""
    return Config(
        model=dense(16, 1, 2, 32, vocab_size=64, window_pattern=(4,), last_layer_full=False),
        data=Data(paths=(str(tokens),), heldout_fraction=0, dtype="uint8", cache_dir=str(folder.parent / "cache")),
        optim=AdamW(lr=1e-2),
        schedule=Cosine(warmup=3),
        recipe=Recipe(batch_size=4, sequence_length=16, compile=False, ema=0.9, accumulate=2, dtype="float32"),
        run=Run(folder=str(folder), steps=60, checkpoint_every=5, threads=1, sample="", **run),
    )


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(1, 64, 20_000, dtype=np.uint8).tofile(path)
    return path


def work(cfg):
    """What a training process does; in a process of its own it may be killed."""
    from olmo_fn.train.loop import train

    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    train(cfg)


def start(cfg):
    process = context.Process(target=work, args=(cfg,))
    process.start()
    return process


def finish(cfg):
    process = start(cfg)
    process.join(240)
    assert process.exitcode == 0


def kill_at(cfg, step, delay):
    """Start the run, and kill -9 it ``delay`` seconds after it has written the metrics of ``step``."""
    process = start(cfg)
    path = Path(cfg.run.folder) / "metrics.jsonl"
    end = time.monotonic() + 120
    while process.is_alive() and time.monotonic() < end:
        if (read_metrics(path) or [{"step": -1}])[-1]["step"] >= step:
            time.sleep(delay)
            process.kill()
            break
        time.sleep(0.002)
    process.join(60)
    return process.exitcode


def outcome(folder):
    """All that a run computed: its last state, and the metrics that do not tell the time."""
    path = newest_whole(folder / "checkpoints")
    state, _ = load(path)
    return tree.flatten(state), [{k: line[k] for k in SAME} for line in read_metrics(folder / "metrics.jsonl")]


def assert_same_outcome(a, b):
    (state, lines), (other, other_lines) = outcome(a), outcome(b)
    assert lines == other_lines
    assert state.keys() == other.keys()
    for path in state:
        assert torch.equal(state[path], other[path]), path


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_many_times_is_bitwise_the_same(tmp_path, tokens, kills):
    """Law 6 with real processes and kill -9."""
    finish(run_of(tmp_path / "whole", tokens))
    cfg = run_of(tmp_path / "killed", tokens)
    chance = random.Random(0)
    targets = sorted(chance.sample(range(1, 58), kills))
    codes = [kill_at(cfg, step, chance.random() * 0.02) for step in targets]
    assert codes.count(-signal.SIGKILL) >= kills - 2  # one may reach its end first
    finish(cfg)
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")
    assert [line["step"] for line in read_metrics(tmp_path / "killed" / "metrics.jsonl")] == list(range(1, 61))


def steps_of_one_kernel(cache, out):
    """Three compiled steps of a model of one parameter: its update is all that is compiled."""

    def loss(params, batch):
        return ((params["w"] - 0.3) ** 2).sum() * batch["x"].sum(), {}

    step = pipe(loss, grad("func"), adamw(1e-2), compile(cache))
    state = step.init({"w": torch.linspace(0.0, 1.0, 40)})
    for _ in range(3):
        state, _ = step(state, {"x": torch.ones(4, 1), "labels": torch.zeros(4, 1, dtype=torch.int64)})
    out.write_text(str(state.params["w"].tolist()))


@pytest.mark.slow
def test_killed_while_compiling(tmp_path):
    """A half-written library in the compile cache does not break the next start, and is made anew."""
    cache, out, whole = tmp_path / "compiled", tmp_path / "out", tmp_path / "whole"
    process = context.Process(target=steps_of_one_kernel, args=(cache, out))
    process.start()
    end = time.monotonic() + 200
    while not list(cache.rglob("*.cpp")) and process.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    process.kill()
    process.join(60)
    assert not out.exists(), "it was killed in time"
    sources = list(cache.rglob("*.cpp"))
    assert sources
    for source in sources:
        source.with_suffix(".so").write_bytes(b"\x7fELF half of it")
    for path in (out, whole):
        process = context.Process(target=steps_of_one_kernel, args=(cache if path is out else tmp_path / "other", path))
        process.start()
        process.join(120)
        assert process.exitcode == 0
    assert out.read_text() == whole.read_text()


@pytest.mark.skipif(not has_compiler(), reason="without a compiler there is no library to leave broken")
def test_prepare_cache_drops_only_what_is_broken(tmp_path):
    whole = tmp_path / "good.so"
    compiler = [os.environ.get("CXX", "c++"), "-shared", "-x", "c++", "-", "-o", str(whole)]
    subprocess.run(compiler, input=b"int one() { return 1; }", check=True)
    (tmp_path / "cut.so").write_bytes(whole.read_bytes()[:-1])
    (tmp_path / "empty.so").write_bytes(b"")
    (tmp_path / "a.lock").write_bytes(b"")
    broken = prepare_cache(tmp_path)
    assert sorted(p.name for p in broken) == ["cut.so", "empty.so"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a.lock", "good.so"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, tokens, caplog):
    cfg = run_of(tmp_path / "run", tokens)
    finish(cfg)
    expected = outcome(tmp_path / "run")
    newest = tmp_path / "run" / "checkpoints" / "step60"
    file = next(newest.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    assert newest_whole(tmp_path / "run" / "checkpoints").name == "step55"
    assert re.search(r"step60.*(params|slots)\.", caplog.text)
    finish(replace(cfg, run=replace(cfg.run, resume=True)))
    assert outcome(tmp_path / "run")[1] == expected[1]


@pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
def test_a_signal_finishes_the_step_and_saves(tmp_path, tokens, number):
    finish(run_of(tmp_path / "whole", tokens))
    cfg = run_of(tmp_path / "run", tokens)
    (tmp_path / "run").mkdir()
    from olmo_fn.train.serialize import to_yaml

    (tmp_path / "run" / "config.yaml").write_text(to_yaml(cfg))
    process = subprocess.Popen(
        [sys.executable, "train.py", str(tmp_path / "run" / "config.yaml"), "--run.steps", "60"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not read_metrics(tmp_path / "run" / "metrics.jsonl"):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.fail("the run ended before the signal reached it")
    assert process.returncode == 128 + number
    done = read_metrics(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert steps(tmp_path / "run" / "checkpoints")[-1] == done
    assert f"after step {done} of 60" in out
    assert f"python train.py {tmp_path}/run/config.yaml" in out
    finish(cfg)
    assert_same_outcome(tmp_path / "whole", tmp_path / "run")


def test_retention_and_start_from(tmp_path, tokens):
    cfg = run_of(tmp_path / "first", tokens, keep_last=2, keep_every=20)
    finish(cfg)
    assert steps(tmp_path / "first" / "checkpoints") == [20, 40, 55, 60]
    more = run_of(tmp_path / "second", tokens, start_from=str(tmp_path / "first"))
    finish(replace(more, run=replace(more.run, steps=65)))
    lines = read_metrics(tmp_path / "second" / "metrics.jsonl")
    assert [line["step"] for line in lines] == [61, 62, 63, 64, 65]


# --- the command line -------------------------------------------------------------------------------------------------


def cli(*arguments):
    return python("train.py", *arguments)


def tiny(tokens, folder, *more):
    flags = {
        "data.paths": tokens, "data.dtype": "uint8", "data.heldout-fraction": 0.05, "model.d-model": 16, "model.n-layers": 1,
        "model.n-heads": 2, "model.hidden-size": 32, "model.vocab-size": 64, "recipe.batch-size": 4,
        "recipe.sequence-length": 16, "run.steps": 6, "schedule.warmup": 2, "optim.lr": 0.006,
        "run.folder": folder, "run.threads": 1,
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return ("olmo2-tiny", *given, "--recipe.no-compile", *more)


def test_a_run_from_the_command_line(tmp_path, tokens):
    folder = tmp_path / "run"
    command = [sys.executable, "train.py", *map(str, tiny(tokens, folder))]
    first = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert first.returncode == 0, first.stderr
    assert "step 6/6  loss" in first.stdout
    assert "held-out after step 6" in first.stdout
    assert f"python train.py {folder}/config.yaml" in first.stdout
    names = {path.name for path in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "checkpoints", "loss.png"} <= names
    line = read_metrics(folder / "metrics.jsonl")[-1]
    assert {"step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "mfu", "peak_mb"} <= line.keys()
    again = cli(folder / "config.yaml", "--run.folder", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert outcome(folder)[1] == outcome(tmp_path / "again")[1]


WRONG = {
    "unknown preset": (lambda t, d: ("olmo9-1b",), "olmo9-1b"),
    "unknown flag": (lambda t, d: tiny(t, d, "--optim.learning-rate", "1"), "optim.learning-rate"),
    "heads": (lambda t, d: tiny(t, d, "--model.n-heads", 3), "--model.n-heads 3 does not divide --model.d-model 16"),
    "vocabulary": (lambda t, d: tiny(t, d, "--model.vocab-size", 40), r"tokens\.npy.*\b(4|5|6)\d\b"),
    "missing file": (lambda t, d: tiny(f"{t}.gone", d), "gone"),
    "long sequence": (lambda t, d: tiny(t, d, "--recipe.sequence-length", 30000), "30,000 is longer"),
    "odd size": (lambda t, d: tiny(odd(t), d, "--data.dtype", "uint16"), "odd.npy"),
    "empty file": (lambda t, d: tiny(empty(t), d), "empty"),
    "warm-up": (lambda t, d: tiny(t, d, "--schedule.warmup", 99), "warmup 99 is longer than the whole schedule of 6"),
    "accumulate": (lambda t, d: tiny(t, d, "--recipe.accumulate", 3), "accumulate"),
    "remat": (lambda t, d: tiny(t, d, "--recipe.remat", "sometimes"), "remat 'sometimes' is unknown"),
    "device": (lambda t, d: tiny(t, d, "--run.device", "cuda"), "cannot be used here"),
    "no such config": (lambda t, d: (d / "config.yaml",), "is not there"),
    "start from nothing": (lambda t, d: tiny(t, d, "--run.start-from", d / "x"), "no whole checkpoint"),
}


def odd(tokens):
    path = tokens.parent / "odd.npy"
    path.write_bytes(b"abc")
    return path


def empty(tokens):
    path = tokens.parent / "empty.npy"
    path.write_bytes(b"")
    return path


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, tokens, name):
    arguments, message = WRONG[name]
    found = cli(*arguments(tokens, tmp_path / "run"))
    assert found.returncode == 2
    assert re.search(message, found.stderr), found.stderr
    assert "Traceback" not in found.stderr
    if found.stderr.startswith("error: "):
        assert found.stderr.count("\n") == 1
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_folder_of_another_config_is_refused(tmp_path, tokens):
    folder = tmp_path / "run"
    assert cli(*tiny(tokens, folder)).returncode == 0
    before = (folder / "config.yaml").read_text()
    found = cli(*tiny(tokens, folder, "--optim.lr", 0.5))
    assert found.returncode == 2
    assert "--optim.lr was 0.006, is 0.5" in found.stderr
    assert (folder / "config.yaml").read_text() == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    found = cli(*tiny(tokens, tmp_path / "other"))
    assert found.returncode == 2
    assert "is no run folder" in found.stderr


@pytest.mark.slow
def test_a_full_disk_while_saving(tmp_path, tokens):
    """RLIMIT_FSIZE stands for the full disk: one line, exit code 2, and the older checkpoint whole."""
    folder = tmp_path / "run"
    assert cli(*tiny(tokens, folder)).returncode == 0
    limit = "import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += f"sys.argv = ['train.py', {str(folder / 'config.yaml')!r}, '--run.steps', '9', '--run.start-from', "
    limit += f"{str(folder)!r}, '--run.folder', {str(tmp_path / 'more')!r}]; runpy.run_path('train.py', run_name='__main__')"
    found = subprocess.run([sys.executable, "-c", limit], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert found.returncode == 2, found.stderr
    assert "Traceback" not in found.stderr
    assert steps(tmp_path / "more" / "checkpoints") == []
    assert newest_whole(folder / "checkpoints").name == "step6"


def test_help_names_every_preset_and_imports_no_torch():
    import configs

    found = cli("--help")
    assert found.returncode == 0
    assert all(name in found.stdout for name in configs.CONFIGS)
    code = "import sys, train; sys.argv = ['train.py', '--help']\n"
    code += "try: train.main(['--help'])\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0


def test_dry_run_of_the_largest(tmp_path):
    found = cli("olmo2-32b", "--dry-run", "--run.folder", tmp_path / "run")
    assert found.returncode == 0, found.stderr
    assert "32,234,279,936" in found.stdout
    assert not (tmp_path / "run").exists()
