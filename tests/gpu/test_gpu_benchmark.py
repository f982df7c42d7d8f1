"""The script for a machine with a GPU runs here without one, so that it cannot rot."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from programs import ROOT, python

SCRIPT = ROOT / "benchmarks" / "gpu.py"
SECTIONS = {"card", "parity", "attention", "step", "slice_of_7b", "checkpoint", "nccl", "trainer", "captured"}


def test_every_section_runs(tmp_path: Path):
    done = python(SCRIPT, "--fake", "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()]
    assert {row["section"] for row in rows} == SECTIONS
    assert not [row for row in rows if row["figure"] in ("error", "left out")]
    passed = sum(row["passed"] is True for row in rows)
    assert done.stdout.splitlines()[-1] == f"{passed} passed, 0 failed"
    assert passed > 30


def test_it_compares_with_a_run_of_the_same_device(tmp_path: Path):
    old = tmp_path / "old.jsonl"
    rows = [
        {"section": "card", "figure": "device", "value": "cpu"},
        {"section": "card", "figure": "copy (TB/s)", "value": 0.001},
    ]
    old.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = python(SCRIPT, "--fake", "--only", "card", "--out", tmp_path, "--compare", old)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith("card        copy") and "  x" in line for line in done.stdout.splitlines())
    old.write_text(old.read_text().replace("cpu", "another"))
    done = python(SCRIPT, "--fake", "--only", "card", "--out", tmp_path, "--compare", old)
    assert (done.returncode, "no comparison" in done.stderr) == (2, True)


def test_it_needs_no_library_of_the_command_line():
    """Without tyro, as in images with torch for GPUs."""
    code = "import sys, runpy; sys.modules['tyro'] = None; sys.argv[1:] = ['--help']; "
    code += f"runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout[:6]) == (0, "usage:"), done.stderr
