"""docs/generate.md: its commands and its snippet work, in their order, in one folder, with models that take no time."""

from __future__ import annotations

import io
import json
import re
import subprocess

import pytest
import torch
from programs import ROOT

from olmo_fn.checkpoint import save
from olmo_fn.cli import main as cli
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.formats.config_json import json_of
from olmo_fn.formats.huggingface import write_directory
from olmo_fn.formats.names import stored
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.spec import init
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.serialize import to_yaml
from olmo_fn.tree import at

PAGE = (ROOT / "docs" / "generate.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M)
CHATML = (ROOT / "tests" / "fixtures" / "chat" / "chatml.jinja").read_text()


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in with a run, a directory in Hugging Face's format, and a long text."""
    cfg = dense(16, 2, 2, 32, vocab_size=257, init_method="fan_in")
    params, run, chat = init(transformer.specs(cfg), 0), tmp_path / "runs" / "olmo2-tiny", tmp_path / "smollm2"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(to_yaml(Config(cfg, recipe=Recipe(sequence_length=128), run=Run(folder=str(run)))))
    byte_level().save(run / "tokenizer.json")
    save({"step": torch.tensor(1000), "params": params, "slots": {}}, run / "checkpoints", step=1000)
    parameters = ((path, at(params, path)) for path in stored(cfg, "huggingface"))
    write_directory(chat, cfg, parameters, torch.float32, config=json_of(cfg) | {"max_position_embeddings": 400})
    byte_level().save(chat / "tokenizer.json")
    (chat / "tokenizer_config.json").write_text(json.dumps({"chat_template": CHATML, "eos_token": "<|endoftext|>"}))
    (tmp_path / "long.txt").write_text("a long text " * 40)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def commands():
    """The shell's lines, and the Python, in the order of the page; files are written on the way."""
    for language, text in BLOCKS:
        for line in text.splitlines() if language == "sh" else ():
            yield language, line
        if language in ("python", "jinja"):
            yield language, text


def test_what_the_page_says_works(folder, monkeypatch, capsys):
    ran = set()
    for language, text in commands():
        if language == "jinja":
            (folder / re.match(r"\{# (\S+) #\}", text)[1]).write_text(text)
        elif language == "python":
            exec(compile(text, "generate.md", "exec"), {"__name__": "snippet"})
        elif "olmo-fn" not in text:
            subprocess.run(["bash", "-c", text], cwd=folder, check=True)
        else:
            ours, given = text[text.index("olmo-fn") :], text[: text.index("olmo-fn")].rstrip("| ")
            bash = ["bash", "-c", f"printf '%s\\0' {ours}"]  # its words, as the shell makes them
            words = subprocess.run(bash, cwd=folder, check=True, capture_output=True, text=True).stdout.split("\0")[1:-1]
            stdin = subprocess.run(["bash", "-c", given], cwd=folder, check=True, capture_output=True, text=True).stdout
            words += ["--max-tokens", "20"] if "--max-tokens" not in words else []  # this model has no end
            monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
            assert cli.main(words) == 0, (text, capsys.readouterr().err)
            said = capsys.readouterr()
            if "--truncate-prompt" in words:
                assert "tokens were left out (--truncate-prompt left)" in said.err
            if words[0] == "chat":
                assert said.out.count("\n") >= stdin.count("\n")
            ran.add(words[0])
    assert ran == {"generate", "chat"}


def test_the_tests_that_are_named_exist():
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", PAGE))
    assert len(named) >= 3
    assert all((ROOT / path).is_file() for path in named)
