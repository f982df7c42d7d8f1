"""From settings to data: what is held out, and every mistake caught before anything is allocated."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

import olmo_fn.data.source as source_module
from olmo_fn.data import training
from olmo_fn.data.corpus import tokenize_corpus
from olmo_fn.data.heldout import TokenSet, heldout_batches
from olmo_fn.data.settings import Data, cache_dir
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.data.tokenizer import byte_level

SIZES = constant_sizes(4, 10)


def write(path, values, dtype="<u2"):
    np.array(values, dtype).tofile(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Two files of 105 and 57 tokens: 10 and 5 windows of 10; token = 1000 file + position."""
    return [write(tmp_path / f"{f}.npy", 1000 * f + np.arange(n)) for f, n in ((1, 105), (2, 57))]


def test_the_last_windows_are_held_out(files, tmp_path):
    source = open_data(Data((str(tmp_path / "*.npy"),), heldout_fraction=0.2), 3000, SIZES)
    assert source.heldout["heldout"].tokens.tolist() == [*range(2020, 2050)]
    seen = {int(t) for step in range(source.train.steps_per_epoch) for t in source.train(step)["input_ids"][:, 0]}
    assert seen == {*range(1000, 1100, 10), 2000, 2010}
    assert source.train.num_instances == 12
    assert (source.tokenizer, source.eos_id, source.heldout["heldout"].num_bytes(None)) == (None, None, None)


def test_nothing_is_held_out_at_0(files):
    source = open_data(Data(tuple(files), heldout_fraction=0.0), 3000, SIZES)
    assert (source.train.num_instances, source.heldout) == (15, {})
    assert list(heldout_batches(TokenSet(np.zeros(0, np.uint8)), 10, 5, 2, None)) == []


def test_a_small_fraction_still_holds_out_a_window_and_a_large_one_is_capped(files, monkeypatch):
    assert len(open_data(Data(tuple(files), heldout_fraction=1e-9), 3000, SIZES).heldout["heldout"]) == 10
    monkeypatch.setattr(training, "HELDOUT_TOKENS", 25)
    assert len(open_data(Data(tuple(files), heldout_fraction=0.5), 3000, SIZES).heldout["heldout"]) == 20


def test_heldout_files(files):
    source = open_data(Data((files[0],), heldout_paths=(files[1],)), 3000, SIZES)
    assert source.train.num_instances == 10
    assert source.heldout["heldout"].tokens.tolist() == [*range(2000, 2057)]
    labels = torch.cat([b["labels"].reshape(-1) for b in heldout_batches(source.heldout["heldout"], 10, 5, 2, source.eos_id)])
    assert sorted(labels[labels >= 0].tolist()) == [*range(2001, 2057)]  # no known context for the first


def test_named_sets_and_label_masks(files, tmp_path):
    """use-15: sets by name, each with its masks; a held-out fraction has those of training; bytes are of what is predicted."""
    masks = [str(tmp_path / f"{n}.mask") for n in (105, 57)]
    for path, n in zip(masks, (105, 57), strict=True):
        (np.arange(n) % 3 > 0).tofile(path)
    both = (f"web={files[1]}", f"code={files[0]}", f"web={files[0]}")
    data = Data((write(tmp_path / "own.npy", range(50)),), both, heldout_mask_paths=(masks[1], masks[0], masks[0]))
    found = open_data(data, 3000, SIZES).heldout
    assert {name: len(each) for name, each in found.items()} == {"web": 162, "code": 105}
    assert np.array_equal(found["web"].mask, np.concatenate([np.arange(57) % 3 > 0, np.arange(105) % 3 > 0]))
    labels = torch.cat([b["labels"].reshape(-1) for b in heldout_batches(found["code"], 10, 5, 2, eos_id=0)])
    assert sorted(labels[labels >= 0].tolist()) == [1000 + i for i in range(105) if i % 3]
    data = Data(tuple(files), heldout_fraction=0.2, label_mask_paths=tuple(masks))
    assert np.array_equal(open_data(data, 3000, SIZES).heldout["heldout"].mask, np.arange(20, 50) % 3 > 0)
    part = TokenSet(np.frombuffer("hé!".encode(), np.uint8), np.array([True, False, False, True]))
    assert part.num_bytes(byte_level()) == 2
    with pytest.raises(ValueError, match="1 label mask files for 3 token files"):
        open_data(Data((files[1],), (f"web={files[0]}",) * 3, heldout_mask_paths=(masks[0],)), 3000, SIZES)


@pytest.fixture
def tokenized(tmp_path):
    for i in range(40):
        (tmp_path / f"{i}.txt").write_text(f"é{i} " * (i + 5))
    out = tmp_path / "out"
    meta = tokenize(Tokenize((str(tmp_path / "*.txt"),), str(out), "byte", workers=1, heldout=0.2))
    return out, meta


def test_what_the_command_wrote(tokenized):
    """Bytes are those of the raw text; the type is meta.json's, not that of a model of 70,000 ids."""
    out, meta = tokenized
    data = Data((f"{out}/part-*.npy",), (f"{out}/heldout.npy",), tokenizer=f"{out}/tokenizer.json")
    for size in (257, 70_000):
        source = open_data(data, size, constant_sizes(4, 16))
        assert source.heldout["heldout"].num_bytes(source.tokenizer) == meta["heldout"]["bytes"]
        assert len(source.heldout["heldout"]) == meta["heldout"]["tokens"]
        assert source.eos_id == 256
    labels = torch.cat([b["labels"].reshape(-1) for b in heldout_batches(source.heldout["heldout"], 16, 4, 3, source.eos_id)])
    assert (labels >= 0).sum() == meta["heldout"]["tokens"]  # the first token and every end of a document too
    without = open_data(Data((f"{out}/part-*.npy",)), 70_000, constant_sizes(4, 16))
    assert (without.train.instances.files[0].dtype, without.eos_id) == ("uint16", 256)


def test_another_meta_json_is_left_alone(files, tmp_path):
    for other in ("[1]", "{}", "{", '{"dtype": "float32", "eos_id": 0}', '{"dtype": "uint8"}'):
        (tmp_path / "meta.json").write_text(other)
        assert open_data(Data((files[0],)), 3000, SIZES).train.instances.files[0].dtype == "uint16"


def test_mistakes(files, tokenized, tmp_path):
    out, _ = tokenized
    one, two = files
    tokenizer = f"{out}/tokenizer.json"
    (tmp_path / "empty.npy").touch()
    narrow = write(tmp_path / "narrow.npy", range(11), "u1")
    for data, (vocab, length, batch), message in [
        (Data(("no-*.npy",)), (3000, 10, 4), "no token file matches 'no-*.npy' (from "),
        (Data((one, str(tmp_path / "empty.npy"))), (3000, 10, 4), "empty.npy' is empty"),
        (Data((narrow,)), (3000, 5, 1), "narrow.npy' has 11 bytes, not a multiple of the 2 bytes of uint16"),
        (Data((one, two)), (2040, 10, 4), "token 2040 at offset 40 of '" + two),
        (Data((one,), (two,)), (2040, 10, 4), "token 2040 at offset 40 of '" + two),
        (
            Data((one, two)),
            (3000, 106, 4),
            f"106 is longer than every token file (the longest, '{one}', has 105 tokens)",
        ),
        (Data((one, two)), (3000, 10, 15), "a batch of 15 windows is more than the 14 of 10 tokens"),
        (Data((one, two), (two,)), (3000, 10, 4), "2.npy' is in --data.paths and in --data.heldout-paths"),
        (
            Data((one,), tokenizer=tokenizer),
            (200, 10, 4),
            "tokenizer.json' has 257 ids, the model a vocabulary of 200",
        ),
        (Data((one,), tokenizer=tokenizer), (3000, 10, 4), "token 1000 at offset 0"),
        (Data((one, two), label_mask_paths=(narrow,)), (3000, 10, 4), "1 label mask files for 2 token files"),
        (Data((one,), order_seed=-1), (3000, 10, 4), "--data.order-seed must not be negative"),
        (
            Data((one,), heldout_fraction=1.0),
            (3000, 10, 4),
            "--data.heldout-fraction must be from 0 to below 1",
        ),
        (Data(tokenizer=tokenizer), (3000, 10, 4), "--data.tokenizer needs --data.paths"),
        (Data(cache_dir=one), (300, 10, 4), f"cannot keep the default corpus in '{one}' ("),
        (Data(cache_dir=str(tmp_path)), (200, 10, 4), "--vocab-size is 200; it must be at least 257"),
    ]:
        with pytest.raises(ValueError, match=r".") as e:
            open_data(data, vocab, constant_sizes(batch, length))
        assert message in str(e.value)
        assert "\n" not in str(e.value)


def test_the_default_corpus(tmp_path, monkeypatch):
    """Without paths: the corpus, its held-out file, its tokenizer, and what gzip and xz make of it."""
    asked = []

    def small(folder, vocab_size, show):
        asked.append((folder, vocab_size, show))
        sources = {f"{i}.py": f"value_{i} = {i}\n" * 20 for i in range(60)}
        return tokenize_corpus(sources, folder / "small", vocab_size, show)

    monkeypatch.setattr(source_module, "stdlib_corpus", small)
    source = open_data(Data(cache_dir=str(tmp_path)), 300, constant_sizes(4, 16), show=False)
    assert asked == [(tmp_path, 300, False)]
    meta = json.loads((tmp_path / "small" / "meta.json").read_text())
    assert source.heldout_compressed == {"gzip -9": meta["gzip_bytes"], "xz -9": meta["xz_bytes"]}
    found = source.heldout["heldout"]
    assert (found.num_bytes(source.tokenizer), len(found)) == (meta["heldout"]["bytes"], meta["heldout"]["tokens"])
    assert source.train.instances.files[0].num_tokens == meta["train"]["tokens"]
    open_data(Data(cache_dir=str(tmp_path)), 100_352, constant_sizes(4, 16), show=False)
    assert asked[1][1] == 4096


def test_cache_dir(monkeypatch, tmp_path):
    monkeypatch.setenv("OLMO_FN_CACHE", str(tmp_path))
    assert cache_dir(Data()) == tmp_path
    assert cache_dir(Data(cache_dir="/x")).as_posix() == "/x"
    monkeypatch.delenv("OLMO_FN_CACHE")
    monkeypatch.setenv("HOME", "/home/someone")
    assert cache_dir(Data()).as_posix() == "/home/someone/.cache/olmo_fn"


def test_settings_and_command_import_no_torch():
    script = "import olmo_fn.data.settings, olmo_fn.data.tokenize, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


def test_bytes_of_text_cut_inside_a_character(tmp_path):
    """A held-out fraction may begin inside a document, even inside a character: bytes are still exact."""
    byte_level().save(tmp_path / "tokenizer.json")
    path = write(tmp_path / "t.npy", list("é".encode() * 50))
    data = Data((path,), tokenizer=str(tmp_path / "tokenizer.json"), heldout_fraction=0.2)
    source = open_data(data, 257, constant_sizes(2, 5))
    assert source.heldout["heldout"].num_bytes(source.tokenizer) == len(source.heldout["heldout"]) == 20
