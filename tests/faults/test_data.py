"""What went wrong with text and token files in use and in public bug reports: each case, and what is right.

Ids name the case: of reports (the situations of public bug reports), reliability (injected faults) or use (a first use).
"""

import bz2
import gzip
import json
import lzma
import os
import random
import re
import resource
import shlex
import sys
import zlib
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from olmo_fn.cli import main as cli
from olmo_fn.cli import training
from olmo_fn.data import documents, inputs, tokens
from olmo_fn.data.encode import encode_all
from olmo_fn.data.instances.fixed import Windows
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.data.tokenizer import Tokenizer, byte_level, load, train_bpe
from olmo_fn.data.tokens import open_masks, open_tokens, read_tokens
from olmo_fn.presets import CONFIGS
from olmo_fn.train.session import open_run

RNG = random.Random(0)
WORDS = [
    "windows",
    "of",
    "a",
    "split",
    "one",
    "length",
    "into",
    "and",
    "three",
    "that",
    "from",
    "learns",
    "red",
    "blue",
    "equal",
    "tokens",
]
TEXTS = [" ".join(RNG.choices(WORDS, k=40)) + f" {i}" for i in range(200)]
LINES = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()
SIZES = constant_sizes(2, 16)


def table(**columns):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def twice():
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array(TEXTS)] * 2, names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


def flipped_until(error):
    """A gz file with one byte inverted, on which zlib fails in this way."""
    whole = gzip.compress(LINES, mtime=0)
    for i in range(20, len(whole)):
        broken = whole[:i] + bytes([whole[i] ^ 255]) + whole[i + 1 :]
        try:
            gzip.decompress(broken)
        except error:
            return broken
        except Exception:
            continue
    raise AssertionError("no such byte")


def damaged_page():
    data = bytearray(table(text=TEXTS))
    data[60:90] = b"\xff" * 30
    return bytes(data)


DEEP = b'{"text": "x", "m": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"
ONE = b'{"text": "x"}\n'
REFUSED = [
    ("reports-01-zlib", "f.jsonl.gz", lambda: flipped_until(zlib.error), "cannot read '{}' after line "),
    ("reports-01-crc", "f.jsonl.gz", lambda: gzip.compress(LINES)[:-8] + bytes(8), "'{}' after line 200: CRC check failed"),
    ("reports-01-cut", "f.jsonl.gz", lambda: gzip.compress(LINES)[:-900], "cannot read '{}' after line "),
    ("reports-01-behind", "f.jsonl.gz", lambda: gzip.compress(LINES) + b"junk", "'{}' after line 200: Not a gzipped file"),
    ("reports-01-bz2", "f.ndjson.bz2", lambda: bz2.compress(LINES)[:-30], "cannot read '{}' after line "),
    ("reports-01-xz", "f.json.xz", lambda: lzma.compress(LINES)[:-40], "cannot read '{}' after line "),
    ("reports-01-zst", "f.jsonl.zst", lambda: zstd(LINES)[:-9], "cannot read '{}' after line "),
    ("reports-01-text", "f.txt.gz", lambda: gzip.compress(LINES)[:-900], "cannot read '{}': "),
    (
        "reports-04-null",
        "f.jsonl",
        lambda: ONE + b'{"text": null}\n',
        "'{}' line 2 has no text in 'text' but null; --skip-missing",
    ),
    ("reports-04-number", "f.jsonl", lambda: b'{"text": 5}\n', "'{}' line 1 has no text in 'text' but int; --skip-missing"),
    (
        "reports-04-missing",
        "f.jsonl",
        lambda: ONE + b'{"id": 3}\n',
        "line 2 has no text in 'text'; there is: id; name the field",
    ),
    (
        "reports-04-nested",
        "f.jsonl",
        lambda: b'{"data": {"text": "x"}}\n',
        "there is: data.text; name the field with --text-field",
    ),
    ("reports-04-cut-line", "f.jsonl", lambda: ONE + b'{"text": "x', "'{}' line 2 cannot be read as JSON: Unterminated string"),
    ("reports-07-deep", "f.jsonl", lambda: ONE + DEEP, "'{}' line 2 cannot be read as JSON: maximum recursion depth"),
    (
        "reports-07-digits",
        "f.jsonl",
        lambda: ONE + b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n",
        "line 2 cannot be read as JSON",
    ),
    (
        "reports-08-list",
        "f.json",
        lambda: json.dumps([{"text": "x"}]).encode(),
        "'{}' line 1 is no JSON object but list; `jq -c",
    ),
    ("reports-08-pretty", "f.json", lambda: json.dumps({"text": "x"}, indent=1).encode(), "'{}' line 1 cannot be read as JSON"),
    ("reports-08-csv", "t.CSV", lambda: b"id,text\n1,hello\n2\n", "cannot read '{}' line 3: 1 values, and the header has 2"),
    ("reports-08-tar", "t.tar.gz", lambda: b"", "'{}': .tar files are not read"),
    ("reports-08-utf16", "t.txt", lambda: "hello".encode("utf-16-le"), "'{}' is not UTF-8 text (it has NUL bytes)"),
    ("reports-09-page", "p.parquet", damaged_page, "'{}' is not a parquet file that can be read: "),
    ("reports-09-twice", "p.parquet", twice, "'{}' has two columns 'text'"),
    ("reports-09-cut", "p.PARQUET", lambda: table(text=TEXTS)[:-300], "'{}' is not a parquet file that can be read: "),
    ("reports-09-null", "p.pq", lambda: table(text=["a", None]), "'{}' row group 0 row 1 has no text in 'text' but null"),
    ("reports-09-struct", "p.parquet", lambda: table(data=[{"text": "a"}]), "'{}' has no column 'text'; there is: data"),
    (
        "reliability-18-line",
        "f.jsonl.gz",
        lambda: gzip.compress(ONE + b"a" * (1 << 19)),
        "after line 1: the next has more",
    ),
]


def run(capsys, *words):
    """``olmo-fn tokenize``: its exit code, its lines, and its errors."""
    code = cli.main(["tokenize", *map(str, words), "--workers", "1"])
    out, err = capsys.readouterr()
    return code, out.splitlines(), err


@pytest.mark.parametrize(("name", "content", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_a_damaged_or_foreign_file_is_one_line_that_names_it(tmp_path, capsys, monkeypatch, name, content, message):
    monkeypatch.setattr(documents, "LINE_BYTES", 1 << 18)
    path = tmp_path / name
    path.write_bytes(content())
    code, _, error = run(capsys, path, "--output", tmp_path / "out", "--tokenizer", "byte")
    assert code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message.format(path) in error
    assert name in error
    assert len(error) < 700
    assert not list(tmp_path.glob("out/*"))


READ = [
    ("reports-08-json", "l.json", LINES, ()),
    ("reports-08-ndjson", "l.ndjson", LINES, ()),
    ("reports-08-capitals", "L.JSONL", LINES, ()),
    ("reports-08-bom", "l.jsonl", b"\xef\xbb\xbf" + LINES, ()),
    ("reports-08-json-gz", "l.json.GZ", gzip.compress(LINES), ()),
    ("reports-08-two-members", "l.jsonl.gz", gzip.compress(LINES[:99]) + gzip.compress(LINES[99:]), ()),
    ("use-2.6-zst", "l.jsonl.zst", zstd(LINES), ()),
    ("use-2.6-zst-frames", "l.jsonl.zst", zstd(LINES[:99]) + zstd(LINES[99:]), ()),
    ("reports-08-bz2", "l.jsonl.bz2", bz2.compress(LINES), ()),
    ("reports-08-xz", "l.jsonl.xz", lzma.compress(LINES), ()),
    ("reports-09-capitals", "P.PARQUET", table(text=TEXTS), ()),
    ("reports-04-nested", "n.jsonl", re.sub(rb"(\{.*\})", rb'{"data": \1}', LINES), ("--text-field", "data.text")),
    ("reports-04-dotted-name", "n.jsonl", LINES.replace(b'"text"', b'"data.text"'), ("--text-field", "data.text")),
    ("reports-04-struct", "n.parquet", table(data=[{"text": t} for t in TEXTS]), ("--text-field", "data.text")),
    ("reports-04-skipped", "n.jsonl", LINES + b'{"text": null}\n{"id": 1}\n[]\n', ("--skip-missing",)),
    ("reports-04-skipped-rows", "n.parquet", table(text=[*TEXTS, None, None, None]), ("--skip-missing",)),
]


@pytest.mark.parametrize(("name", "content", "flags"), [row[1:] for row in READ], ids=[row[0] for row in READ])
def test_every_document_is_read(tmp_path, capsys, name, content, flags):
    (tmp_path / name).write_bytes(content)
    code, lines, error = run(capsys, tmp_path / name, "--output", tmp_path / "o", "--tokenizer", "byte", "--heldout", 0, *flags)
    assert (code, error) == (0, "")
    ids = np.fromfile(tmp_path / "o" / "part-00000.npy", np.uint16)
    assert byte_level().decode(ids) == "".join(TEXTS)
    assert "train: 200 documents" in lines[1]
    assert ("passed over: 3 without a text in 'text'" in lines) == ("--skip-missing" in flags)
    assert json.loads((tmp_path / "o" / "meta.json").read_text())["skipped"] == 3 * ("--skip-missing" in flags)


@pytest.fixture
def folder(tmp_path):
    """Text of several kinds, what is none, and links: to a folder, in a circle, to nowhere."""
    inside, real = tmp_path / "in", tmp_path / "real"
    (inside / "sub").mkdir(parents=True)
    real.mkdir()
    for i in range(4):
        (inside / f"{i}.jsonl").write_bytes(LINES[:200].rpartition(b"\n")[0] + b"\n")
    (inside / "sub" / "a.py").write_text("x = 1\n")
    (inside / "README.md").write_text("about the data")
    (inside / ".DS_Store").write_bytes(b"\0")
    (inside / ".git").mkdir()
    (inside / ".git" / "HEAD").write_text("ref")
    (inside / "img.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (inside / "ids.txt").write_bytes("utf-16".encode("utf-16-le"))
    (inside / "table.orc").write_text("a,b\n")
    (inside / "config.json").write_text('{\n "a": 1\n}')
    (real / "b.txt").write_text("many words")
    (inside / "link").symlink_to(real)
    (inside / "sub" / "circle").symlink_to(inside)
    (inside / "nowhere").symlink_to(tmp_path / "gone")
    return inside


def test_use_2_1_and_reports_11_a_folder_says_what_it_takes(folder, tmp_path, capsys):
    code, lines, error = run(capsys, folder, "--output", tmp_path / "out", "--tokenizer", "byte", "--heldout", 0)
    assert (code, error) == (0, "")
    assert lines[0] == (
        "inputs: 4 .jsonl (a document a line or row); 1 .py, 1 .txt (each one document); "
        "left out: table.orc (.orc is not read); left out: README.md (README); left out: .DS_Store, .git (hidden); "
        "left out: ids.txt, img.png (not UTF-8 text); "
        "left out: config.json (not a JSON object a line); left out: nowhere (not a regular file)"
    )
    assert "many words" in byte_level().decode(np.fromfile(tmp_path / "out" / "part-00000.npy", np.uint16))
    assert inputs.expand([str(folder / "link")]).files == (str(folder / "link" / "b.txt"),)
    assert inputs.expand([str(folder / "README.md"), str(folder / "link"), str(folder.parent / "real")])[1] == {}


def test_an_input_without_text_says_why(tmp_path):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, message in {"empty": "the folder has no text", "pipe": "not a regular file", "x" * 400: "no such file"}.items():
        with pytest.raises(ValueError, match=message):
            inputs.expand([str(tmp_path / name)])


def test_reports_13_the_folder_of_a_pattern_is_taken_literally(tmp_path):
    for name in ("in[1]", "in1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    literal = str(tmp_path / "in[1]" / "a.txt")
    assert inputs.expand([str(tmp_path / "in[1]" / "*.txt")]).files == (literal,)
    assert tokens.expand([str(tmp_path / "in[1]" / "*.txt"), literal]) == (literal, literal)
    assert tokens.expand([str(tmp_path / "in?" / "*.txt")]) == (str(tmp_path / "in1" / "a.txt"),)


COMMANDS = [
    ("reports-13", "tok[v2] x", LINES, "--tokenizer byte"),
    ("reports-17-and-use-2.3", "large", LINES, "--vocab-size 300"),
    ("reports-13-four-tokens", "few", b"abc", "--tokenizer byte"),
    ("reports-14", "~/tok", LINES, "--tokenizer ~/given.json --eos <stop>"),
]


@pytest.mark.parametrize(("output", "content", "flags"), [row[1:] for row in COMMANDS], ids=[row[0] for row in COMMANDS])
def test_the_printed_command_trains(tmp_path, capsys, monkeypatch, output, content, flags):
    """As it is printed, but for a smaller model and fewer steps, in a folder where ``runs/NAME`` is taken."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    byte_level().save(tmp_path / "home" / "given.json")
    given = (tmp_path / "home" / "given.json").read_text()
    (tmp_path / "home" / "given.json").write_text(given.replace("<|endoftext|>", "<stop>"))
    name = output.removeprefix("~/")
    (tmp_path / "runs" / name).mkdir(parents=True)
    path = tmp_path / ("a.jsonl" if content == LINES else "a.txt")
    path.write_bytes(content)
    code, lines, error = run(capsys, path, f"--output={output}", *shlex.split(flags))
    assert (code, error) == (0, "")
    python, script, *words = shlex.split(lines[-1])
    assert (python, script) == ("python", "train.py")
    assert not any(word.startswith("~") for word in words)
    small = "--model.d-model 16 --model.n-layers 1 --model.n-heads 2 --model.hidden-size 32 --run.threads 1 --recipe.no-compile"
    steps = "--run.steps 2 --schedule.warmup 1 --run.sample="
    assert cli.main(["train", *words, *small.split(), *steps.split()]) == 0
    assert (tmp_path / "runs" / f"{name}-2" / "config.yaml").exists()
    vocab_size = json.loads((tmp_path / os.path.expanduser(output) / "meta.json").read_text())["vocab_size"]
    assert words[words.index("--model.vocab-size") + 1] == str(vocab_size)


def test_use_2_3_the_presets_own_vocabulary_is_not_printed(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("".join(map(chr, range(0x4E00, 0x6E00))))
    _, lines, _ = run(capsys, tmp_path / "a.txt", "--output", tmp_path / "out")
    assert load(tmp_path / "out" / "tokenizer.json").vocab_size == 4096
    assert "--model.vocab-size" not in lines[-1]


@pytest.mark.parametrize(
    ("count", "flags", "message"),
    [
        (
            300,
            (),
            "heldout: 0 documents (none of 300 was drawn at --heldout 0.0001): .* --heldout 0.03 or --heldout-inputs FILES",
        ),
        (3, (), "heldout: 0 documents (none of 3 was drawn at --heldout 0.0001): .* to choose: --heldout-inputs FILES"),
        (3, ("--heldout", "0"), "heldout: 0 documents (as --heldout 0 asks): .*"),
    ],
)
def test_use_2_4_nothing_held_out_is_said(tmp_path, capsys, count, flags, message):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "abc"}\n' * count)
    flags = flags or ("--heldout", "0.0001")
    _, lines, _ = run(capsys, tmp_path / "a.jsonl", "--output", tmp_path / "out", "--tokenizer", "byte", *flags)
    assert re.fullmatch(message.replace("(", r"\(").replace(")", r"\)"), lines[2])


def test_use_2_5_the_advice_for_a_folder_never_names_what_is_held_out(tmp_path):
    tokenized = tokenize(Tokenize((jsonl(tmp_path),), str(tmp_path / "my [data]"), "byte", workers=1, heldout=0.2))
    assert tokenized["heldout"]["documents"]
    with pytest.raises(ValueError, match=r"is a folder; name the token files in it: ") as error:
        tokens.expand([str(tmp_path / "my [data]")])
    (pattern,) = shlex.split(str(error.value).split("in it: ")[1])
    assert tokens.expand([pattern]) == (str(tmp_path / "my [data]" / "part-00000.npy"),)
    with pytest.raises(ValueError, match=r"is a folder; name the token files in it: '.*/heldout\.npy'$"):
        open_data(Data((pattern,), (str(tmp_path / "my [data]"),)), 300, SIZES)
    (tmp_path / "my [data]" / "part-00000.npy").unlink()
    with pytest.raises(ValueError, match=r"no \.npy file to train on is in it; .*olmo-fn tokenize '.*/my \[data\]' --output"):
        tokens.expand([str(tmp_path / "my [data]")])


def jsonl(folder, name="a.jsonl"):
    (folder / name).write_bytes(LINES)
    return str(folder / name)


@pytest.fixture
def both(tmp_path):
    """The same text as bytes and in a BPE, with held-out documents."""
    path = jsonl(tmp_path)
    for name in ("byte", "bpe"):
        tokenize(Tokenize((path,), str(tmp_path / name), name, vocab_size=300, workers=1, heldout=0.2))
    return tmp_path


def parts(folder, name):
    return str(folder / name / "part-*.npy")


def test_use_4_a_tokenizer_that_is_not_that_of_the_files(both):
    bpe = str(both / "bpe" / "tokenizer.json")
    for data in (
        Data((parts(both, "byte"),), tokenizer=bpe),
        Data((parts(both, "bpe"),), (parts(both, "byte"),), tokenizer=bpe),
    ):
        with pytest.raises(
            ValueError, match=r"'.*/byte' are of another tokenizer \(257 ids, end of document 256\) than"
        ) as error:
            open_data(data, 300, SIZES)
    with pytest.raises(ValueError, match=r"are of another tokenizer"):
        open_data(Data((parts(both, "byte"), parts(both, "bpe"))), 300, SIZES)
    assert "\n" not in str(error.value)
    # as large, with the same end of document, and other words
    other = train_bpe([text[::-1] for text in TEXTS], 300)
    (both / "other.json").write_text(other.backend.to_str())
    found = load(bpe)
    same = (found.vocab_size, found.eos_id) == (other.vocab_size, other.eos_id)
    data = Data((parts(both, "bpe"),), tokenizer=str(both / "other.json"))
    assert same
    with pytest.raises(ValueError, match=r"\(300 ids, end of document 0\) than the tokenizer '.*/other\.json' \(300 ids"):
        open_data(data, 300, SIZES)
    open_data(Data((parts(both, "bpe"),), tokenizer=bpe), 300, SIZES)
    meta = json.loads((both / "bpe" / "meta.json").read_text())
    del meta["vocab_hash"]  # a folder from before it was written
    (both / "bpe" / "meta.json").write_text(json.dumps(meta))
    open_data(data, 300, SIZES)


def test_use_5_held_out_files_in_the_training_glob(both):
    heldout = both / "byte" / "heldout.npy"
    with pytest.raises(ValueError, match=r"heldout\.npy' in --data\.paths is what the tokenizing command held out; train on"):
        open_data(Data((str(both / "byte" / "*.npy"),)), 300, SIZES)
    (both / "link.npy").hardlink_to(heldout)
    with pytest.raises(ValueError, match=r"link\.npy' is in --data\.paths and in --data\.heldout-paths"):
        open_data(Data((parts(both, "byte"), str(both / "link.npy")), (str(heldout),), dtype="uint16"), 300, SIZES)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "corpus", "a.md", "a.jsonl.gz"])
def test_use_4_text_in_the_place_of_token_files(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(LINES) if name.endswith("gz") else LINES)
    with pytest.raises(ValueError, match=rf"is text, .*: olmo-fn tokenize {re.escape(str(tmp_path / name))} --output"):
        open_data(Data((str(tmp_path / name),)), 4096, SIZES)


@pytest.mark.parametrize(
    ("written", "vocab_size", "message"),
    [
        ("<u4", 257, "as uint32 would be; say which it is: --data.dtype uint32"),
        ("<i8", 257, "as uint64 would be"),
        ("<i8", 70_000, "as uint64 would be"),
        ("<u2", 256, "as uint16 would be"),
        ("<u2", 257, None),
    ],
)
def test_reports_16_the_integer_type_is_not_guessed_wrongly(tmp_path, written, vocab_size, message):
    ids = np.random.default_rng(0).integers(1, 250, 20_000)
    ids.astype(written).tofile(tmp_path / "t.npy")
    data = Data((str(tmp_path / "t.npy"),), heldout_fraction=0.0)
    if message is None:
        assert open_data(data, vocab_size, SIZES).train.num_instances == 20_000 // 16
        return
    with pytest.raises(ValueError, match=message) as error:
        open_data(data, vocab_size, SIZES)
    dtype = re.search(r"--data\.dtype (\w+)", str(error.value))[1]
    assert open_data(Data(data.paths, heldout_fraction=0.0, dtype=dtype), vocab_size, SIZES).train.num_instances == 20_000 // 16


def made(vocabulary, pre_tokenizer, decoder, normalizer=None, **model):
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=[], **model))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    if normalizer:
        backend.normalizer = normalizer
    backend.add_special_tokens(["<|endoftext|>"])
    return backend


def byte_kind(normalizer=None, prefix=False):
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    return made(vocabulary, pre_tokenizers.ByteLevel(add_prefix_space=prefix), decoders.ByteLevel(), normalizer)


def sentence_piece(mark, fallback):
    """As SentencePiece makes them: blanks are a mark, one before the text; what is no token is bytes, or is lost."""
    letters = "".join(WORDS) + "0123456789" + ("\u2581" if mark else "")
    vocabulary = {"<unk>": 0, **{f"<0x{i:02X}>": 1 + i for i in range(256)}}
    for letter in sorted(set(letters)):
        vocabulary[letter] = len(vocabulary)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    split = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return made(vocabulary, split, decoders.Sequence(steps), unk_token="<unk>", byte_fallback=fallback, fuse_unk=True)


KINDS = {
    "byte-level": (byte_kind, True),
    "prefix-space": (lambda: byte_kind(prefix=True), False),
    "nfc": (lambda: byte_kind(normalizers.NFC()), False),
    "nfkc": (lambda: byte_kind(normalizers.NFKC()), False),
    "metaspace": (lambda: sentence_piece(True, True), False),
    "metaspace-without-mark": (lambda: sentence_piece(False, True), False),
    "metaspace-without-bytes": (lambda: sentence_piece(True, False), False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_reports_18_bits_per_byte_are_of_the_bytes_of_the_text(tmp_path, kind):
    """Those that tokenizing counted; or those of ids that are the bytes; or none."""
    make, exact = KINDS[kind]
    make().save(str(tmp_path / "t.json"))
    texts = [
        "hello  world",
        " leading",
        "cafe\u0301 \u2126",
        "\U0001f415",
        "a\r\n",
        "\u2581 block",
        "tab\t",
        "<|endoftext|> in",
    ] * 3
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    held_out = jsonl(tmp_path, "h.jsonl")
    flags = {"workers": 1, "heldout": 0.0, "heldout_inputs": (str(tmp_path / "a.jsonl"),)}
    tokenize(Tokenize((held_out,), str(tmp_path / "out"), str(tmp_path / "t.json"), **flags))
    data = Data((parts(tmp_path, "out"),), (str(tmp_path / "out" / "heldout.npy"),), tokenizer=str(tmp_path / "t.json"))
    num_bytes = sum(len(text.encode()) for text in texts)
    source = open_data(data, 600, SIZES)
    heldout = source.heldout["heldout"]
    assert heldout.num_bytes(source.tokenizer) == num_bytes
    first = heldout.first(int(np.flatnonzero(heldout.tokens == source.eos_id)[0]))
    assert first.num_bytes(source.tokenizer) == (len(texts[0].encode()) if exact else None)
    (tmp_path / "out" / "meta.json").unlink()
    again = open_data(data, 600, SIZES)
    assert again.heldout["heldout"].num_bytes(again.tokenizer) == (num_bytes if exact else None)


def test_reports_18_a_trained_tokenizer_tells_its_bytes():
    for tokenizer in (byte_level(), train_bpe(TEXTS, 300)):
        assert tokenizer.keeps_text
    lacking = made({c: i for i, c in enumerate("abc")}, pre_tokenizers.ByteLevel(False), decoders.ByteLevel())
    assert not Tokenizer(lacking, 3).keeps_text


def test_a_tokenizer_that_cannot_encode_is_one_line(tmp_path):
    backend = tokenizers.Tokenizer(models.WordLevel({"</s>": 0, "a": 1}, unk_token="[UNK]"))
    backend.save(str(tmp_path / "t.json"))
    (tmp_path / "a.txt").write_text("other words")
    config = Tokenize((str(tmp_path / "a.txt"),), str(tmp_path / "out"), str(tmp_path / "t.json"), workers=1, heldout=0.0)
    with pytest.raises(ValueError, match="the tokenizer cannot encode this text: "):
        tokenize(config)


def test_text_that_is_in_both_inputs_by_a_link(tmp_path):
    (tmp_path / "link.jsonl").symlink_to(jsonl(tmp_path))
    with pytest.raises(ValueError, match=r"a\.jsonl' is in the inputs and in --heldout-inputs"):
        tokenize(Tokenize((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), heldout_inputs=(str(tmp_path / "link.jsonl"),)))


def test_reports_19_no_figure_where_nothing_is_predicted(tmp_path, capsys):
    np.array([5], "<u2").tofile(tmp_path / "one.npy")
    np.arange(1, 200, dtype="<u2").tofile(tmp_path / "train.npy")
    one, train = str(tmp_path / "one.npy"), str(tmp_path / "train.npy")
    with pytest.raises(ValueError, match=r"the held-out text is 1 token, and nothing predicts it; give --data.eos-id"):
        open_data(Data((train,), (one,)), 300, SIZES)
    assert len(open_data(Data((train,), (one,), eos_id=0), 300, SIZES).heldout["heldout"]) == 1
    words = f"""olmo2-tiny --data.paths {train} --run.eval-tokens 1 --model.d-model 16 --model.n-layers 1 --model.n-heads 2
        --model.hidden-size 32 --model.vocab-size 300 --recipe.sequence-length 16 --recipe.no-compile"""
    session = open_run(training.parse(words.split(), CONFIGS, "train"))
    assert len(session.source.heldout["heldout"]) == 16
    assert session.evaluate(session.first_state()) is None


def test_reports_20_a_mask_without_a_label_is_named(tmp_path):
    np.arange(8, dtype="<u2").tofile(tmp_path / "t.npy")
    file = open_tokens(str(tmp_path / "t.npy"), "uint16")
    for mask, message in {
        bytes(8): r"m\.npy' is false throughout",
        bytes([1, 0, 2, 0, 0, 0, 0, 0]): r"m\.npy' has 2 at offset 2; it must hold bytes 0 and 1",
    }.items():
        (tmp_path / "m.npy").write_bytes(mask)
        with pytest.raises(ValueError, match=message):
            open_masks([str(tmp_path / "m.npy")], [file])


def test_reports_22_a_file_that_is_shortened_while_it_is_read(tmp_path):
    """An error that names it, where a memory map would end the process."""
    path = tmp_path / "t.npy"
    np.arange(50_000, dtype="<u2").tofile(path)
    file = open_tokens(str(path), "uint16")
    windows = Windows((file,), 1000, 50_000)
    assert windows.read(np.array([49]))["input_ids"][0, 0] == 49_000
    os.truncate(path, 2001)
    assert windows.read(np.array([0]))["input_ids"][0, -1] == 999
    with pytest.raises(ValueError, match=r"t\.npy' has become shorter: it had 50,000 tokens when it was opened"):
        windows.read(np.array([0, 30]))
    path.unlink()
    tokens._opened.cache_clear()
    with pytest.raises(ValueError, match=r"cannot read the token file '.*t\.npy': No such file"):
        read_tokens(file)


def test_reliability_15_workers(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abc")
    code = cli.main(["tokenize", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"), "--workers", "9" * 400])
    error = capsys.readouterr().err
    assert (code, error.count("\n"), error.startswith("error: --workers is 999")) == (2, 1, True)
    with pytest.raises(ValueError, match=r"one of 2 worker processes died, as when memory runs out; use fewer --workers"):
        list(encode_all([(os._exit, 1)], 2))


METAS = [
    {"dtype": []},
    {"dtype": "uint16", "eos_id": True},
    {"dtype": "uint16", "eos_id": 0, "vocab_size": [], "vocab_hash": {}, "files": 5},
    {"dtype": "uint16", "eos_id": 0, "files": {"t.npy": 3, "u.npy": {"tokens": [], "bytes": "x"}}},
]


@pytest.mark.parametrize("content", [*map(json.dumps, METAS), "[" * 100_000, "[1]", "\xff", ""])
def test_reliability_17_odd_metas_are_no_tracebacks(tmp_path, content):
    np.arange(64, dtype="<u2").tofile(tmp_path / "t.npy")
    (tmp_path / "meta.json").write_text(content, encoding="latin-1")
    assert open_data(Data((str(tmp_path / "t.npy"),), heldout_fraction=0.0), 300, SIZES).train.num_instances == 4


@pytest.mark.parametrize("eos_id", [99_999, -5])
def test_reliability_17_an_end_of_document_beyond_the_vocabulary(tmp_path, eos_id):
    np.arange(64, dtype="<u2").tofile(tmp_path / "t.npy")
    (tmp_path / "meta.json").write_text(json.dumps({"dtype": "uint16", "eos_id": eos_id}))
    with pytest.raises(ValueError, match=rf"the end-of-document token in '.*/meta\.json' is {eos_id}; it must be from 0"):
        open_data(Data((str(tmp_path / "t.npy"),)), 300, SIZES)


@pytest.mark.parametrize("path", ["/dev/zero", "/proc/self/fd", "x" * 400, "a\0b"])
def test_reliability_17_what_is_no_token_file(path):
    with pytest.raises(ValueError, match=r"not a regular file|is a folder|no token file matches"):
        tokens.expand([path])


@pytest.mark.parametrize("letter", ["a", "é", " ", "\n", "=", "\t", "x\u0301"])
def test_reliability_18_no_word_is_long(letter):
    """Learning takes the square of its length: one of 100,000 letters took a minute."""
    tokenizer = train_bpe([letter * 100_000], 300)
    words = tokenizer.backend.pre_tokenizer.pre_tokenize_str(letter * 10_000)
    assert max(end - start for _, (start, end) in words) <= 3001
    assert tokenizer.decode(tokenizer.encode(letter * 10_000)) == letter * 10_000


def test_reliability_18_a_text_that_unpacks_without_end(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"a" * 2000))
    monkeypatch.setattr(documents, "FILE_BYTES", 1000)
    code, _, error = run(capsys, tmp_path / "a.txt.gz", "--output", tmp_path / "out", "--tokenizer", "byte")
    assert (code, "a.txt.gz' is one document of more than 1,000 bytes; split it" in error) == (2, True)


def test_use_2_6_zst_without_its_library_is_said(tmp_path, capsys, monkeypatch):
    (tmp_path / "a.jsonl.zst").write_bytes(zstd(LINES))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for given in (tmp_path / "a.jsonl.zst", tmp_path):
        code, _, error = run(capsys, given, "--output", tmp_path / "out", "--tokenizer", "byte")
        assert (code, "a.jsonl.zst' after line 0: reading .zst needs pyarrow: pip install 'olmo-fn[parquet]'" in error) == (
            2,
            True,
        )


def test_reports_25_a_full_disk(tmp_path, capsys):
    """A limit on the size of files stands for the disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        code, _, error = run(capsys, jsonl_small(tmp_path), "--output", tmp_path / "out", "--tokenizer", "byte")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (code, error) == (2, f"error: cannot write to --output '{tmp_path / 'out'}': File too large\n")
    assert not list(tmp_path.glob("out/*"))


def jsonl_small(folder):
    (folder / "z.jsonl.xz").write_bytes(lzma.compress(LINES))
    return folder / "z.jsonl.xz"


def arrow(texts, new):
    out = pa.BufferOutputStream()
    found = pa.table({"text": texts})
    with new(out, found.schema) as file:
        file.write_table(found, max_chunksize=2)
    return out.getvalue().to_pybytes()


WHOLE = {
    "a.jsonl": LINES,
    "b.jsonl.gz": gzip.compress(LINES, mtime=0),
    "c.ndjson.bz2": bz2.compress(LINES),
    "d.json.xz": lzma.compress(LINES),
    "e.jsonl.zst": zstd(LINES),
    "f.parquet": table(text=TEXTS),
    "g.txt": "".join(TEXTS).encode(),
    "h.csv": b"id,text\r\n" + b"".join(b'%d,"a, ""b""\nc"\r\n' % i for i in range(20)),
    "i.arrow": arrow(TEXTS, pa.ipc.new_file),
    "j.feather": arrow(TEXTS, pa.ipc.new_stream),
}


def damaged(rng, data):
    """Some bytes changed, or a piece left out, or doubled, or zeroed."""
    data = bytearray(data)
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    match rng.randrange(5):
        case 0:
            del data[a:b]
        case 1:
            data[b:b] = data[a:b]
        case 2:
            data[a:b] = bytes(b - a)
        case _:
            for _ in range(rng.randrange(1, 9)):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


@pytest.mark.parametrize(("seed", "rounds"), [(0, 8), pytest.param(1, 300, marks=pytest.mark.slow)])
def test_fuzzed_text_is_read_or_refused_by_name(tmp_path, seed, rounds):
    rng = random.Random(seed)
    for i in range(rounds):
        for name, whole in WHOLE.items():
            path = tmp_path / name
            path.write_bytes(damaged(rng, whole))
            try:
                tokenize(Tokenize((str(path),), str(tmp_path / "out"), "byte", workers=1, heldout=0.0, overwrite=True))
            except ValueError as error:
                assert re.search(rf"{name}|no training documents", str(error)), (i, error)  # noqa: PT017


@pytest.mark.parametrize(("seed", "rounds"), [(0, 20), pytest.param(1, 1000, marks=pytest.mark.slow)])
def test_fuzzed_token_folders_are_read_or_refused(both, seed, rounds):
    rng = random.Random(seed)
    folder = both / "bpe"
    data = Data((parts(both, "bpe"),), (str(folder / "heldout.npy"),), tokenizer=str(folder / "tokenizer.json"))
    whole = {name: (folder / name).read_bytes() for name in ("meta.json", "part-00000.npy", "heldout.npy", "tokenizer.json")}
    for _ in range(rounds):
        name = rng.choice([*whole])
        (folder / name).write_bytes(damaged(rng, whole[name]))
        with suppress(ValueError):
            open_data(data, 300, SIZES).train(0)
        (folder / name).write_bytes(whole[name])
