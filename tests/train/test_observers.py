"""What the observers of a run write, print and ask for, event by event."""

import gc
import json
import subprocess
import sys
from dataclasses import dataclass, field
from math import inf, isnan, nan

import pytest
import torch
import tyro
from programs import ROOT

from olmo_fn.train.config import CHOICES
from olmo_fn.train.events import Evaluated, Event, Observer, RunInfo, Said, Saved, Started, Stepped, Stopped
from olmo_fn.train.observers import (
    Console,
    Jsonl,
    Observe,
    build_observers,
    close_observers,
    fan_out,
    read_evaluations,
    read_metrics,
)
from olmo_fn.train.observers.divergence import Divergence
from olmo_fn.train.observers.gc import GarbageCollection
from olmo_fn.train.observers.plateau import Plateau
from olmo_fn.train.observers.profiler import Profiler
from olmo_fn.train.observers.tensorboard import TensorBoard
from olmo_fn.train.serialize import from_yaml, to_yaml

METRICS = {"loss": 4.5, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 5000.0, "mfu": 0.81, "peak_mb": 900.0, "skipped": 0.0}


class Recorder(Observer):
    """Keeps what it gets, and does what it is told to."""

    def __init__(self, answer: str | BaseException | None = None, close: Exception | None = None) -> None:
        self.events: list[Event] = []
        self.answer, self.error, self.closed = answer, close, 0

    def __call__(self, event):
        self.events.append(event)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def close(self):
        self.closed += 1
        if self.error:
            raise self.error


@pytest.fixture
def info(tmp_path):
    return RunInfo(tmp_path, "run", {"run": {"steps": 10}})


def write(path, *events):
    file = Jsonl(path)
    for event in events:
        file(event)
    file.close()


# the package


def test_importing_it_imports_no_torch_and_no_tracker():
    heavy = {"torch", "numpy", "rich", "wandb", "comet_ml", "trackio", "tensorboard"}
    code = f"import sys, olmo_fn.train.observers; print({heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@dataclass(frozen=True)
class Whole:
    observe: Observe = field(default_factory=Observe)


@pytest.mark.parametrize("name", ["wandb", "tensorboard", "comet", "trackio", "profiler", "gc", "plateau", "divergence"])
def test_the_flag_of_a_group_is_its_switch(name, capsys):
    def on(*flags):
        return getattr(tyro.cli(Whole, args=list(flags)).observe, name).on

    assert not on()
    assert on(f"--observe.{name}")
    assert not on(f"--observe.no-{name}")
    found = tyro.cli(Whole, args=[f"--observe.{name}"])
    assert tyro.cli(Whole, args=[f"--observe.no-{name}"], default=found) == Whole()
    assert from_yaml(to_yaml(found), Whole, CHOICES) == found
    with pytest.raises(SystemExit):
        tyro.cli(Whole, args=["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"--observe.{name}, --observe.no-{name}" in shown
    assert f"; --observe.{name} turns it on." in shown


def test_observers_that_are_off_are_not_built(info):
    assert build_observers(Observe(), info) == []
    on = build_observers(Observe(plateau=Plateau(on=True), divergence=Divergence(on=True)), info)
    assert [type(observer).__name__ for observer in on] == ["PlateauObserver", "DivergenceObserver"]


def test_a_wrong_setting_is_refused_and_what_was_built_is_closed(info):
    before = list(gc.callbacks)
    with pytest.raises(ValueError, match=r"^--observe.plateau.patience 0 must be at least 1$"):
        build_observers(Observe(gc=GarbageCollection(on=True), plateau=Plateau(on=True, patience=0)), info)
    assert gc.callbacks == before
    with pytest.raises(ValueError, match=r"^--observe\.divergence: "):
        build_observers(Observe(divergence=Divergence(on=True, factor=1.0)), info)
    with pytest.raises(ValueError, match=r"^--observe\.profiler\.first and"):
        build_observers(Observe(profiler=Profiler(on=True, first=0)), info)


# fan_out


def test_an_event_reaches_all_and_reasons_come_back():
    a, b, c = Recorder(), Recorder("too hot"), Recorder("too late")
    assert fan_out([a, b, c], Said("x")) == "too hot; too late"
    assert a.events == b.events == c.events == [Said("x")]
    assert fan_out([a], Said("y")) is None


def test_one_that_fails_is_named_once_closed_and_off(capsys):
    good, bad, last = Recorder(), Recorder(OSError("no space\nleft")), Recorder("stop")
    bad.error = RuntimeError("nor this")
    observers = [good, bad, last]
    assert fan_out(observers, Stepped(1, {})) == "stop"
    assert observers == [good, last]
    assert fan_out(observers, Stepped(2, {})) == "stop"
    assert len(bad.events) == bad.closed == 1
    assert len(last.events) == 2
    assert capsys.readouterr().err == (
        "Recorder failed, and is off from here on: OSError: no space\nRecorder did not close: RuntimeError: nor this\n"
    )


def test_an_interrupt_is_no_failure():
    with pytest.raises(KeyboardInterrupt):
        fan_out([Recorder(KeyboardInterrupt())], Said("x"))


def test_all_are_closed_though_one_cannot(capsys):
    observers = [Recorder(), Recorder(close=OSError("gone")), Recorder()]
    close_observers(observers)
    assert [observer.closed for observer in observers] == [1, 1, 1]
    assert capsys.readouterr().err == "Recorder did not close: OSError: gone\n"


# metrics.jsonl


def strict(text):
    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_steps_and_evaluations_are_lines_that_nobody_mixes_up(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path, Started(0, 9), Stepped(1, METRICS), Said("x"), Evaluated(1, "heldout", {"loss": 2.5}), Saved(1, path), Stopped(1)
    )
    assert path.read_text().splitlines() == [
        json.dumps({"step": 1, **METRICS}),
        '{"step": 1, "eval": "heldout", "loss": 2.5}',
    ]
    assert read_metrics(path) == [{"step": 1, **METRICS}]
    assert read_evaluations(path) == [{"step": 1, "eval": "heldout", "loss": 2.5}]
    assert read_metrics(tmp_path / "none") == read_evaluations(tmp_path / "none") == []


def test_numbers_that_are_not_finite_are_valid_json_and_come_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = {"a": nan, "b": inf, "c": -inf, "load": [0.5, nan], "tensor": torch.tensor([1.0, -inf]), "zero": torch.tensor(nan)}
    write(path, Started(0, 9), Stepped(1, values), Evaluated(1, "x", {"loss": inf}))
    for text in path.read_text().splitlines():
        strict(text)
    (line,) = read_metrics(path)
    assert isnan(line["a"])
    assert isnan(line["zero"])
    assert (line["b"], line["c"], line["load"][0], line["tensor"]) == (inf, -inf, 0.5, [1.0, -inf])
    assert isnan(line["load"][1])
    assert read_evaluations(path) == [{"step": 1, "eval": "x", "loss": inf}]


def test_files_of_before_are_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n{"step": 2, "loss": -Infinity}\n')
    one, two = read_metrics(path)
    assert isnan(one["loss"])
    assert two["loss"] == -inf
    write(path, Started(2, 9))
    assert [strict(text)["loss"] for text in path.read_text().splitlines()] == ["NaN", "-Infinity"]


@pytest.mark.parametrize("torn", ["", '{"step": 6, "lo', '{"step": 6, "loss": 1}', "\0\0\0", "\xff{", "17"])
def test_going_on_drops_later_lines_and_a_torn_one_and_nothing_else(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    steps = [Stepped(n, {"loss": n / 3}) for n in range(1, 6)]
    write(
        path,
        Started(0, 9),
        *steps[:3],
        Evaluated(3, "heldout", {"loss": 0.1}),
        *steps[3:],
        Evaluated(5, "heldout", {"loss": 1}),
    )
    whole = path.read_bytes()
    path.write_bytes(whole + torn.encode("latin-1"))
    write(path, Started(3, 9), *steps[3:], Evaluated(5, "heldout", {"loss": 1}))
    assert path.read_bytes() == whole
    assert not path.with_name("metrics.jsonl.new").exists()


def test_a_torn_line_in_the_middle_costs_only_itself(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n{"step": 4}\n')
    assert [line["step"] for line in read_metrics(path)] == [1, 4]


def test_of_an_evaluation_that_is_repeated_the_newer_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(
        path, Started(0, 2), Stepped(2, METRICS), Evaluated(2, "heldout", {"loss": 3.0}), Evaluated(2, "arc", {"accuracy": 0.5})
    )
    write(path, Started(2, 2), Evaluated(2, "heldout", {"loss": 2.5}))
    assert [line.get("loss") for line in read_evaluations(path)] == [2.5, None]
    assert len(read_metrics(path)) == 1


def test_a_line_is_on_disk_when_the_event_is_over(tmp_path):
    file = Jsonl(tmp_path / "metrics.jsonl")
    file(Started(0, 9))
    file(Stepped(1, {"loss": 1.0}))
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
    file.close()


# the console


def test_a_step_may_lack_metrics(capsys):
    console = Console(every=1)
    console(Started(0, 2))
    console(Stepped(1, {"loss": nan}))
    assert capsys.readouterr().out == "step 1/2  loss nan\n"


def test_a_run_outlives_the_reader_of_its_output():
    code = """
import sys
from olmo_fn.train.events import *
from olmo_fn.train.observers import Console, fan_out
observers = [Console(1)]
for n in range(20000):
    fan_out(observers, Said(f"line {n}"))
print("went on", len(observers), file=sys.stderr)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "line 0\n"
    process.stdout.close()
    assert process.stderr.read().startswith("went on 1\n")
    process.wait(60)


# profiler and garbage collector


def multiply():
    torch.ones(32, 32) @ torch.ones(32, 32)


def test_the_profiler_sees_its_steps_and_no_others(info, capsys):
    observer = Profiler(on=True, first=3, steps=2).build(info)
    observer(Started(10, 20))
    for n in range(11, 18):
        for _ in range(n):
            multiply()
        observer(Stepped(n, {}))
    observer.close()
    folder = info.folder / "profile"
    assert sorted(path.name for path in folder.iterdir()) == ["steps13-14.json", "steps13-14.txt"]
    trace = json.loads((folder / "steps13-14.json").read_text())["traceEvents"]
    assert sum(event["name"] == "aten::mm" for event in trace) == 13 + 14
    assert "aten::mm" in (folder / "steps13-14.txt").read_text()
    assert capsys.readouterr().out.startswith(f"profile of steps 13 to 14: {folder}/steps13-14.json (")


def test_the_first_step_and_a_short_run_can_be_profiled(info):
    observer = Profiler(on=True, first=1, steps=5).build(info)
    observer(Started(0, 2))
    assert torch.autograd.profiler._is_profiler_enabled
    multiply()
    observer(Stepped(1, {}))
    observer.close()
    assert not torch.autograd.profiler._is_profiler_enabled
    assert not (info.folder / "profile").exists()


def test_pauses_are_counted_and_what_exists_is_left_out(info, capsys):
    observer = GarbageCollection(on=True, slow=0.0).build(info)
    automatic = gc.isenabled()
    gc.disable()
    try:
        observer(Started(0, 3))
        gc.collect()
        observer(Stepped(1, {}))
        assert gc.get_freeze_count() > 1000
        gc.collect()
        gc.collect()
        observer(Stepped(2, {}))
        observer(Stepped(3, {}))
        observer.close()
    finally:
        if automatic:
            gc.enable()
    assert gc.get_freeze_count() == 0
    assert observer._time not in gc.callbacks
    slow, end = capsys.readouterr().out.splitlines()
    assert slow.startswith("garbage collection: pauses of 0.")
    assert slow.endswith(" s in step 2")
    assert end.startswith("garbage collection: 2 pauses in 2 steps, ")


def test_a_run_without_steps_has_no_pauses(info, capsys):
    observer = GarbageCollection(on=True).build(info)
    gc.collect()
    observer.close()
    assert capsys.readouterr().out == "garbage collection: 0 pauses in 0 steps, 0.0 ms in all\n"


# alarms


def reasons(observer, events):
    return [observer(event) for event in events]


def heldout(*values, name="heldout"):
    return [Evaluated(n + 1, name, {"loss": value}) for n, value in enumerate(values)]


def test_a_plateau_ends_a_run(info):
    observer = Plateau(on=True, patience=2, least=0.1).build(info)
    said = reasons(observer, [Started(0, 9), *heldout(3.0, 2.5, 2.45, 2.3, 2.25)])
    assert said == [None] * 6
    assert reasons(observer, [*heldout(1.0, 1.0, name="other"), Stepped(7, {"loss": 1.0})]) == [None] * 3
    assert observer(Evaluated(8, "heldout", {"loss": nan})) == (
        "heldout loss has been no better than 2.3000 for 2 evaluations (--observe.plateau)"
    )


def test_a_plateau_of_what_should_rise(info):
    observer = Plateau(on=True, evaluation="arc", value="accuracy", patience=1, higher=True).build(info)
    said = [observer(Evaluated(n, "arc", {"accuracy": value})) for n, value in enumerate((0.25, 0.5, 0.5))]
    assert said == [None, None, "arc accuracy has been no better than 0.5000 for 1 evaluations (--observe.plateau)"]
    with pytest.raises(ValueError, match=r"^--observe.plateau.value accuracy: arc has loss$"):
        observer(Evaluated(9, "arc", {"loss": 1.0}))


def test_a_plateau_goes_on_from_the_file(info):
    write(info.folder / "metrics.jsonl", Started(0, 9), *heldout(3.0, 2.0, 2.5, 0.1))
    observer = Plateau(on=True, patience=2).build(info)
    assert reasons(observer, [Started(3, 9), Evaluated(4, "heldout", {"loss": 2.25})])[1].startswith(
        "heldout loss has been no "
    )


def losses(*values, start=1):
    return [Stepped(n + start, {"loss": value}) for n, value in enumerate(values)]


def test_divergence_is_a_mean_and_no_spike(info):
    observer = Divergence(on=True, factor=2.0, window=4).build(info)
    assert reasons(observer, [Started(0, 99), *losses(9.0, 5.0, 1.0, 1.0, 1.0, 1.0, 4.9, 1.0, 1.0, 1.0)]) == [None] * 11
    assert reasons(observer, losses(3.0, 3.0)) == [None, None]
    assert observer(Stepped(13, {"loss": 3.0})) == (
        "the mean loss is 2.5000 over 4 steps, more than 2 times its lowest, 1.0000 (--observe.divergence)"
    )


def test_divergence_is_a_loss_that_is_no_number_for_a_while(info):
    observer = Divergence(on=True, not_finite=3).build(info)
    assert reasons(observer, losses(1.0, nan, inf, 1.0, nan, -inf)) == [None] * 6
    assert observer(Stepped(7, {"loss": nan})) == "loss has not been finite for 3 steps (--observe.divergence)"
    with pytest.raises(ValueError, match=r"^--observe.divergence.metric loss: a step has ce, z$"):
        observer(Stepped(8, {"ce": 1.0, "z": 1.0}))


def test_divergence_goes_on_from_the_file(info):
    write(info.folder / "metrics.jsonl", Started(0, 9), *losses(1.0, nan, nan, 1.0))
    observer = Divergence(on=True, not_finite=3).build(info)
    assert reasons(observer, [Started(3, 9), Stepped(4, {"loss": nan})]) == [
        None,
        "loss has not been finite for 3 steps (--observe.divergence)",
    ]


def test_a_whole_run_is_observed_by_all_at_once(info, capsys):
    observe = Observe(
        tensorboard=TensorBoard(on=True), profiler=Profiler(on=True, first=2, steps=1), gc=GarbageCollection(on=True),
        plateau=Plateau(on=True), divergence=Divergence(on=True),
    )  # fmt: skip
    observers = [Console(2), Jsonl(info.folder / "metrics.jsonl"), *build_observers(observe, info)]
    events = [Started(0, 4), *(Stepped(n, METRICS) for n in (1, 2, 3, 4)), *heldout(2.0), Stopped(4)]
    assert [fan_out(observers, event) for event in events] == [None] * 7
    assert len(observers) == 7
    close_observers(observers)
    out, err = capsys.readouterr()
    assert err == ""
    assert len(out.splitlines()) == 6  # steps 1, 2, 4, the profile, the evaluation, the collector
    assert {path.name for path in info.folder.iterdir()} == {"metrics.jsonl", "profile", "tensorboard"}
