"""The default corpus: made once, whole or not at all, honest about its bytes."""

import gzip
import json
import lzma
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from olmo_fn.data.corpus import Corpus, is_heldout_source, read_sources, tokenize_corpus
from olmo_fn.data.tokenizer import load

FILES = ["heldout.npy", "meta.json", "part-00000.npy", "tokenizer.json"]
STDLIB = Path(json.__file__).parent.parent


@pytest.fixture(scope="module")
def sources():
    """Some of the standard library, with documents on both sides."""
    found = dict(read_sources(STDLIB / "json"))
    found |= {f"email/{name}": text for name, text in read_sources(STDLIB / "email").items()}
    return dict(sorted(found.items()))


@pytest.fixture(scope="module")
def corpus(sources, tmp_path_factory):
    return tokenize_corpus(sources, tmp_path_factory.mktemp("cache") / "corpus", 400, show=False)


def test_the_tokens_are_the_text(sources, corpus):
    tokenizer = load(corpus.folder / "tokenizer.json")
    meta = json.loads((corpus.folder / "meta.json").read_text())
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (meta["vocab_size"], meta["eos_id"]) == (400, 0)
    held = [text for name, text in sources.items() if is_heldout_source(name)]
    train = [text for name, text in sources.items() if not is_heldout_source(name)]
    assert held
    for texts, name, counts in ((train, "part-00000.npy", meta["train"]), (held, "heldout.npy", meta["heldout"])):
        ids = np.fromfile(corpus.folder / name, meta["dtype"])
        assert len(ids) == counts["tokens"]
        assert (ids == meta["eos_id"]).sum() == counts["documents"] == len(texts)
        assert tokenizer.decode(ids) == "".join(texts)
        assert tokenizer.count_bytes(ids) == counts["bytes"] == len("".join(texts).encode())
    text = "".join(held).encode()
    assert corpus.gzip_bytes == len(gzip.compress(text, 9))
    assert corpus.xz_bytes == len(lzma.compress(text, preset=9))


def test_the_bpe_never_sees_held_out_text(sources, tmp_path):
    """Text on the held-out side does not change the tokenizer."""
    other = {n: ("zyx " * 5000 if is_heldout_source(n) else t) for n, t in sources.items()}
    a, b = (tokenize_corpus(s, tmp_path / k, 400, False) for k, s in (("a", sources), ("b", other)))
    for name in ("tokenizer.json", "part-00000.npy", "heldout.npy"):
        assert ((a.folder / name).read_bytes() == (b.folder / name).read_bytes()) == (name != "heldout.npy")


def test_sources_are_text_without_tests(tmp_path):
    for name in (
        "a.py",
        "test/b.py",
        "x/tests/c.py",
        "site-packages/d.py",
        "x/e.py",
        "x/f.txt",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    assert list(read_sources(tmp_path)) == ["a.py", "x/e.py"]
    with pytest.raises(ValueError, match=r"no sources in .* give token files with --data.paths"):
        read_sources(tmp_path / "test" / "nothing")


def test_the_split_of_this_python():
    """About 5 % of the standard library's text is held out, no generated file among it."""
    sources = read_sources(STDLIB)
    held = {name: len(text.encode()) for name, text in sources.items() if is_heldout_source(name)}
    assert 300_000 < sum(held.values()) < 800_000
    assert max(held.values()) < sum(held.values()) / 4
    assert not [name for name in held if name.startswith(("encodings/", "pydoc_data/"))]
    assert sum(len(text.encode()) for text in sources.values()) > 8_000_000


def test_cached(sources, corpus):
    start = time.perf_counter()
    again = tokenize_corpus({}, corpus.folder, 400)
    assert again == corpus
    assert isinstance(again, Corpus)
    assert time.perf_counter() - start < 0.1


SCRIPT = """
import sys
from pathlib import Path
from olmo_fn.data.corpus import read_sources, tokenize_corpus
print("ready", flush=True)
tokenize_corpus(read_sources(sys.argv[1]), Path(sys.argv[2]), 2000, show=False)
"""


def start(folder):
    command = [sys.executable, "-c", SCRIPT, str(STDLIB / "email"), str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    return process


def test_it_appears_whole(sources, tmp_path, monkeypatch):
    """One rename, of a folder with everything in it, is the moment at which the corpus is there."""
    renames = []

    def rename(source, target):
        renames.append(sorted(p.name for p in Path(source).iterdir()))
        assert not Path(target).exists()
        raise OSError("no rename today")

    monkeypatch.setattr("os.rename", rename)
    with pytest.raises(OSError, match="no rename today"):
        tokenize_corpus(sources, tmp_path / "corpus", 400, show=False)
    assert renames == [FILES]
    assert not list(tmp_path.iterdir())


def test_two_at_once(tmp_path):
    both = [start(tmp_path / "corpus") for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=60)
        assert process.returncode == 0, error
    assert [p.name for p in tmp_path.iterdir()] == ["corpus"]
    assert sorted(p.name for p in (tmp_path / "corpus").iterdir()) == FILES


def test_killed_while_it_is_made(tmp_path):
    process = start(tmp_path / "corpus")
    deadline = time.monotonic() + 30
    while not list(tmp_path.glob(".tmp-*")) and time.monotonic() < deadline:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "corpus").exists()
    made = tokenize_corpus(read_sources(STDLIB / "email"), tmp_path / "corpus", 2000, show=False)
    assert (made.folder / "part-00000.npy").stat().st_size > 0
