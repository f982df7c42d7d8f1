"""The loop as a generator of events: their order, what stops it, what metrics.jsonl has of it, and what is measured."""

import contextlib
import gc
import io
import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.testing import assert_close

from olmo_fn.checkpoint import Ranks, load, newest_whole, steps
from olmo_fn.data.settings import Data
from olmo_fn.launch.process import Process
from olmo_fn.models.config import dense
from olmo_fn.models.count import flops_per_token
from olmo_fn.train import machine
from olmo_fn.train.config import Config, Growth, Recipe, Run
from olmo_fn.train.environment import prepare_environment
from olmo_fn.train.events import Evaluated, Observer, Said, Saved, Started, Stepped, Stopped
from olmo_fn.train.loop import OBSERVER, Stop, events, train
from olmo_fn.train.meter import InFlight, Meter, Moment, agrees
from olmo_fn.train.observers import Observe, read_evaluations, read_metrics
from olmo_fn.train.observers.plateau import Plateau
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.process import ProcessContext
from olmo_fn.train.report import run_flops
from olmo_fn.train.schedule import sizes
from olmo_fn.train.schedules import Constant
from olmo_fn.train.session import open_run

CPU = torch.device("cpu")


@pytest.fixture
def cfg(tmp_path):
    """A run of 10 steps that is saved every 4 and evaluated every 5."""
    np.random.default_rng(0).integers(1, 64, 4_000, dtype=np.uint8).tofile(tmp_path / "tokens.npy")
    return Config(
        model=dense(8, 1, 2, 12, vocab_size=64),
        data=Data(paths=(str(tmp_path / "tokens.npy"),), dtype="uint8", heldout_fraction=0.05, cache_dir=str(tmp_path / "c")),
        optim=AdamW(lr=1e-2),
        schedule=Constant(warmup=0),
        recipe=Recipe(4, 16, compile=False, dtype="float32"),
        run=Run(str(tmp_path / "run"), steps=10, checkpoint_every=4, eval_every=5, threads=1, sample="", device="cpu"),
    )


class Recorder(Observer):
    """Keeps all events; says stop after a step."""

    def __init__(self, stop_at=math.inf):
        self.events, self.stop_at, self.closed = [], stop_at, False

    def __call__(self, event):
        self.events.append(event)
        return "I have seen enough" if isinstance(event, Stepped) and event.step == self.stop_at else None

    def close(self):
        self.closed = True


def quietly(cfg, *observers):
    with contextlib.redirect_stdout(io.StringIO()):
        return train(cfg, observers)


def of(kind, found):
    return [event for event in found if isinstance(event, kind)]


def test_the_events_of_a_run(cfg):
    """A step is seen before it is saved or evaluated; every checkpoint and evaluation is an event, and in metrics.jsonl."""
    seen = Recorder()
    result = quietly(cfg, seen)
    found = [event for event in seen.events if not isinstance(event, Said)]
    assert found[0] == Started(0, 10)
    assert found[-1] == Stopped(10)
    assert [event.step for event in of(Stepped, found)] == list(range(1, 11))
    assert [(event.step, event.path.name) for event in of(Saved, found)] == [(4, "step4"), (8, "step8"), (10, "step10")]
    assert [(event.step, event.name) for event in of(Evaluated, found)] == [(5, "heldout"), (10, "heldout")]
    for event in (*of(Saved, found), *of(Evaluated, found)):
        before = [step.step for step in of(Stepped, found[: found.index(event)])]
        assert before[-1] >= event.step
    at_five = next(i for i, event in enumerate(found) if isinstance(event, Evaluated))
    assert of(Stepped, found[:at_five])[-1].step == 5, "an evaluation comes when the metrics of its step are out, and no later"
    folder = Path(cfg.run.folder)
    assert [(line["step"], line["loss"]) for line in read_evaluations(folder / "metrics.jsonl")] == [
        (event.step, event.values["loss"]) for event in of(Evaluated, found)
    ]
    assert read_metrics(folder / "metrics.jsonl") == [dict(event.metrics) for event in of(Stepped, found)]
    assert result.heldout.loss == of(Evaluated, found)[-1].values["loss"]
    assert (result.step, result.stopped_by, result.exit_code) == (10, 0, 0)
    assert seen.closed


def test_metrics_come_a_step_late_and_do_not_wait(cfg):
    """When step n's metrics come out, step n + 1 has been made; but for those before a checkpoint, an evaluation, the end."""
    made = []
    session, plain = open_run(cfg), open_run(cfg).step
    step = type("Noted", (type(session.step),), {"__call__": lambda self, *args: (made.append(1), plain(*args))[1]})
    noted = step(**{name: getattr(session.step, name) for name in session.step.__dataclass_fields__})
    vars(session := replace(session))["step"] = noted
    ahead = {e.step: len(made) - e.step for e in events(session, Stop()) if isinstance(e, Stepped)}
    assert ahead == {n: 0 if n in (4, 5, 8, 10) else 1 for n in range(1, 11)}


def test_an_observer_stops_the_run(cfg):
    """It is saved, and goes on; the end is that of a run that nobody stopped."""
    seen = Recorder(stop_at=6)
    result = quietly(cfg, seen)
    assert (result.stopped_by, result.reason, result.exit_code) == (OBSERVER, "I have seen enough", 0)
    assert seen.events[-1] == Stopped(result.step, "I have seen enough")
    assert 6 <= result.step <= 8
    assert of(Stepped, seen.events)[-1].step == result.step == steps(Path(cfg.run.folder) / "checkpoints")[-1]
    again = Recorder()
    assert quietly(cfg, again).stopped_by == 0
    assert again.events[0] == Started(
        result.step, 10, newest_whole(Path(cfg.run.folder) / "checkpoints").parent / f"step{result.step}"
    )
    quietly(replace(cfg, run=replace(cfg.run, folder=cfg.run.folder + "-whole")))
    ends = [load(Path(cfg.run.folder + name, "checkpoints", "step10"))[0] for name in ("", "-whole")]
    assert_close(*ends, rtol=0, atol=0)


def run_on(connection, cfg, asking, at):
    """One rank of a run, of which rank ``asking`` asks to stop when it sees step ``at``: its steps, and why it ended."""
    rank, store = dist.get_rank(), dist.PrefixStore(cfg.run.folder, dist.distributed_c10d._get_default_store())
    ranks = Ranks(rank, 2, dist.PrefixStore("checkpoint", store))
    session = open_run(cfg, ProcessContext(CPU, Process(rank, 2, rank, store), connection, ranks))
    stop, seen = Stop(), []
    for event in events(session, stop):
        if not isinstance(event, Saved):  # of a file that each rank writes in its own time
            seen.append(type(event).__name__)
        if isinstance(event, Stepped) and event.step == at and rank == asking:
            stop.ask("I have seen enough")
    return seen, event


@pytest.mark.parametrize(("asking", "reason"), [(0, "I have seen enough"), (1, "another process asked for it")])
def test_all_ranks_stop_after_the_same_step(pool, cfg, asking, reason):
    """Whoever asks; the metrics and the checkpoint of that step are out."""
    (seen, end), (other, other_end) = pool.run(run_on, cfg, asking, 6, ranks=2)
    assert seen == other
    assert end.step == other_end.step == seen.count("Stepped") == steps(Path(cfg.run.folder) / "checkpoints")[-1]
    assert 6 < end.step < 10
    assert end.reason == reason


def test_a_run_that_is_done_is_evaluated_again(cfg):
    quietly(cfg)
    seen = Recorder()
    quietly(cfg, seen)
    assert [type(event) for event in seen.events if not isinstance(event, Said)] == [Started, Evaluated, Stopped]


def test_observers_of_the_settings(cfg):
    """They are built when nothing refuses the run any more, look on, and may stop it; a setting that cannot be is one line."""
    cfg = replace(cfg, run=replace(cfg.run, eval_every=1))
    result = quietly(replace(cfg, observe=Observe(plateau=Plateau(on=True, patience=2, least=10.0))))
    assert result.stopped_by == OBSERVER
    assert "has been no better than" in result.reason
    assert result.step < 6
    with pytest.raises(ValueError, match=r"--observe\.plateau\.patience 0 must be"):
        quietly(replace(cfg, observe=Observe(plateau=Plateau(on=True, patience=0))))


def test_an_exception_closes_everything(cfg):
    """An observer that fails is dropped by name; a failing step ends the run, and observers are closed."""
    seen = Recorder()
    session = open_run(cfg)
    vars(session)["step"] = replace(session.step, control=lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), contextlib.redirect_stdout(io.StringIO()):
        train(session, [seen])
    assert seen.closed


def test_metrics_in_flight():
    """Numbers, NaN and lists arrive as they left, exactly, from any dtype; a later write into their memory changes nothing."""
    loss = torch.tensor(0.1)
    metrics = {"loss": loss, "bad": torch.tensor(math.nan), "n": torch.tensor(2**40), "skip": torch.tensor(True)}
    flying = InFlight(3, {**metrics, "load": torch.tensor([0.25, 0.75])}, 15, ProcessContext(CPU))
    loss.zero_()
    values, stop = flying.arrive()
    assert math.isnan(values.pop("bad"))
    assert values == {"loss": float(torch.tensor(0.1)), "n": 2**40, "skip": 1, "load": [0.25, 0.75]}
    assert (flying.step, stop) == (3, 15)


def test_mfu_can_be_checked_and_is_never_above_1(cfg):
    """The first line has the rate that MFU is measured against; a rate that was measured too low gives no MFU."""
    quietly(cfg)
    lines = read_metrics(Path(cfg.run.folder) / "metrics.jsonl")
    assert [line["step"] for line in lines if "gemm_flops_per_s" in line] == [1]
    rate = lines[0]["gemm_flops_per_s"]
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_s"] * flops_per_token(cfg.model, 16) / rate, abs=1e-4)
    meter = Meter(cfg.model, sizes(cfg), CPU, 1.0, Moment(CPU))
    assert "mfu" not in meter.metrics(1, {}, Moment(CPU))


def test_flops_of_a_run_that_grows(cfg):
    """Those of every step at its own length; a constant run's are its tokens times one."""
    growing = replace(cfg, growth=Growth((2,), until=(3,), min_length=4, length_multiple=4, length_steps=6))
    by_step = 0.0
    for step in range(cfg.run.steps):
        phase = sizes(growing).at(step)
        by_step += phase.batch_size * 16 * flops_per_token(cfg.model, phase.sequence_length)
    assert run_flops(growing) == pytest.approx(by_step)
    assert run_flops(cfg) == 10 * 4 * 16 * flops_per_token(cfg.model, 16) > run_flops(growing)
    short = replace(growing, run=replace(cfg.run, steps=2))
    assert run_flops(short) == 2 * 2 * 16 * flops_per_token(cfg.model, 4)
    assert json.dumps(run_flops(short))


def test_mfu_is_against_the_makers_peak_where_it_is_known(cfg):
    """Then the share of the measured product stands beside it."""
    meter = Meter(cfg.model, sizes(cfg), CPU, 4e15, Moment(CPU), peak=8e15)
    line = meter.metrics(1, {}, Moment(CPU))
    assert line["of_gemm"] == pytest.approx(2 * line["mfu"], abs=2e-4)


def test_processes_agree_to_stop_after_some_steps_on_a_gpu():
    """On a CPU after each; see tests of ranks for what comes of it."""
    steps = range(1, 9)
    assert [step for step in steps if agrees(step, CPU)] == [*steps]
    assert [step for step in steps if agrees(step, torch.device("cuda"))] == [4, 8]


def test_garbage_is_collected_by_the_step(monkeypatch):
    """On schedule Python collects nothing by itself, and what existed after the first step is not looked at."""
    collected = []
    with machine.warm_up(scheduled=True) as warm:
        warm()
        assert not gc.isenabled()
        assert gc.get_freeze_count() > 1000
        monkeypatch.setattr(gc, "collect", lambda: collected.append(n))
        for n in range(1, 301):
            machine.collect(n)
    assert collected == [100, 200, 300]
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert [machine.on_schedule(torch.device(d), n) for d, n in (("cpu", 1), ("cpu", 2), ("cpu", 8), ("cuda", 1))] == [
        False,
        False,
        True,
        True,
    ]


def test_capture_on_a_cpu_is_refused_before_anything_is_written(cfg):
    with pytest.raises(ValueError, match=r"--recipe\.capture makes a CUDA graph of a step, and this trains on the cpu"):
        quietly(replace(cfg, recipe=replace(cfg.recipe, capture=True)))
    assert not Path(cfg.run.folder).exists()


@pytest.mark.parametrize(("given", "expected"), [({}, "expandable_segments:True"), ({"PYTORCH_CUDA_ALLOC_CONF": "a:1"}, None)])
def test_the_environment_before_torch(monkeypatch, given, expected):
    """What is not set is; a setting by its older name stays the only one."""
    monkeypatch.setattr(os, "environ", dict(given))
    monkeypatch.delitem(sys.modules, "torch")
    prepare_environment()
    assert (os.environ.get("PYTORCH_ALLOC_CONF") or "").split(",")[0] == (expected or "")
    assert os.environ["OMP_WAIT_POLICY"] == "passive"
