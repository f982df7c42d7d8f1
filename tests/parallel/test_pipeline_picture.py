"""The command that draws schedules: its text, its picture, and what it says when it cannot."""

import subprocess
import sys

import numpy as np
import pytest

from olmo_fn.cli import main as cli
from olmo_fn.parallel.pipeline.schedule import schedule
from olmo_fn.planner.pipeline_picture import COLORS, _shade, draw, text
from olmo_fn.planner.pipeline_simulate import Costs, simulate


def main(words):
    """``olmo-fn pipeline``."""
    return cli.main(["pipeline", *map(str, words)])


def rgb(color):
    return np.array([round(255 * c) for c in color])


def area(path, color):
    """Pixels of a colour in a PNG."""
    from matplotlib.image import imread

    return int((np.abs(imread(path)[..., :3] * 255 - rgb(color)).max(-1) <= 1).sum())


def test_command_prints_and_draws(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    path = tmp_path / "schedule.png"
    assert main(["1f1b", "--ranks", "2", "--microbatches", "3", "--output", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:2] == ["rank 0  F0 F1 ·  ·  B0─── F2 B1─── ·  B2───", "rank 1  ·  F0 B0─── F1 B1─── F2 B2─── ·  ·"]
    assert "bubble 25.0 %" in out[3]
    assert out[-1] == str(path)
    forward, backward = (area(path, _shade(COLORS[op], 0, 1)) for op in "FB")
    assert 1.8 < backward / forward < 2.3, "a backward is drawn twice as long as a forward"


def test_chunks_are_told_apart(tmp_path):
    timeline = simulate(schedule("interleaved", 2, 2, 3))
    assert text(timeline, 200).splitlines()[0].split()[2:8] == ["F0a", "F1a", "F0b", "F1b", "F0c", "F1c"]
    draw(timeline, tmp_path / "a.png")
    areas = [area(tmp_path / "a.png", _shade(COLORS["F"], chunk, 3)) for chunk in range(3)]
    assert min(areas) > 0.5 * max(areas) > 1000


def test_wide_schedules_fold():
    timeline = simulate(schedule("zero_bubble", 4, 64))
    picture = text(timeline, 80)
    assert max(map(len, picture.splitlines())) <= 80
    rows = ["".join(band.splitlines()[rank].split("  ", 1)[1] for band in picture.split("\n\n")) for rank in range(4)]
    assert all(row.count(op) == 64 for row in rows for op in "FIW"), "a letter a tick, nothing lost where lines fold"


def test_other_costs():
    row = text(simulate(schedule("gpipe", 1, 1), Costs(F=0.5, B=1.5)), 80)
    assert row == "rank 0  F0 B0──────"


def test_help_needs_no_torch():
    code = "import sys, olmo_fn.planner.pipeline_command; print('torch' in sys.modules, 'matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert found.stdout.split() == ["False", "False"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["interleaved", "--chunks", "1"], "at least 2 chunks a rank"),
        (["1f1b", "--ranks", "0"], "--ranks is 0; it must be at least 1"),
        (["1f1b", "--costs.F", "0"], "costs must be positive"),
        (["1f1b", "--ranks", "3", "--costs.stages", "1", "2"], "costs of 2 stages, but 3 virtual stages"),
        (["1f1b", "--output", "/nowhere/a.png"], "/nowhere/a.png"),
    ],
)
def test_refused_in_one_line(args, message, capsys):
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["1f1b", "--output", str(tmp_path / "a.png")]) == 2
    assert 'pip install "olmo-fn[plot]"' in capsys.readouterr().err
