"""The pages about data, models, configs and many processes: their commands and snippets work, in their order, in one folder."""

import json
import re
import shlex
import subprocess
import sys

import pytest
from programs import ROOT

from olmo_fn.cli import main as cli

PAGES = ("models", "your-data", "your-model", "configs", "many-gpus", "hugging-face", "datasets", "experts", "hybrids")
SAID = {
    "models": "loss ",
    "your-data": "perplexity",
    "your-model": "loss ",
    "configs": "Heldout(loss=",
    "many-gpus": "fits",
    "hugging-face": "the same model",
    "datasets": "repeats",
    "experts": "loads of layer 0",
    "hybrids": "qwen3.5-9b 81 305 2,097",
}
SMALL = """--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.hidden-size 32 --recipe.no-compile
--recipe.sequence-length 16 --recipe.batch-size 4 --recipe.dtype float32 --run.threads 1 --run.steps 6 --schedule.warmup 2
--run.eval-tokens 500 --run.sample="""
HYBRID = """--model.d-model 24 --recipe.no-compile --recipe.sequence-length 16 --recipe.batch-size 4 --recipe.dtype float32
--run.threads 1 --run.steps 6 --schedule.warmup 2 --run.eval-tokens 500 --run.sample="""
FEW = "--recipe.no-compile --recipe.sequence-length 16 --recipe.dtype float32 --run.threads 1 --run.steps 6 --run.sample="
TOKENS = "--model.vocab-size 300 --data.paths tokens/part-*.npy --data.tokenizer tokens/tokenizer.json"


def blocks(page):
    """The fenced blocks of a page, as (language, text)."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "docs" / f"{page}.md").read_text(), re.S | re.M)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder to stand in, with a few texts: a page, and the beginnings of the paragraphs of all pages."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "page.md").write_text((ROOT / "docs" / "muon.md").read_text()[:1500])
    paragraphs = [text[:100] for path in sorted((ROOT / "docs").glob("*.md")) for text in path.read_text().split("\n\n")]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in paragraphs)
    (tmp_path / "texts" / "paragraphs.jsonl").write_text(lines)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OLMO_FN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # no pictures, which take a second each
    return tmp_path


def exit_code(words):
    """That of the program; help ends it in an exception."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code


def command(line):
    """The words of a command in sizes that take no time; of a job of several processes the dry run."""
    words = shlex.split(line)
    if words[0] == "torchrun":
        words = words[words.index("olmo_fn") :]
    _, name, *rest = words
    small = {"olmo2-7b": "olmo2-tiny", "olmo2-1b": "olmo2-tiny", "16": "2", "8": "2"}
    words = [small.get(word, word) for word in rest] if {"--mesh.dp-shard", "--gpus"} & {*rest} else rest
    if name == "train" and {"olmo2-tiny", "mine"} & {*words} and "--help" not in words:
        small = SMALL.replace("--model.hidden-size 32", "") if "moe" in words else SMALL
        words += shlex.split(small) + ([] if {"--data.paths", "--data.mix"} & {*words} else shlex.split(TOKENS))
    if name == "train" and "olmo-hybrid-tiny" in words:
        words += shlex.split(f"{HYBRID} {TOKENS}")
    if "--init.from-hf" in words:
        words += shlex.split(FEW)
    if "--mesh.dp-shard" in words or "--nproc" in words:
        words += ["--dry-run", "--gpus", "2"]
    return [name, *words]


@pytest.mark.parametrize("page", PAGES)
def test_what_the_page_says_works(page, folder, capsys):
    found = blocks(page)
    for _, text in found:
        if named := re.match(r"# ([\w.]+\.(?:py|yaml))\n", text):
            (folder / named[1]).write_text(text)
    if page not in ("your-data", "hugging-face"):
        assert cli.main(["tokenize", "texts", "--output", "tokens", "--tokenizer", "bpe", "--vocab-size", "300"]) == 0
    for language, text in found:
        if language == "python" and not re.match(r"# [\w.]+\.py\n", text):
            exec(compile(text, f"{page}.md", "exec"), {"__name__": "snippet"})
        for line in text.splitlines() if language == "sh" else ():
            if not line.startswith("cat "):
                assert exit_code(command(line)) == 0, (line, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert SAID[page] in said


def test_a_script_for_slurm_is_one_for_bash():
    (script,) = (text for language, text in blocks("many-gpus") if language == "bash")
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    flags = re.search(r"-m olmo_fn train (.*)", script)[1]
    assert exit_code(["train", *shlex.split(flags), "--help"]) == 0


def test_the_tests_that_are_named_exist():
    page = (ROOT / "docs" / "reliability.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)`:? ?((?:`test_\w+`(?:, )?)*)", page)
    assert len(named) > 30
    for path, tests in named:
        source = (ROOT / path).read_text()
        missing = [name for name in re.findall(r"test_\w+", tests) if not re.search(rf"^def {name}\(", source, re.M)]
        assert not missing, path
