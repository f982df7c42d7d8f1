"""What the README shows is what happens; and the commands of the pages that have no test of their own."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace

import pytest
from programs import ROOT, python

from olmo_fn.presets import CONFIGS
from olmo_fn.train.loop import Result
from olmo_fn.train.report import next_commands
from olmo_fn.train.session import open_run

README = (ROOT / "README.md").read_text()
PAGES = [(ROOT / "docs" / f"{name}.md").read_text() for name in ("muon", "pipeline", "planning", "schedules")]
COMMANDS = {*re.findall(r"`((?:python|olmo-fn) [^`]+)`", README)}
COMMANDS |= {command for page in PAGES for command in re.findall(r"^    ((?:python|olmo-fn) .*?) *(?:#.*)?$", page, re.M)}
SMALL = """--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.hidden-size 32 --schedule.name range-test
--schedule.lowest 1e-5 --recipe.no-compile --recipe.sequence-length 16 --recipe.dtype float32 --run.threads 1 --run.steps 6
--run.checkpoint-every 1 --run.eval-tokens 100"""


def test_the_recipe_runs():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}  # quicker for what is as small
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert found.returncode == 0, found.stderr
    assert re.fullmatch(r"step 3, loss 5\.\d\n", found.stdout)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder with the documents of this project."""
    folder = tmp_path_factory.mktemp("texts")
    for path in (ROOT / "docs").glob("*.md"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """The folder of a small run on them, a range test."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    tokens = folder.parent / "tokens"
    done = python("-m", "olmo_fn", "tokenize", texts, "--output", tokens, "--tokenizer", "byte")
    assert done.returncode == 0, done.stderr
    data = ("--data.paths", tokens / "part-*.npy", "--data.tokenizer", tokens / "tokenizer.json", "--run.folder", folder)
    done = python("train.py", "olmo2-tiny", *shlex.split(SMALL), *data)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def directories(run, tmp_path_factory):
    """A Hugging Face directory with a chat template, and a checkpoint of OLMo-core."""
    folder = tmp_path_factory.mktemp("directories")
    assert python("-m", "olmo_fn", "convert", "to-hf", run, folder / "hf").returncode == 0
    (folder / "hf" / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    with tarfile.open(ROOT / "tests" / "fixtures" / "olmo_core" / "olmo2.tar.xz") as archive:
        archive.extractall(folder / "core", filter="data")
    return {"HF-DIR": folder / "hf", "CORE-DIR": folder / "core" / "run" / "step3"}


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_commands_run(command, texts, run, directories, tmp_path):
    """Training is a dry run, and benchmarks only say what they can do; all else does its work, on a run of 6 steps."""
    inputs = {
        "runs/olmo2-tiny/config.yaml": run / "config.yaml",
        "runs/olmo2-tiny": run,
        "runs/range": run,
        "DIR": texts,
        **directories,
    }
    outputs = {
        name: tmp_path / name.replace("/", "-")
        for name in ("tokens", "runs/mean", "runs/new", "tiny.gguf", "lr.png", "schedule.png")
    }
    fewer = {"184": 3, "1024": 16}  # the step that is replayed, accelerators
    words = [str({**inputs, **outputs, **fewer}.get(word, word)) for word in shlex.split(command)]
    if words[1] == "train.py" and not {"--help", "--dry-run"} & {*words}:
        words += ["--dry-run"]
    elif words[1].startswith("benchmarks/"):
        words += ["--help"]
    elif "to-gguf" in words:
        words += ["--no-tokenizer"]  # the run's is bytes alone, which llama.cpp does not read
    found = python(*(words[1:] if words[0] == "python" else ["-m", "olmo_fn", *words[1:]]))
    assert found.returncode == 0, found.stderr
    assert found.stdout or words[1] == "chat"  # to which nobody says anything
    assert all(path.exists() for path in outputs.values() if str(path) in words)


def test_what_to_type_next_is_what_a_run_says():
    cfg = CONFIGS["olmo2-tiny"]
    session = open_run(replace(cfg, run=replace(cfg.run, folder="runs/olmo2-tiny")))
    assert next_commands(Result(session, 1000, None, 0, "")) in README


def test_the_plan_in_the_docs_is_the_one_that_is_tested():
    """`tests/planner/test_plan_cli.py` makes it anew."""
    assert (ROOT / "tests/golden/plan-olmo2-32b.txt").read_text() in (ROOT / "docs/planning.md").read_text()
