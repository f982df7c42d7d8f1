"""Whole runs of several processes: the same as one process, on any mesh; resumed on another; stopped, killed, refused."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from programs import ROOT, python

from olmo_fn import tree
from olmo_fn.checkpoint import load, newest_whole, steps
from olmo_fn.train.observers import read_metrics

FLAGS = shlex.split("""
--model.d-model 16 --model.n-layers 2 --model.n-heads 2 --model.hidden-size 24 --model.vocab-size 64
--recipe.batch-size 8 --recipe.sequence-length 16 --recipe.no-compile --recipe.dtype float32 --recipe.ema 0.9
--run.steps 8 --run.checkpoint-every 4 --run.sample= --run.threads 1 --schedule.warmup 2 --optim.lr 1e-2
""")


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(1, 64, 20_000, dtype=np.uint8).tofile(path)
    return path


def command(folder, tokens, *more):
    data = ["--data.paths", str(tokens), "--data.dtype", "uint8", "--data.cache-dir", str(folder.parent / "cache")]
    train = [sys.executable, str(ROOT / "train.py"), "olmo2-1m"]
    return [*train, *FLAGS, *data, "--run.folder", str(folder), *more]


def run(folder, tokens, *more, code=0):
    done = python(*command(folder, tokens, *more)[1:])
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def outcome(folder):
    state, _ = load(newest_whole(folder / "checkpoints"))
    return tree.flatten(state), [line["loss"] for line in read_metrics(folder / "metrics.jsonl")]


def assert_same(folder, other):
    (state, losses), (other_state, other_losses) = outcome(folder), outcome(other)
    assert len(losses) == 8
    assert losses == pytest.approx(other_losses, rel=1e-5)
    assert state.keys() == other_state.keys()
    for path, value in state.items():
        torch.testing.assert_close(value, other_state[path], rtol=1e-3, atol=1e-5, msg=lambda m, p=path: f"{p}: {m}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory, tokens):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder, tokens)
    return folder


@pytest.mark.parametrize(
    "mesh",
    [
        "--mesh.dp-shard 2",
        pytest.param("--mesh.dp-replicate 2 --mesh.dp-shard 1", marks=pytest.mark.slow),
        pytest.param("--mesh.tp 2", marks=pytest.mark.slow),
        pytest.param("--mesh.pp 2", marks=pytest.mark.slow),  # below, after another mesh
        pytest.param("--mesh.cp 2 --mesh.cp-method ring", marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_the_same_model(tmp_path, tokens, alone, mesh):
    said = run(tmp_path / "run", tokens, "--nproc", "2", *mesh.split())
    assert "2 processes: " in said
    assert "step 8/8" in said
    assert said.count("step 8/8") == 1, "one process speaks"
    assert_same(tmp_path / "run", alone)


def test_a_run_goes_on_on_another_mesh(tmp_path, tokens, alone):
    """Four processes with parameters in both dims; then, from its middle, a pipeline of two; then one process."""
    run(tmp_path / "run", tokens, "--nproc", "4", "--mesh.tp", "2")
    for mesh in (["--nproc", "2", "--mesh.pp", "2"], []):
        newest = tmp_path / "run" / "checkpoints" / "step8"
        (newest).rename(tmp_path / f"before{len(mesh)}")
        assert "going on from " in run(tmp_path / "run", tokens, *mesh)
        assert steps(tmp_path / "run" / "checkpoints") == [4, 8]
        assert_same(tmp_path / "run", alone)


def test_a_signal_stops_all_ranks_at_the_same_step(tmp_path, tokens, alone):
    folder, more = tmp_path / "run", ["--nproc", "2", "--run.steps", "8"]
    process = subprocess.Popen(command(folder, tokens, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not read_metrics(folder / "metrics.jsonl") and time.monotonic() < end:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    if process.returncode:  # or it had reached its end
        assert process.returncode == 128 + signal.SIGTERM, said
        assert re.search(r"stopped by SIGTERM after step \d of 8; the state is saved", said)
    run(folder, tokens, *more)
    assert_same(folder, alone)


def test_a_rank_that_dies_ends_the_job_and_is_named(tmp_path, tokens, alone):
    folder = tmp_path / "run"
    more = ["--nproc", "2", "--run.checkpoint-every", "1"]
    process = subprocess.Popen(command(folder, tokens, *more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 120
    while not steps(folder / "checkpoints") and time.monotonic() < end:
        time.sleep(0.005)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    killed = time.monotonic()
    said, _ = process.communicate(timeout=60)
    if process.returncode:
        assert time.monotonic() - killed < 15
        assert re.search(r"rank 1 .*SIGKILL", said), said
    run(folder, tokens, *more)
    assert_same(folder, alone)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--nproc 2 --mesh.tp 3", "--mesh.tp 3 does not divide the 2 processes"),
        ("--mesh.tp 2", "--mesh.tp 2 does not divide the 1 processes"),
        ("--nproc 4 --mesh.tp 4", "--model.n-heads 2"),
        ("--nproc 3", "--recipe.batch-size 8"),
        ("--nproc 2 --schedule.warmup 100", "warmup 100 is longer than the whole schedule of 8"),
        ("--nproc 2 --mesh.pp 2 --mesh.pp-microbatches 3", "--mesh.pp-microbatches 3 does not divide the 8 sequences"),
    ],
)
def test_an_impossible_mesh_is_refused_in_one_line(tmp_path, tokens, more, message):
    said = run(tmp_path / "run", tokens, *more.split(), code=2)
    line = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(line) == 1, said
    assert message in line[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
