"""The commands of docs/from-olmo-core.md run on a checkpoint of OLMo-core, and print what the page says."""

import re
import shlex
import tarfile

import pytest
from programs import ROOT

from olmo_fn.cli import main as cli

PAGE = (ROOT / "docs" / "from-olmo-core.md").read_text()
QUICK = ["--recipe.no-compile", "--run.threads", "1", "--run.sample="]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with tarfile.open(ROOT / "tests" / "fixtures" / "olmo_core" / "olmo2.tar.xz") as archive:
        archive.extractall(tmp_path / "olmo-core", filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_commands_print_what_the_page_says(folder, capsys):
    found = re.findall(r"```sh\n(.*?)```\n(?:\n```text\n(.*?)```)?", PAGE, re.S)
    assert len(found) == 3
    for commands, output in found:
        for line in commands.splitlines():
            program, name, *words = shlex.split(line)
            assert program == "olmo-fn"
            assert cli.main([name, *words, *(QUICK if name == "train" else [])]) == 0
        said = capsys.readouterr().out
        assert not output or said == output


def test_the_snippet_runs(folder, capsys):
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
    exec(compile(snippet, "from-olmo-core.md", "exec"), {})
    assert capsys.readouterr().out == "3 torch.Size([64, 8])\n"


def test_what_the_page_names_is_there():
    from olmo_fn.convert.olmo_core_training import SCHEDULES
    from olmo_fn.formats import dcp, torch_files

    assert dcp.IN_METADATA
    assert torch_files.IN_TENSORS
    for name in re.findall(r"`((?:olmo_fn|tests)/[\w/]+\.py)`", PAGE):
        assert (ROOT / name).is_file(), name
    assert not SCHEDULES.keys() & {"ComposableScheduler", "SequentialScheduler", "ExponentialScheduler"}
