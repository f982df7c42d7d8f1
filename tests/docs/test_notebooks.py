"""The notebooks run, and what is committed is what a run has written; the code of docs/research.md runs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
QUICK = ("gradient_checks",)
WITHOUT_PICTURE = ("gradient_checks",)


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=() if p.stem in QUICK else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_runs(path):
    """Each ends its claims in assertions, so an execution without an error has checked them."""
    book = nbformat.read(path, 4)
    assert any("assert" in cell.source for cell in code_cells(path))
    NotebookClient(book, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_executed(path):
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any(output.get("text") for output in outputs)
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert bool(pictures) == (path.stem not in WITHOUT_PICTURE)
    assert path.stat().st_size < 300_000
    assert str(Path.home()) not in path.read_text(), "a path of somebody's machine"


def test_every_notebook_is_in_the_docs():
    named = set(re.findall(r"\.\./notebooks/(\w+)\.ipynb", (ROOT / "docs" / "research.md").read_text()))
    assert named == {path.stem for path in NOTEBOOKS}


@pytest.mark.parametrize("name", ["research", "muon"])
def test_the_code_of_the_docs_runs(name):
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs" / f"{name}.md").read_text(), re.S))
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr


@pytest.mark.slow
def test_runs_at_once_are_faster_than_in_turn():
    """K = 4, eager, medians of 30 rounds in turn."""
    command = [sys.executable, "benchmarks/vmap.py", "--d-model", "16", "--hidden-size", "32"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=True)
    assert json.loads(found.stdout)["speedup"] > 1
