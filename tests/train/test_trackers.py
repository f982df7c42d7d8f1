"""Each tracker, offline: the real package writes a run that is interrupted and goes on, and what it wrote is read back."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
import zipfile
from math import isnan
from pathlib import Path

import pytest
from programs import ROOT

from olmo_fn.train.events import RunInfo
from olmo_fn.train.observers import Observe, build_observers
from olmo_fn.train.observers.comet import Comet
from olmo_fn.train.observers.shared import run_id
from olmo_fn.train.observers.wandb import WandB

RUN = """
import math, sys
from pathlib import Path
import tyro
from olmo_fn.train.events import Evaluated, RunInfo, Said, Saved, Started, Stepped, Stopped
from olmo_fn.train.observers import Observe, build_observers, close_observers, fan_out

folder, start, end, steps = Path(sys.argv[1]), *map(int, sys.argv[2:5])
observe = tyro.cli(Observe, args=sys.argv[5:])
heavy = {"torch", "wandb", "comet_ml", "trackio", "tensorboard"} & sys.modules.keys()
assert not heavy, heavy
config = {"optim": {"lr": 3e-2, "betas": (0.9, 0.95), "rank": None}, "run": {"steps": steps}}
observers = build_observers(observe, RunInfo(folder, "my-run", config))
events = [Started(start, steps, folder if start else None), Said("hello")]
for n in range(start + 1, end + 1):
    loss = math.nan if n == 2 else 10 / n
    events += [Stepped(n, {"step": n, "loss": loss, "load": [0.25 * n, 0.5, math.inf], "none": [math.nan]}), Saved(n, folder)]
    if n % 2 == 0:
        events += [Evaluated(n, "heldout", {"loss": 20 / n, "tokens": 64})]
if end == steps:
    events += [Stopped(end)]
for event in events:
    assert fan_out(observers, event) is None
assert len(observers) == 1
close_observers(observers)
"""
OFFLINE = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def run(tmp_path):
    """Runs five steps of eight and breaks off, then goes on from step 4 in a new process; returns what was printed."""

    def both(*flags):
        said = ""
        for start, end, steps in ((0, 5, 8), (4, 8, 8)):
            command = [sys.executable, "-c", RUN, tmp_path / "run", str(start), str(end), str(steps), *flags]
            env = {**os.environ, **OFFLINE, "PYTHONPATH": str(ROOT), "TRACKIO_DIR": str(tmp_path / "trackio")}
            done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "did not close" not in done.stderr
            said += done.stdout + done.stderr
        return said

    (tmp_path / "run").mkdir()
    return both


def test_tensorboard(run, tmp_path):
    run("--tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "run" / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    read.Reload()
    loss = read.Scalars("train/loss")
    assert [x.step for x in loss] == list(range(1, 9))  # step 5 of the first process is hidden
    assert isnan(loss[1].value)
    assert [x.value for x in loss[2:]] == pytest.approx([10 / n for n in range(3, 9)])
    assert [(x.step, x.value) for x in read.Scalars("eval/heldout/loss")] == [
        (2, 10),
        (4, 5),
        (6, pytest.approx(20 / 6)),
        (8, 2.5),
    ]
    assert [x.histogram_value.num for x in read.Histograms("train/load")] == [2] * 8
    assert "train/none" not in read.Tags()["histograms"]
    (config,) = {x.tensor_proto.string_val[0] for x in read.Tensors("config/text_summary")}
    assert json.loads(config.decode().removeprefix("```json\n").removesuffix("\n```"))["optim"]["lr"] == 3e-2


def wandb_records(path):
    """The records of a ``.wandb`` file: LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = path.read_bytes(), 7, b""
    while at < len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole record, or its last part
            record = Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def test_wandb(run, tmp_path):
    run("--wandb", "--wandb.project", "tests", "--wandb.tags", "a", "b", "--wandb.mode", "offline")
    identity = (tmp_path / "run" / "wandb.id").read_text().strip()
    first, second = sorted((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}/*.wandb"), key=os.path.getctime)
    history: dict = {}
    for path, exit_code in ((first, 1), (second, 0)):
        records = list(wandb_records(path))
        (begun,) = [r.run for r in records if r.WhichOneof("record_type") == "run"]
        assert (begun.run_id, begun.project, begun.display_name, list(begun.tags)) == (identity, "tests", "my-run", ["a", "b"])
        config = {item.key: json.loads(item.value_json) for r in records for item in r.config.update}
        assert config["optim"]["lr"] == 3e-2
        assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [exit_code]
        for record in records:
            if record.WhichOneof("record_type") == "history":
                values = {"/".join(x.nested_key) or x.key: json.loads(x.value_json) for x in record.history.item}
                history.setdefault(record.history.step.num, {}).update(values)
    assert sorted(history) == list(range(1, 9))
    assert isnan(history[2]["train/loss"])
    assert history[4]["train/loss"] == 2.5
    heldout = {n: x["eval/heldout/loss"] for n, x in history.items() if "eval/heldout/loss" in x}
    assert heldout == {2: 10, 4: 5, 6: 20 / 6, 8: 2.5}
    assert history[8]["train/load/_type"] == "histogram"
    assert sum(history[8]["train/load/values"]) == 2
    assert not [name for name in history[8] if name.startswith("train/none")]


def test_comet(run, tmp_path):
    run("--comet", "--comet.offline", "--comet.project", "tests", "--comet.tags", "a")
    key = (tmp_path / "run" / "comet.id").read_text().strip()
    archives = sorted((tmp_path / "run" / "comet").glob(f"{key}*.zip"), key=os.path.getmtime)
    assert len(archives) == 2
    metrics: dict = {}
    for path in archives:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("experiment.json"))
            lines = [json.loads(line) for line in archive.read("messages.json").splitlines()]
        assert (about["offline_id"], about["project_name"], about["tags"]) == (key, "tests", ["a"])
        assert about["resume_strategy"] == "get_or_create"
        payloads = [line["payload"] for line in lines]
        params = {p["param"]["paramName"]: p["param"]["paramValue"] for p in payloads if "param" in p}
        assert params["optim|lr"] == 3e-2
        assert {"key": "Name", "value": "my-run"}.items() <= next(p for p in payloads if p.get("key") == "Name").items()
        assert not {line["type"] for line in lines} & {"installed_packages", "os_packages", "system_details", "git_metadata"}
        for p in payloads:
            if "metric" in p:
                metrics.setdefault(p["metric"]["metricName"], {})[p["metric"]["step"]] = p["metric"]["metricValue"]
    assert metrics["train/loss"] == {1: 10, 2: "NaN", 3: 10 / 3, 4: 2.5, 5: 2, 6: 10 / 6, 7: 10 / 7, 8: 1.25}
    assert metrics["eval/heldout/loss"] == {2: 10, 4: 5, 6: 20 / 6, 8: 2.5}
    histograms = [p["additional_params"] for p in payloads if p.get("upload_type") == "histogram3d"]
    assert [(h["fileName"], h["step"]) for h in histograms] == [("train/load", n) for n in range(5, 9)]


def test_trackio(run, tmp_path):
    assert "Resumed existing run: my-run-" in run("--trackio", "--trackio.project", "tests")
    name = f"my-run-{(tmp_path / 'run' / 'trackio.id').read_text()[:6]}"
    with sqlite3.connect(tmp_path / "trackio" / "tests.db") as base:
        rows = base.execute("select run_name, run_id, step, metrics from metrics order by id").fetchall()
        ((config,),) = base.execute("select config from configs").fetchall()
    assert {row[0] for row in rows} == {name}
    assert len({row[1] for row in rows}) == 1
    assert json.loads(config)["optim"]["lr"] == 3e-2
    metrics = [(step, json.loads(text)) for _, _, step, text in rows]
    losses = [(step, x["train/loss"]) for step, x in metrics if "train/loss" in x]
    assert losses == [(1, 10), (2, "NaN"), (3, 10 / 3), (4, 2.5), (5, 2), (5, 2), (6, 10 / 6), (7, 10 / 7), (8, 1.25)]
    heldout = [(step, x["eval/heldout/loss"]) for step, x in metrics if "eval/heldout/loss" in x]
    assert heldout == [(2, 10), (4, 5), (6, 20 / 6), (8, 2.5)]
    assert sum(metrics[0][1]["train/load"]["values"]) == 2


@pytest.mark.parametrize(
    ("name", "package"),
    [("wandb", "wandb"), ("comet", "comet_ml"), ("trackio", "trackio"), ("tensorboard", "tensorboard")],
)
def test_a_missing_package_is_said_with_its_extra(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    default = Observe()
    observe = Observe(**{name: type(getattr(default, name))(on=True)})
    with pytest.raises(ValueError, match=rf'^--observe.{name}: .*{package}.*; pip install "olmo-fn\[{name}\]"$'):
        build_observers(observe, RunInfo(tmp_path, "x", {}))
    text = (ROOT / "pyproject.toml").read_text()
    assert f"\n{name} = [" in text
    assert name in text.split("\ntest = ")[1].splitlines()[0]


def test_comet_online_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("COMET_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(ValueError, match=r"^--observe.comet: there is no API key; set COMET_API_KEY, or"):
        build_observers(Observe(comet=Comet(on=True)), RunInfo(tmp_path, "x", {}))


def test_whatever_keeps_a_tracker_from_beginning_is_one_line(tmp_path):
    (tmp_path / "wandb.id").mkdir()
    with pytest.raises(ValueError, match=r"^--observe.wandb: IsADirectoryError: [^\n]*$"):
        build_observers(Observe(wandb=WandB(on=True, mode="offline")), RunInfo(tmp_path, "x", {}))


def test_the_id_of_a_run_stays(tmp_path):
    path = Path(tmp_path, "new", "wandb.id")
    assert run_id(path) == run_id(path)
    assert len(run_id(path)) == 32
    assert run_id(tmp_path / "other.id") != run_id(path)
