"""What docs/observers.md shows is what happens."""

import re
import subprocess
import sys
from pathlib import Path

import tyro
from programs import ROOT

from olmo_fn.train.observers import Observe
from olmo_fn.train.observers.jsonl import read_evaluations, read_metrics

DOC = (ROOT / "docs" / "observers.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", DOC, re.S)


def test_the_example_runs(tmp_path):
    code = "\n".join(blocks("python"))
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert [found.stdout] == blocks("text")


def test_an_observer_of_your_own_needs_the_events_only():
    imports = re.findall(r"^(?:from|import) (\S+)", blocks("python")[0], re.M)
    assert imports == ["pathlib", "olmo_fn.train.events"]


def test_the_lines_are_read_as_they_are_shown(tmp_path):
    path = Path(tmp_path, "metrics.jsonl")
    path.write_text(blocks("json")[0])
    assert [line["loss"] for line in read_metrics(path)] == [3.127]
    assert [line["loss"] for line in read_evaluations(path)] == [3.294]


def test_every_flag_exists_and_every_observer_has_a_row():
    values = {"mode": "offline", "space": "user/name", "first": "10"}
    for flag in sorted(set(re.findall(r"--observe\.([a-z.-]+)", DOC))):
        value = [values[flag.split(".")[-1]]] if flag.split(".")[-1] in values else []
        if not flag.startswith("own"):  # chosen before tyro sees the rest: tests/docs/test_extending.py
            tyro.cli(Observe, args=[f"--{flag}", *value])
    rows = re.findall(r"^\| `--observe\.([a-z]+)`", DOC, re.M)
    assert rows == list(Observe.__dataclass_fields__)
