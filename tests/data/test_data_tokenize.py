"""The tokenizing command: all kinds of input, any number of workers, nothing half-written."""

import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from olmo_fn.cli import main as cli
from olmo_fn.data.documents import chunks, documents
from olmo_fn.data.encode import is_heldout
from olmo_fn.data.inputs import expand
from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.data.tokenizer import byte_level, load, train_bpe


def main(words):
    """``olmo-fn tokenize``."""
    return cli.main(["tokenize", *map(str, words)])


def some_texts(n, seed=0):
    rng = random.Random(seed)
    words = ["alpha", "beta", "gamma", "Straße", "日本", "x = 1\n", "\n\n", "<|endoftext|>", "12345"]
    return [" ".join(rng.choices(words, k=rng.randrange(1, 60))) for _ in range(n)]


def jsonl(texts):
    return "".join(json.dumps({"id": i, "text": t}, ensure_ascii=i % 2 == 0) + "\n" for i, t in enumerate(texts)).encode()


@pytest.fixture
def inputs(tmp_path):
    """A folder with every kind of input, and its documents in the order of the files."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    texts = some_texts(400)
    (folder / "a.jsonl").write_bytes(jsonl(texts[:100]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(jsonl(texts[100:200])))
    pq.write_table(pa.table({"text": texts[200:300], "n": range(100)}), folder / "c.parquet", row_group_size=30)
    for i, text in enumerate(texts[300:]):
        (folder / "sub" / f"{i:03}.txt").write_text(text, newline="")
    (folder / ".hidden").write_bytes(b"\xff")
    return folder, texts


def split(ids, eos):
    """The documents of a token stream, without their end-of-document tokens."""
    ends = np.flatnonzero(ids == eos)
    assert len(ids) == ends[-1] + 1
    return [document[:-1] for document in np.split(ids, ends + 1)[:-1]]


def test_documents_of_every_kind_in_order(inputs):
    folder, texts = inputs
    files, left_out = expand([str(folder)])
    assert left_out == {str(folder / ".hidden"): "hidden"}
    assert [f.rsplit("/", 1)[1] for f in files[:3]] == ["a.jsonl", "b.jsonl.gz", "c.parquet"]
    for size in (1, 1000, 1 << 20):
        pieces = list(chunks(files, size))
        assert [t for chunk in pieces for t in documents(chunk, "text")] == texts
    assert len(list(chunks(files, 1000))) > 10
    assert expand([str(folder / "*.jsonl*"), str(folder / "a.jsonl")]).files == files[:2]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe", "file"])
def test_round_trip(inputs, tmp_path, tokenizer):
    folder, texts = inputs
    if tokenizer == "file":
        train_bpe(texts, 400).save(tmp_path / "given.json")
        tokenizer = str(tmp_path / "given.json")
    out = tmp_path / "out"
    config = Tokenize((str(folder),), str(out), tokenizer, vocab_size=300, workers=1, heldout=0.1, part_tokens=3000)
    meta = tokenize(config)
    assert meta == json.loads((out / "meta.json").read_text())
    backend = load(out / "tokenizer.json")
    assert (backend.vocab_size, backend.eos_id) == (meta["vocab_size"], meta["eos_id"])
    parts = sorted(out.glob("part-*.npy"))
    sides = {}
    for side, paths in {"train": parts, "heldout": [out / "heldout.npy"]}.items():
        ids = [np.fromfile(path, meta["dtype"]) for path in paths]
        assert [meta["files"][p.name]["tokens"] for p in paths] == [len(i) for i in ids]
        sides[side] = [backend.decode(d) for d in split(np.concatenate(ids), backend.eos_id)]
        counts = {
            "documents": len(sides[side]),
            "tokens": sum(map(len, ids)),
            "bytes": sum(len(t.encode()) for t in sides[side]),
        }
        assert meta[side] == counts
        assert backend.count_bytes(np.concatenate(ids)) == counts["bytes"]
    held = set(sides["heldout"])
    assert sides["train"] == [t for t in texts if t not in held]
    assert sides["heldout"] == [t for t in texts if t in held]
    assert 10 < len(sides["heldout"]) < 80
    assert not list(out.glob(".tmp*"))


def test_parts_begin_anew(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(some_texts(8000)))
    config = Tokenize((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), "byte", workers=1, heldout=0, part_tokens=500_000)
    meta = tokenize(config)
    assert sorted(meta["files"]) == ["part-00000.npy", "part-00001.npy"]
    assert meta["files"]["part-00000.npy"]["tokens"] >= 500_000
    assert meta["train"]["documents"] == 8000
    assert not (tmp_path / "out" / "heldout.npy").exists()


def test_the_command_end_to_end_and_any_number_of_workers(inputs, tmp_path):
    """In real processes: the files are the same, and the last line is the command that trains on them."""
    folder, _ = inputs
    (folder / "large.jsonl").write_bytes(jsonl(some_texts(9000, seed=1)))  # several chunks
    outputs = []
    for workers in ("1", "3"):
        out = tmp_path / f"out{workers}"
        command = [sys.executable, "-m", "olmo_fn", "tokenize", str(folder), "--output", str(out)]
        command += f"--vocab-size 500 --workers {workers} --heldout 0.05 --part-tokens 200000".split()
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == (
            f"python train.py olmo2-tiny --data.paths '{out}/part-*.npy' --data.tokenizer {out}/tokenizer.json "
            f"--run.folder runs/out{workers} --data.heldout-paths {out}/heldout.npy --model.vocab-size 325"
        )
        assert not done.stderr  # it is no terminal
        outputs.append({p.name: p.read_bytes() for p in out.iterdir() if p.name != "meta.json"})
    assert outputs[0] == outputs[1]
    assert {"part-00000.npy", "part-00001.npy", "heldout.npy", "tokenizer.json"} <= set(outputs[0])


def test_the_bpe_never_sees_held_out_documents(tmp_path):
    """Other text on the held-out side does not change the tokenizer or the training tokens."""
    texts = some_texts(100)
    others = iter([t for i in range(1000) if is_heldout(t := f"{i} " + "zyx " * 300, 0.2)])
    changed = [next(others) if is_heldout(t, 0.2) else t for t in texts]
    assert texts != changed
    written = []
    for name, side in {"a": texts, "b": changed}.items():
        (tmp_path / f"{name}.jsonl").write_bytes(jsonl(side))
        out = tmp_path / name
        tokenize(Tokenize((f"{out}.jsonl",), str(out), "bpe", vocab_size=320, workers=1, heldout=0.2))
        written.append([(out / f).read_bytes() for f in ("tokenizer.json", "part-00000.npy", "heldout.npy")])
    assert written[0][:2] == written[1][:2]
    assert written[0][2] != written[1][2]


def written(folder, process):
    return list(folder.glob("out/.unfinished/part-00000.npy"))


def a_worker_starts(folder, process):
    """One that is still importing; the other child is multiprocessing's own."""
    started = sum(len(path.read_text().split()) for path in Path(f"/proc/{process.pid}/task").glob("*/children")) > 1
    time.sleep(0.1 * started)
    return started


@pytest.mark.parametrize("moment", [written, a_worker_starts])
def test_interrupted(tmp_path, moment):
    """Ctrl-C, which reaches the workers too: one line, exit code 130, nothing left but what can be gone on from."""
    (tmp_path / "a.jsonl").write_bytes(jsonl(some_texts(3000)) * 30)
    command = [
        sys.executable,
        "-m",
        "olmo_fn",
        "tokenize",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        "byte",
    ]
    command += ["--output", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not moment(tmp_path, process) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "interrupted\n")
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {".unfinished"}


def test_copies_of_a_document_are_on_one_side(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl(some_texts(50) * 4))
    meta = tokenize(Tokenize((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), "byte", workers=1, heldout=0.3))
    ids = {s: np.fromfile(tmp_path / "out" / f, meta["dtype"]) for s, f in (("t", "part-00000.npy"), ("h", "heldout.npy"))}
    train, heldout = ({bytes(d.tolist()) for d in split(ids[side], 256)} for side in "th")
    assert train
    assert heldout
    assert not train & heldout


def run(capsys, *arguments):
    code = main(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": 1, "id": 2}\n',
            "a.jsonl' line 2 has no text in 'text'; there is: body, id;",
        ),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', "a.jsonl' line 3 is no JSON object but list; `jq -c"),
        ("a.jsonl", b'{"text": "x"\n', "a.jsonl' line 1 cannot be read as JSON: "),
        ("a.jsonl", b'{"text": "\xff"}\n', "a.jsonl' line 1 is not UTF-8 text (byte 10)"),
        ("a.txt", b"ab\xff", "a.txt' is not UTF-8 text (byte 2)"),
        ("a.jsonl.gz", gzip.compress(jsonl(["x"] * 9), mtime=0)[:-20], "cannot read '"),
        ("a.jsonl.gz", b"not gzip", "Not a gzipped file"),
        ("a.parquet", b"not parquet", "a.parquet' is not a parquet file that can be read: "),
        ("a.jsonl", b"", "no training documents in the 1 input files"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    code, error = run(capsys, str(tmp_path / name), "--output", str(out), "--tokenizer", "byte", "--workers", "1")
    assert code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(out.iterdir())


def test_parquet_columns(tmp_path, capsys):
    pq.write_table(
        pa.table({"body": ["a"], "n": [None]}, pa.schema([("body", "string"), ("n", "int64")])),
        tmp_path / "a.parquet",
    )
    common = (
        str(tmp_path / "a.parquet"),
        "--output",
        str(tmp_path / "out"),
        "--tokenizer",
        "byte",
        "--workers",
        "1",
    )
    assert "has no column 'text'; there is: body, n; name the column" in run(capsys, *common)[1]
    assert "row group 0 row 0 has no text in 'n' but null" in run(capsys, *common, "--text-field", "n")[1]
    assert run(capsys, *common, "--text-field", "body", "--heldout", "0")[0] == 0


def test_parquet_without_pyarrow(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    code, error = run(capsys, str(tmp_path / "a.parquet"), "--output", str(tmp_path / "out"), "--tokenizer", "byte")
    assert (code, "pip install 'olmo-fn[parquet]'" in error) == (2, True)


def test_bad_settings(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello")
    common = (str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"))
    for flags, message in {
        ("--heldout", "1"): "--heldout is 1.0; it must be at least 0 and below 1",
        ("--workers", "-1"): "--workers is -1; it must not be negative",
        ("--part-tokens", "0"): "--part-tokens is 0; it must be at least 1",
        ("--vocab-size", "100"): "--vocab-size is 100; it must be at least 257",
        ("--tokenizer", "no.json"): "cannot read the tokenizer 'no.json'",
        (
            "--tokenizer",
            "byte",
            "--dtype",
            "uint8",
        ): "--dtype uint8 does not hold a vocabulary of 257; uint16 does",
    }.items():
        code, error = run(capsys, *common, *flags)
        assert (code, message in error) == (2, True), error
    assert "no input; name the files" in run(capsys, "--output", str(tmp_path / "out"))[1]
    assert "no such file" in run(capsys, "missing-*.txt", "--output", str(tmp_path / "out"))[1]


def test_overwriting(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(jsonl(some_texts(3000)))
    (tmp_path / "b.txt").write_text("hello")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.md").write_text("mine")
    first = (
        str(tmp_path / "a.jsonl"),
        "--output",
        str(out),
        "--tokenizer",
        "byte",
        "--part-tokens",
        "1",
        "--workers",
        "1",
    )
    code, error = run(capsys, *first)
    assert (code, "is not empty; give another folder, or --overwrite" in error) == (2, True)
    assert run(capsys, *first, "--overwrite", "--heldout", "0.1")[0] == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    (tmp_path / "killed" / ".tmp-1").mkdir(parents=True)
    killed = (
        str(tmp_path / "b.txt"),
        "--output",
        str(tmp_path / "killed"),
        "--tokenizer",
        "byte",
        "--workers",
        "1",
    )
    assert run(capsys, *killed, "--heldout", "0")[0] == 0
    bad = (str(tmp_path / "no.txt"), "--output", str(out), "--overwrite")
    assert run(capsys, *bad)[0] == 2
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before
    second = (
        str(tmp_path / "b.txt"),
        "--output",
        str(out),
        "--tokenizer",
        "byte",
        "--workers",
        "1",
        "--heldout",
        "0",
    )
    assert run(capsys, *second, "--overwrite")[0] == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "meta.json",
        "notes.md",
        "part-00000.npy",
        "tokenizer.json",
    ]
    assert np.fromfile(out / "part-00000.npy", np.uint16).tolist() == [*b"hello", 256]
    bpe = (
        str(tmp_path / "b.txt"),
        "--output",
        str(out),
        "--tokenizer",
        "bpe",
        "--workers",
        "1",
        "--heldout",
        "0",
    )
    assert run(capsys, *bpe, "--overwrite")[0] == 0
    assert load(out / "tokenizer.json").decode(np.fromfile(out / "part-00000.npy", np.uint16)) == "hello"
    under_a_file = (str(tmp_path / "b.txt"), "--output", str(tmp_path / "b.txt" / "out"))
    assert "cannot write to --output" in run(capsys, *under_a_file)[1]
    assert run(capsys, str(tmp_path / "b.txt"), "--output", str(tmp_path / "b.txt"))[1].count("is a file; give a folder")


def test_half_a_surrogate_pair_does_not_stop_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n')
    tokenize(Tokenize((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), "byte", workers=1, heldout=0))
    ids = np.fromfile(tmp_path / "out" / "part-00000.npy", np.uint16)
    assert byte_level().decode(ids) == "a\ufffdb"
