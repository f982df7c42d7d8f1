"""Runs in bad surroundings: two at a time, other data, signals, no disk, no reader, no finite loss. Each id names its case."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import json
import math
import os
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import context

from olmo_fn import tree
from olmo_fn.checkpoint import SaveFailed, background, load, read_index, save, steps
from olmo_fn.data import identity
from olmo_fn.data.settings import Data
from olmo_fn.data.tokenizer import byte_level, train_bpe
from olmo_fn.models.config import dense
from olmo_fn.plot import PlotRangeTest, draw_range_test
from olmo_fn.replay.replay import largest_spike, replay
from olmo_fn.train import loop, machine
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.events import Evaluated, Failure, Observer, Said, Saved, Started, Stepped, Stopped
from olmo_fn.train.folder import held, read_config
from olmo_fn.train.loop import FAILURE, NOT_FINITE, SIGNAL, Stop, events, train
from olmo_fn.train.observers import Jsonl, fan_out, read_metrics
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import WSD, Constant, Cosine, RangeTest
from olmo_fn.train.session import open_run

SAME = ("step", "loss", "grad_norm", "lr", "skipped", "tokens")


@pytest.fixture(autouse=True)
def _no_third_of_a_second_a_run(monkeypatch):
    """How fast the machine multiplies is measured at each start; it is not what these tests look at."""
    monkeypatch.setattr(machine, "gemm_rate", lambda *args: 1e12)


@pytest.fixture
def cfg(tmp_path):
    """A run of 8 steps that is saved every 2, on ids of bytes, with a tokenizer."""
    tokens(tmp_path / "tokens.npy")
    byte_level().save(tmp_path / "tokenizer.json")
    return Config(
        model=dense(8, 1, 2, 12, vocab_size=257),
        data=Data((str(tmp_path / "tokens.npy"),), heldout_fraction=0, dtype="uint16", cache_dir=str(tmp_path / "cache")),
        optim=AdamW(lr=1e-2),
        schedule=Constant(warmup=0),
        recipe=Recipe(2, 16, compile=False, dtype="float32"),
        run=Run(str(tmp_path / "run"), steps=8, checkpoint_every=2, threads=1, sample="", device="cpu"),
    )


def tokens(path, seed=0, count=4000, dtype="<u2"):
    np.random.default_rng(seed).integers(1, 250, count).astype(dtype).tofile(path)
    return str(path)


def with_run(cfg, **settings):
    return replace(cfg, run=replace(cfg.run, **settings))


def with_data(cfg, **settings):
    return replace(cfg, data=replace(cfg.data, **settings))


def go(cfg, *observers):
    """Train, quietly; the result, and what was said."""
    seen = Seen()
    with contextlib.redirect_stdout(io.StringIO()):
        result = train(cfg, [seen, *observers])
    return result, seen


class Seen(Observer):
    """Keeps all events; ``at`` says what to do after a step."""

    def __init__(self, at=None):
        self.events, self.at = [], at or {}

    def __call__(self, event):
        self.events.append(event)
        return self.at[event.step]() if isinstance(event, Stepped) and event.step in self.at else None

    @property
    def said(self):
        return [event.text for event in self.events if isinstance(event, Said)]


def outcome(cfg):
    """The weights at the end of a run, and its metrics but for times."""
    folder = Path(cfg.run.folder)
    state, _ = load(folder / "checkpoints" / f"step{cfg.run.steps}")
    return tree.flatten(state), [[line[name] for name in SAME] for line in read_metrics(folder / "metrics.jsonl")]


def same_outcome(a, b):
    (state, lines), (other, others) = outcome(a), outcome(b)
    assert lines == others
    assert all(torch.equal(state[path], other[path]) for path in state.keys() | other.keys())


def back_to(cfg, step):
    """As if the run had been killed after this step's checkpoint."""
    for later in steps(folder := Path(cfg.run.folder) / "checkpoints"):
        if later > step:
            shutil.rmtree(folder / f"step{later}")


def listing(folder):
    return {path.name: path.stat().st_mtime_ns for path in Path(folder).rglob("*")}


# --- one writer a folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [False, True], ids=["reliability-1", "reports-24"])
def test_the_second_start_is_refused_and_writes_nothing(cfg, begun):
    folder = Path(cfg.run.folder)
    if begun:
        go(cfg)
    folder.mkdir(exist_ok=True)
    with held(folder):
        before = listing(folder)
        with pytest.raises(ValueError, match=rf"^process {os.getpid()} on \S+ trains in .*/run; wait until it ends, or choose"):
            go(cfg)
        assert listing(folder) == before
    assert go(cfg)[0].step == 8, "the lock ends with its holder"


def test_a_file_system_without_locks_is_accepted(cfg, monkeypatch):
    def refuse(fd, operation):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert go(cfg)[0].step == 8


def make(*names):
    def at(folder):
        for name in names:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()

    return at


def elsewhere(path):
    (disk := path.parent.with_name("disk")).mkdir()
    path.symlink_to(disk)


LEFT = {
    "reliability-2": make("config.yaml.new"),
    "the lock": make(".lock"),
    "a disk": lambda folder: (folder / "lost+found").mkdir(parents=True),
    "logs": make("logs/rank1.log"),
    "a link for the checkpoints": lambda folder: (folder.mkdir(), elsewhere(folder / "checkpoints")),
    "NFS": make(".nfs00012"),
}


@pytest.mark.parametrize("name", LEFT)
def test_traces_of_a_killed_start_are_an_empty_folder(cfg, name):
    LEFT[name](Path(cfg.run.folder))
    assert go(with_run(cfg, steps=2))[0].step == 2


@pytest.mark.parametrize("name", ["thesis.txt", "checkpoints/step3/index.json", "config.yml"])
def test_what_is_somebodys_is_not(cfg, name):
    make(name)(Path(cfg.run.folder))
    before = listing(cfg.run.folder)
    with pytest.raises(ValueError, match="exists and is no run folder"):
        go(cfg)
    assert listing(cfg.run.folder) == before


# --- the data, the config and the origin are those of the run ---------------------------------------------------------


def plus_one(cfg):
    (np.fromfile(path := cfg.data.paths[0], "<u2") + 1).tofile(path)


def append(cfg):
    Path(cfg.data.paths[0]).write_bytes(2 * Path(cfg.data.paths[0]).read_bytes())


def one_token(cfg):
    tokens = np.fromfile(path := cfg.data.paths[0], "<u2")
    tokens[1234] ^= 1
    tokens.tofile(path)


def flip(name):
    def change(cfg):
        path = Path(cfg.run.folder).parent / name
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)

    return change


CHANGED = {
    "reliability-3 plus one": (plus_one, r"tokens\.npy has another content than it had"),
    "reliability-3 appended": (append, r"tokens\.npy has 16,000 bytes, had 8,000"),
    "one token": (one_token, r"tokens\.npy has another content"),
    "reports-21 a file more": (lambda cfg: tokens(Path(cfg.run.folder).parent / "d" / "b.npy", 1), r"d/b\.npy is new"),
    "a file less": (lambda cfg: (Path(cfg.run.folder).parent / "d" / "c.npy").unlink(), r"d/c\.npy is gone"),
    "held-out text": (flip("held.npy"), r"held\.npy has another content"),
    "mask": (flip("mask.npy"), r"mask\.npy has another content"),
    "reports-21 tokenizer": (
        lambda cfg: train_bpe(["ab abc abd"] * 9, 257).save(cfg.data.tokenizer), r"tokenizer\.json has [\d,]+ bytes, had"
    ),
}  # fmt: skip


def data_of(cfg, name):
    """The config with the data that the case is about."""
    there = Path(cfg.run.folder).parent
    if "file" in name:
        (there / "d").mkdir(exist_ok=True)
        for one in "ac":
            tokens(there / "d" / f"{one}.npy", ord(one))
        return with_data(cfg, paths=(str(there / "d/*.npy"),))
    if name == "held-out text":
        return with_data(cfg, heldout_paths=(tokens(there / "held.npy", 3, 100),))
    if name == "mask":
        (there / "mask.npy").write_bytes(b"\1" * 4000)
        return with_data(cfg, label_mask_paths=(str(there / "mask.npy"),))
    return with_data(cfg, tokenizer=str(there / "tokenizer.json"))


@pytest.mark.parametrize("name", CHANGED)
def test_other_data_is_refused_by_the_name_of_the_file(cfg, name):
    change, words = CHANGED[name]
    cfg = data_of(cfg, name)
    go(cfg)
    back_to(cfg, 4)
    change(cfg)
    before = listing(cfg.run.folder)
    with pytest.raises(ValueError, match=rf"data is not that of the run in .*{words}.*--run\.accept-changes"):
        go(cfg)
    assert listing(cfg.run.folder) == before
    own = Path(cfg.run.folder, "tokenizer.json")
    kept = own.read_bytes() if own.exists() else b""
    _, seen = go(with_run(cfg, accept_changes=True))
    assert any(text.startswith("accepted: the data is not that of the run") for text in seen.said)
    assert not own.exists() or own.read_bytes() == kept, "checkpoints were made with it"
    assert not read_config(Path(cfg.run.folder)).run.accept_changes, "it is for one start"
    assert go(cfg)[0].step == 8, "the newest checkpoint is of the new data"


def test_a_checkpoint_that_does_not_know_its_data_is_accepted(cfg, tmp_path):
    go(cfg)
    back_to(cfg, 4)
    path = Path(cfg.run.folder, "checkpoints", "step4")
    state, meta = load(path)
    assert meta.keys() == {"tokens", "config", "data"}
    save(state, path.parent, step=4, meta={"tokens": meta["tokens"]}, replace=True)
    plus_one(cfg)
    assert go(cfg)[0].step == 8


def test_large_data_is_hashed_in_pieces(tmp_path, monkeypatch):
    """A change in what is read is found: at both ends and in between; what is read of a file has a bound."""
    monkeypatch.setattr(identity, "BUDGET", 1 << 20)
    path, size = tmp_path / "large", 50 << 20
    with path.open("wb") as file:
        file.truncate(size)
    read = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, count, at: read.append((at, count)) or pread(fd, count, at))
    first = identity.identity([(str(path), "uint16")])
    assert sum(count for _, count in read) <= 1 << 20
    assert {0, size - read[0][1]} < {at for at, _ in read}
    for at in (0, read[30][0], size - 1):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(b"x")
        second = identity.identity([(str(path), "uint16")])
        assert identity.difference(first, second) == f"{path} has another content than it had"
        first = second


def test_reliability_8_a_digit_of_the_config_is_flipped(cfg):
    go(cfg)
    back_to(cfg, 4)
    path = Path(cfg.run.folder, "config.yaml")
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.03"))
    with pytest.raises(ValueError, match=r"holds a run of another config \(--optim\.lr was 0\.01, is 0\.03\)"):
        go(read_config(path))
    assert go(with_run(read_config(path), accept_changes=True))[0].step == 8


def test_reliability_4_the_origin_is_looked_up_once(cfg, tmp_path):
    a = with_run(cfg, folder=str(tmp_path / "a"), steps=6)
    go(a)
    b = with_run(cfg, start_from=str(tmp_path / "a"), folder=str(tmp_path / "b"))
    stop = Stop()
    next(running := events(open_run(b), stop))  # it has begun, and is killed
    running.close()
    go(with_run(a, steps=7))
    seen = go(b)[1]
    assert seen.events[0] == Started(6, 8, (tmp_path / "a/checkpoints/step6").resolve())
    shutil.rmtree(tmp_path / "b" / "checkpoints")
    shutil.rmtree(tmp_path / "a" / "checkpoints" / "step6")
    with pytest.raises(ValueError, match=r"b began from .*/a/checkpoints/step6, which is gone by now; put it back, choose"):
        go(b)
    assert go(with_run(b, accept_changes=True))[1].events[0].step == 7


def test_reports_30_nothing_is_left_to_do(cfg, tmp_path):
    go(cfg)
    with pytest.raises(ValueError, match=r"run: 8 steps are done there, so that of --run\.steps 8 none is left; give more"):
        go(with_run(cfg, start_from=cfg.run.folder, folder=str(tmp_path / "more")))
    assert not (tmp_path / "more").exists()


GROWS = {
    "constant": (Constant(warmup=2), 8, 16, None),
    "wsd before its decay": (WSD(warmup=2, decay=2), 4, 16, None),
    "wsd in its decay": (
        WSD(warmup=2, decay=2),
        8,
        16,
        r"the rate of step 7 was 0\.0055, would have been 0\.01, as wsd depends on",
    ),
    "cosine": (
        Cosine(warmup=2),
        8,
        16,
        r"--run\.steps was 8, is 16: the rate of step 3 was .*, as cosine depends on the steps",
    ),
    "fewer than are done": (Constant(warmup=2), 8, 6, r"--run\.steps was 8, is 6, and 8 are done"),
}


@pytest.mark.parametrize("name", GROWS)
def test_reports_30_steps_may_grow_where_the_schedule_up_to_now_stays(cfg, name, tmp_path):
    schedule, done, more, refusal = GROWS[name]
    cfg = replace(cfg, schedule=schedule)
    go(cfg)
    back_to(cfg, done)
    longer = with_run(cfg, steps=more)
    if refusal:
        with pytest.raises(ValueError, match=refusal):
            go(longer)
        return
    go(longer)
    whole = with_run(longer, folder=str(tmp_path / "whole"))
    go(whole)
    same_outcome(longer, whole)


def test_reports_30_a_mean_of_the_weights_that_would_lack_steps(cfg):
    cfg = replace(cfg, recipe=replace(cfg.recipe, merge_last=4, merge_every=6))
    go(cfg)
    assert go(with_run(cfg, steps=11))[0].step == 11
    with pytest.raises(ValueError, match=r"is 12: --recipe\.merge-last 4 up to step 12 has begun with the steps that are done"):
        go(with_run(cfg, steps=12))


def test_reports_14_the_home_folder(cfg, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    go(with_data(with_run(cfg, folder="~/home"), tokenizer="~/tokenizer.json", paths=("~/tokens.npy",)))
    assert read_config(tmp_path / "home").run.folder == str(tmp_path / "home")
    assert go(with_run(cfg, folder="~/more", start_from="~/home", steps=9))[0].step == 9
    assert not Path("~").exists()


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------

ODD = {
    "reliability-6 flipped bit": b'{"step"  5}',
    "reliability-6 a number": b"12",
    "reliability-6 no step": b'{"loss":1}',
    "reliability-6 step is a text": b'{"step":"x"}',
    "reliability-6 nested": b"[" * 100_000,
    "reliability-6 not UTF-8": b"\xff",
    "step is true": b'{"step": true}',
    "zeros": b"\0" * 50,
    "list as evaluation": b'{"step": 3, "eval": []}',
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_line_of_metrics_costs_nothing(cfg, name, caplog):
    """Its bytes stay, it is named, and all other lines are there at the end."""
    go(cfg)
    whole = read_metrics(path := Path(cfg.run.folder, "metrics.jsonl"))
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], ODD[name], *lines[3:], b'{"step": 9, "lo']))
    back_to(cfg, 6)
    go(cfg)
    assert path.read_bytes().splitlines()[:7] == [*lines[:3], ODD[name], *lines[3:6]]
    caplog.clear()
    assert [[line[key] for key in SAME] for line in read_metrics(path)] == [[line[key] for key in SAME] for line in whole]
    assert f"{path} line 4 is left out" in caplog.text


def a_folder(path):
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "spoil", [a_folder, lambda path: (path.unlink(), path.symlink_to(path))], ids=["reliability-6", "loop"]
)
def test_metrics_that_cannot_be_read_do_not_keep_a_run_from_going_on(cfg, spoil, caplog):
    go(cfg)
    spoil(Path(cfg.run.folder, "metrics.jsonl"))
    back_to(cfg, 4)
    assert go(cfg)[0].step == 8
    assert "metrics.jsonl" in caplog.text
    assert "its metrics are not kept" in caplog.text


def test_reports_29_numbers_that_are_not_finite_are_json(cfg):
    result, _ = go(with_run(replace(cfg, optim=AdamW(lr=1e30)), keep_last=1))
    assert (result.exit_code, result.heldout) == (1, None), "it ends without a loss, which is no success"
    text = Path(cfg.run.folder, "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=lambda name: pytest.fail(name)) for line in text.splitlines()]
    assert lines[-1]["loss"] == "NaN"
    assert math.isnan(read_metrics(Path(cfg.run.folder, "metrics.jsonl"))[-1]["loss"])


class FullDisk:
    """A file of which only ``room`` bytes can still be written."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        done = self.file.write(data[: self.room])
        self.room -= done
        if not done:
            raise OSError(errno.ENOSPC, "No space left on device")
        return done

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 10], ids=["reliability-11", "reports-25c"])
def test_a_line_of_metrics_that_does_not_fit(cfg, room, monkeypatch):
    """The state is saved, the run stops with a line and exit code 1, no line is cut off; with room again, none is missing."""
    path = Path(cfg.run.folder, "metrics.jsonl")
    files = []

    class Full(Jsonl):
        def __call__(self, event):
            if isinstance(event, Stepped) and event.step == 3:
                self.file = FullDisk(self.file, room)
                files.append(self.file)
            return super().__call__(event)

    monkeypatch.setattr(loop, "Jsonl", Full)
    result, seen = go(cfg)
    assert (result.stopped_by, result.exit_code) == (FAILURE, 1)
    assert result.reason == f"cannot write {path}: No space left on device"
    assert steps(path.parent / "checkpoints")[-1] == result.step < 8
    assert seen.events[-1] == Stopped(result.step, result.reason)
    assert [line["step"] for line in read_metrics(path)] == [1, 2]
    assert path.read_bytes().endswith(b"}\n")
    file = Jsonl(path)
    file(Started(2, 9))
    file.file = full = FullDisk(file.file, room)
    assert isinstance(file(Stepped(3, {"loss": 1.0})), Failure)
    assert file(Stepped(4, {"loss": 1.0})) == f"cannot write {path}: No space left on device"
    full.room = 1000
    file.close()
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3, 4]


def test_reliability_20_readers_of_odd_lines(cfg, caplog):
    go(cfg := with_run(replace(cfg, schedule=RangeTest()), steps=12))
    path = Path(cfg.run.folder, "metrics.jsonl")
    odd = [b'{"step": 5}', b"[" * 100_000, b'{"step": 6, "loss": "x", "lr": 1}', b'{"step": 6, "lr": 1}']
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:4], *odd, *lines[4:], b""]))
    assert 9 <= largest_spike(cfg.run.folder) <= 12
    assert "falls fastest" in draw_range_test(PlotRangeTest(path.parent, output=path.with_name("x.png")))
    assert replay(cfg.run.folder, 12).differences == ()
    assert all(f"line {n} is left out" in caplog.text for n in (5, 6, 7, 8))


# --- output that nobody reads -----------------------------------------------------------------------------------------


def train_with_stdout(cfg, kind):
    """A process whose standard output is gone; what it says of errors is in a file."""
    from olmo_fn.cli.main import exit_code
    from olmo_fn.cli.training import run

    errors = os.open(f"{cfg.run.folder}.err", os.O_CREAT | os.O_WRONLY)
    os.dup2(errors, 2)
    sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    if kind == "closed":
        os.close(1)
        sys.stdout = None
    else:
        read, write = os.pipe()
        os.dup2(os.open("/dev/full", os.O_WRONLY) if kind == "full" else write, 1)
        os.close(read)
        os.close(write)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    code = exit_code(lambda: run(cfg, ["train.py"]))
    if sys.stdout:
        sys.stdout.flush()
    os._exit(code)


@pytest.mark.parametrize("kind", ["reader", "full", "closed"], ids=["reports-35", "reliability-7 full", "reliability-7 closed"])
def test_output_that_cannot_be_written_is_dropped(cfg, kind):
    cfg = with_run(cfg, log_every=1, folder=f"{cfg.run.folder}-{kind}")
    process = context.Process(target=train_with_stdout, args=(cfg, kind))
    process.start()
    process.join(120)
    assert process.exitcode == 0, Path(f"{cfg.run.folder}.err").read_text()
    assert steps(Path(cfg.run.folder, "checkpoints"))[-1] == len(read_metrics(Path(cfg.run.folder, "metrics.jsonl"))) == 8
    assert Path(f"{cfg.run.folder}.err").read_text() == ""


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTERM", "SIGINT"])
def test_reports_31_32_a_signal_saves_and_ends(cfg, name):
    number = signal.Signals[name]
    handlers = {n: signal.getsignal(n) for n in loop.STOPPING}
    result, _ = go(cfg, Seen({3: lambda: os.kill(os.getpid(), number)}))
    assert (result.reason, result.exit_code, result.stopped_by) == (name, 128 + number, SIGNAL + number)
    assert steps(Path(cfg.run.folder, "checkpoints"))[-1] == result.step < 8
    assert {n: signal.getsignal(n) for n in loop.STOPPING} == handlers


def test_reliability_7_a_hangup_that_is_ignored_is_none(cfg):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert go(cfg, Seen({3: lambda: os.kill(os.getpid(), signal.SIGHUP)}))[0].step == 8
    finally:
        signal.signal(signal.SIGHUP, before)


def test_reports_36_a_second_interrupt_interrupts_at_once(cfg):
    """What was to be saved by then is saved, or the run goes on from before."""

    def twice():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        go(cfg, Seen({3: twice}))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert go(cfg)[0].step == 8


@pytest.mark.parametrize(("every", "at"), [(3, 3), (0, 8)], ids=["reliability-21", "reports-33 the last"])
def test_a_stop_during_an_evaluation(cfg, every, at, tmp_path, monkeypatch):
    """It is given up after the batch in hand; the state is saved."""
    cfg = with_run(with_data(cfg, heldout_paths=(tokens(tmp_path / "held.npy", 5),)), eval_every=every, checkpoint_every=0)
    session, stop, batches, found = open_run(cfg), Stop(), [], []
    from olmo_fn.train import evals

    def sums(*args):
        batches.append(1)
        stop.code = SIGNAL + signal.SIGTERM
        return plain(*args)

    plain = evals.loss_sums
    monkeypatch.setattr(evals, "loss_sums", sums)
    found = list(events(session, stop))
    assert len(batches) == 1
    assert not any(isinstance(event, Evaluated) for event in found)
    assert found[-1] == Stopped(at, "SIGTERM")
    assert steps(Path(cfg.run.folder, "checkpoints")) == [at]


def fails(session, at, where="gradients", before=lambda: None):
    """The session, whose step ``at`` fails."""

    def grads(params, batch, execution):
        count.append(1)
        if where == "gradients" and len(count) == at:
            before()
            raise RuntimeError("the compiler is gone")
        return plain.grads.fn(params, batch, execution)

    def control(*args):
        if where == "update" and len(count) == at:
            before()
            raise RuntimeError("the compiler is gone")
        return plain.control(*args)

    count, plain = [], session.step
    vars(session)["step"] = replace(plain, grads=replace(plain.grads, fn=grads), control=control)
    return session


@pytest.mark.parametrize("signalled", [True, False], ids=["reports-34", "without a signal"])
def test_a_step_that_fails_costs_no_step_before_it(cfg, signalled, tmp_path):
    """Where a stop was asked for, as by the signal that killed a compiler, the run just stops."""
    cfg = with_run(cfg, checkpoint_every=0)
    session = fails(open_run(cfg), 6, before=lambda: signalled and os.kill(os.getpid(), signal.SIGINT))
    if signalled:
        result, _ = go(session)
        assert (result.exit_code, result.step) == (130, 5)
    else:
        with pytest.raises(RuntimeError, match="the compiler is gone"):
            go(session)
    assert steps(Path(cfg.run.folder, "checkpoints")) == [5]
    assert len(read_metrics(Path(cfg.run.folder, "metrics.jsonl"))) == 5
    go(cfg)
    go(whole := with_run(cfg, folder=str(tmp_path / "whole")))
    same_outcome(cfg, whole)


def test_reports_34_what_an_update_left_half_done_is_not_saved(cfg):
    with pytest.raises(RuntimeError):
        go(fails(open_run(cfg), 6, "update"))
    assert steps(Path(cfg.run.folder, "checkpoints")) == [2, 4]


def test_reports_22_data_that_goes_while_the_run_reads_it(cfg):
    """What read it raises; the steps that are done are saved, and the line names the file."""
    session, n = open_run(cfg), []

    def batch(step, plain=session.source.train):
        n.append(step)
        if step == 5:
            raise ValueError(f"{cfg.data.paths[0]!r} was cut short")
        return plain(step)

    vars(session)["source"] = replace(session.source, train=Reads(session.source.train, batch))
    with pytest.raises(ValueError, match=r"tokens\.npy' was cut short"):
        go(session)
    assert steps(Path(cfg.run.folder, "checkpoints")) == [2, 4, 5]


class Reads:
    """A loader whose batches another function reads."""

    def __init__(self, loader, batch):
        self.loader, self.batch = loader, batch

    def __call__(self, step, rows=None):
        return self.batch(step)

    def __getattr__(self, name):
        return getattr(self.loader, name)


# --- losses that are none ---------------------------------------------------------------------------------------------


def test_reports_28_a_loss_that_stays_lost_ends_the_run(cfg):
    """With one line and exit code 1; retention leaves the last checkpoint from before the first such step."""
    cfg = with_run(cfg, steps=100, checkpoint_every=5, keep_last=1)
    session, plain = open_run(cfg), open_run(cfg).step

    def control(state, signals, metrics):
        lost = torch.where(state.step >= 12, math.nan, metrics["loss"])
        return plain.control(state, signals, {**metrics, "loss": lost})

    vars(session)["step"] = replace(session.step, control=control)
    result, _ = go(session)
    assert result.exit_code == 1
    assert result.reason.startswith(
        "the loss is not finite since step 13; the checkpoints from before are kept; lower --optim.lr"
    )
    assert 12 + NOT_FINITE <= result.step <= 14 + NOT_FINITE
    assert steps(Path(cfg.run.folder, "checkpoints"))[0] == 10


def test_reports_20_a_batch_without_labels(cfg, tmp_path):
    (tmp_path / "mask.npy").write_bytes(b"\1" + b"\0" * 3999)  # what begins a window is never a label
    cfg = with_data(cfg, label_mask_paths=(str(tmp_path / "mask.npy"),))
    result, seen = go(cfg)
    assert result.step == 8
    lines = read_metrics(Path(cfg.run.folder, "metrics.jsonl"))
    assert [(line["loss"], line["skipped"]) for line in lines] == 8 * [(0.0, 1.0)]
    (said,) = (text for text in seen.said if "label" in text)
    assert said == (
        f"no token of the batch of step 1 has a label (--data.label-mask-paths {tmp_path}/mask.npy): nothing is learned from it"
    )


@pytest.mark.parametrize("count", [1, 2])
def test_reports_19_held_out_text_of_which_nothing_is_predicted(cfg, count, tmp_path):
    cfg = with_run(with_data(cfg, heldout_paths=(tokens(tmp_path / "held.npy", 5),)), eval_tokens=count)
    result, seen = go(cfg)
    if count == 2:
        assert result.heldout.tokens == 1
        return
    assert result.heldout is None
    assert not any(isinstance(event, Evaluated) for event in seen.events)
    assert seen.said[-1] == "none of them is predicted, so there is no loss"


# --- the disk ---------------------------------------------------------------------------------------------------------


def test_reliability_10_what_resuming_needs_is_durable(cfg, tmp_path, monkeypatch):
    """Config, tokenizer, origin and new folders before the first step; metrics before each checkpoint that has their steps."""
    synced, fsync = [], os.fsync

    def note(fd):
        synced.append(os.readlink(f"/proc/self/fd/{fd}").removeprefix(f"{tmp_path}/"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", note)
    cfg = with_data(with_run(cfg, folder=str(tmp_path / "a/b/run")), tokenizer=str(tmp_path / "tokenizer.json"))
    go(with_run(cfg, steps=2))
    assert synced[: synced.index("a/b/run/metrics.jsonl")] == [
        str(tmp_path), "a", "a/b", "a/b/run/config.yaml.new", "a/b/run", "a/b/run/tokenizer.json.new", "a/b/run",
    ]  # fmt: skip
    assert synced.index("a/b/run/metrics.jsonl") < next(i for i, name in enumerate(synced) if name.endswith("index.json"))


def test_reliability_23_a_folder_that_is_deleted_while_the_run_goes(cfg, tmp_path):
    cfg = with_data(cfg, tokenizer=str(tmp_path / "tokenizer.json"))
    go(cfg, Seen({5: lambda: shutil.rmtree(cfg.run.folder)}))
    names = {path.name for path in Path(cfg.run.folder).iterdir()}
    assert names >= {"config.yaml", "tokenizer.json", "metrics.jsonl", "checkpoints", ".lock"}
    go(whole := with_run(cfg, folder=str(tmp_path / "whole")))
    same_outcome(cfg, whole)
    assert go(cfg)[0].step == 8


@pytest.mark.parametrize("failing", [{4}, {4, 6}, {8}], ids=["reports-25a", "twice", "the last"])
def test_a_checkpoint_that_does_not_fit(cfg, failing, monkeypatch):
    """The next one is tried; two in a row, or the last, end the run."""

    def saving(state, *args, **options):
        if state.step in failing:
            raise SaveFailed(f"could not save step {state.step}")
        return plain(state, *args, **options)

    plain = background.save_planned
    monkeypatch.setattr(background, "save_planned", saving)
    if failing == {4}:
        assert go(cfg)[0].step == 8
        assert steps(Path(cfg.run.folder, "checkpoints")) == [2, 6, 8]
        return
    with pytest.raises(SaveFailed):
        go(cfg)
    assert steps(Path(cfg.run.folder, "checkpoints")) == [n for n in range(2, max(failing), 2) if n not in failing]


def test_reports_25d_a_disk_without_room_is_told_at_the_start(cfg, monkeypatch):
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=60_000))
    _, seen = go(with_run(cfg, steps=1))
    size = read_index(Path(cfg.run.folder, "checkpoints", "step1"))
    nbytes = sum(4 * math.prod(tensor.shape) for tensor in size.tensors.values() if tensor.dtype == "F32")
    (said,) = (text for text in seen.said if "are free" in text)
    assert said.startswith(f"60,000 bytes are free in {cfg.run.folder}, and a checkpoint has ")
    assert nbytes <= int(said.split(" has ")[1].split(":")[0].replace(",", "")) < 1.1 * nbytes


def test_a_failure_among_reasons_is_one():
    answers = [lambda event: "too hot", lambda event: Failure("no disk")]
    found = fan_out(answers, Saved(1, Path()))
    assert isinstance(found, Failure)
    assert found == "too hot; no disk"
    assert type(fan_out(answers[:1], Saved(1, Path()))) is str
    stop = Stop()
    stop.ask(found)
    assert (stop.code, stop.reason) == (FAILURE, "too hot; no disk")
    stop.ask("later")
    assert stop.reason == "too hot; no disk"
