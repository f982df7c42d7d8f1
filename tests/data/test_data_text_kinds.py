"""Text in tables and saved datasets, special tokens in it, and what is left out of it: filters, copies, evaluation sets."""

import bz2
import csv
import io
import json
import random

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import feather, ipc

from olmo_fn.cli import main as cli
from olmo_fn.data.decontaminate import collect
from olmo_fn.data.dedup import Seen, keys
from olmo_fn.data.documents import chunks, documents
from olmo_fn.data.filters import open_filter
from olmo_fn.data.inputs import expand
from olmo_fn.data.tables import csv_rows
from olmo_fn.data.tokenize import Tokenize, tokenize
from olmo_fn.data.tokenize_command import summary

TEXTS = [f"{i}: a, 'b' \"c\"\nStraße\t日本 \r\n" for i in range(50)]


def read(path, field="text"):
    files = expand([str(path)]).files
    found = [[t for chunk in chunks(files, size) for t in documents(chunk, field)] for size in (1, 1 << 20)]
    assert found[0] == found[1]
    return found[1]


def arrow_file(path, table, new=ipc.new_file):
    with new(str(path), table.schema) as out:
        out.write_table(table, max_chunksize=7)


def as_csv(texts, delimiter=","):
    out = io.StringIO(newline="")
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue().encode()


def test_every_table_has_the_same_documents(tmp_path):
    table = pa.table({"n": range(50), "text": TEXTS})
    arrow_file(tmp_path / "a.arrow", table)
    arrow_file(tmp_path / "b.arrow", table, ipc.new_stream)
    feather.write_feather(table, tmp_path / "c.feather", chunksize=20)
    (tmp_path / "d.csv").write_bytes(as_csv(TEXTS))
    (tmp_path / "e.tsv.bz2").write_bytes(bz2.compress(b"\xef\xbb\xbf" + as_csv(TEXTS, "\t")))
    for name in ("a.arrow", "b.arrow", "c.feather", "d.csv", "e.tsv.bz2"):
        assert read(tmp_path / name) == TEXTS, name
    arrow_file(tmp_path / "f.arrow", pa.table({"data": [{"text": text} for text in TEXTS]}))
    assert read(tmp_path / "f.arrow", "data.text") == TEXTS


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=2, max_size=2)))
def test_law_a_csv_is_read_as_it_was_written(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    with path.open("w", newline="", encoding="utf-8") as out:
        csv.writer(out).writerows([["a", "b"], *rows])
    found = list(csv_rows(str(path)))
    assert [list(record.values()) for _, record, *_ in found] == rows


def saved_dataset(folder, texts, shards=2):
    """As `Dataset.save_to_disk` of Hugging Face writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05}-of-{shards:05}.arrow" for i in range(shards)]
    for i, name in enumerate(names):
        arrow_file(folder / name, pa.table({"text": texts[i * 25 : i * 25 + 25]}), ipc.new_stream)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": {"dtype": "string"}}}))
    arrow_file(folder / "cache-1.arrow", pa.table({"text": ["not this"]}))


def test_a_saved_dataset_of_hugging_face(tmp_path):
    saved_dataset(tmp_path / "one", TEXTS)
    assert read(tmp_path / "one") == TEXTS
    for split in ("train", "test"):
        saved_dataset(tmp_path / "two" / split, TEXTS)
    (tmp_path / "two" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ValueError, match=r"two' has the splits train, test; name one: .*two/train"):
        expand([str(tmp_path / "two")])
    assert read(tmp_path / "two" / "train") == TEXTS
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(
        ValueError, match=r"the dataset in '.*one' has the shard '.*data-00001-of-00002.arrow', which is not there"
    ):
        expand([str(tmp_path / "one")])


def run(capsys, tmp_path, *flags):
    words = ["tokenize", *flags, "--output", tmp_path / "out", "--tokenizer", "byte", "--workers", "1"]
    code = cli.main([str(word) for word in words])
    return code, capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b'text,n\nx,1\n"a\nb",2\nc\n', "a.csv' line 5: 1 values, and the header has 2"),
        ("a.csv", b"body,n\nx,1\n", "a.csv' line 2 has no text in 'text'; there is: body, n;"),
        ("a.csv", b"a,a\nx,1\n", "a.csv' line 1: two columns are 'a'"),
        ("a.csv", b'text\n"x\n', "a.csv' line 2: unexpected end of data"),
        ("a.tsv", b"text\n\xff\n", "cannot read '"),
        ("a.arrow", b"not arrow", "a.arrow' is not an arrow or feather file that can be read: "),
        ("a.feather", b"ARROW1\0\0", "a.feather' is not an arrow or feather file"),
    ],
)
def test_what_is_wrong_is_said_by_file_and_line(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, said = run(capsys, tmp_path, tmp_path / name)
    assert (code, said.err.count("\n")) == (2, 1), said.err
    assert message in said.err


def ids_of(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / "part-00000.npy", meta["dtype"]), meta


def test_special_tokens_are_text_unless_asked_for(tmp_path):
    (tmp_path / "a.txt").write_text("a<|endoftext|>b")
    for special in (False, True):
        out = tmp_path / str(special)
        tokenize(Tokenize((str(tmp_path / "a.txt"),), str(out), "byte", workers=1, heldout=0.0, special_tokens=special))
        expected = [97, 256, 98, 256] if special else [*b"a<|endoftext|>b", 256]
        assert ids_of(out)[0].tolist() == expected


def written(tmp_path, texts, **flags):
    """The documents that are left, in their order, and the meta."""
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = Tokenize((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), "byte", workers=1, heldout=0.0, **flags)
    tokenize(config)
    ids, meta = ids_of(tmp_path / "out")
    return bytes(np.where(ids == 256, 0, ids).astype(np.uint8)).decode().split("\0")[:-1], meta, summary(config, meta)


def test_filters(tmp_path):
    (tmp_path / "mine.py").write_text("def no_x(text):\n    return 'x' not in text\n")
    texts = [
        "short",
        "good words here",
        "1234567 89 0 12",
        "same\nsame\nsame\nsame",
        "xylophone sounds",
        "日本語の文章です。長い文",
    ]
    flags = ("min-chars=8", "letters=0.5", "repeated-lines=0.5", f"{tmp_path}/mine.py:no_x", "latin=0.5")
    kept, meta, said = written(tmp_path, texts, filter=flags)
    assert kept == ["good words here"]
    assert meta["dropped"] == {f"filter {flag}": 1 for flag in flags}
    assert "left out: 1 filter " in said
    assert open_filter("min-words=3")("a b c")
    assert not open_filter("max-chars=3")("abcd")


def test_wrong_filters(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("hello")
    (tmp_path / "mine.py").write_text("def breaks(text):\n    return 1 / 0\ndef maybe(text): return None\n")
    for word, message in {
        "min-chars": "--filter min-chars is none; there is min-chars=NUMBER, max-chars=NUMBER",
        "none.py:f": "there is no file 'none.py'",
        f"{tmp_path}/mine.py:keep": "has no function 'keep'; it has: breaks, maybe",
        f"{tmp_path}/mine.py:breaks": "a.txt': ZeroDivisionError: division by zero",
        f"{tmp_path}/mine.py:maybe": "returns None for '",
    }.items():
        code, said = run(capsys, tmp_path, tmp_path / "a.txt", "--filter", word)
        assert (code, message in said.err, said.err.count("\n")) == (2, True, 1), said.err


def test_copies(tmp_path):
    words = random.Random(0).choices([f"w{i}" for i in range(3000)], k=400)
    text = " ".join(words)
    near, far = " ".join([*words[:-4], "other", "end"]), " ".join(words[200:] + words[:200][::-1])
    texts = [text, "b", text, near, far, "b"]
    assert written(tmp_path, texts, dedup="exact")[0] == [text, "b", near, far]
    kept, meta, said = written(tmp_path, texts, dedup="minhash", overwrite=True)
    assert kept == [text, "b", far]
    assert meta["dropped"] == {"copies": 3}
    assert meta["train"]["documents"] == 3
    assert "left out: 3 copies" in said


def test_near_copies_are_found_as_often_as_the_formula_says():
    """Of pairs of texts whose runs are as similar as asked, most; of those half as similar, almost none."""
    rng = random.Random(0)

    def pair(changed):
        words = [f"w{rng.randrange(10**6)}" for _ in range(300)]
        other = list(words)
        other[:changed] = [f"v{i}" for i in range(changed)]
        return " ".join(words), " ".join(other)

    def found(changed):
        return sum(not Seen(np.zeros(0, np.uint64)).new(keys(pair(changed), "minhash", 0.8))[1] for _ in range(40))

    assert found(10) >= 38  # similarity 0.94
    assert found(140) <= 4  # 0.36


def test_evaluation_sets(tmp_path):
    question = "What is the total number of apples that Anna has after she gave away seven of them"
    (tmp_path / "quiz.jsonl").write_text(json.dumps({"q": question, "options": ["short", {"a": "x"}]}) + "\n")
    texts = ["nothing of it", f"before, WHAT is the... {question[12:]}! after", "What is the total number of pears"]
    flags = {"decontaminate": (f"quiz={tmp_path}/quiz.jsonl",), "ngram": 8}
    kept, meta, said = written(tmp_path, texts, **flags)
    assert kept == [texts[0], texts[2]]
    assert meta["dropped"] == {"evaluation set quiz": 1}
    (line,) = (tmp_path / "out" / "decontaminated.jsonl").read_text().splitlines()
    report = json.loads(line)
    assert (report["set"], report["document"].endswith("a.jsonl' line 2")) == ("quiz", True)
    assert report["ngram"] == "what is the total number of apples that"
    assert "decontaminated.jsonl says what" in said
    assert "not looked for: 2 texts of evaluation sets that are shorter than 8 words" in said


@given(st.lists(st.sampled_from("abc"), max_size=30), st.lists(st.sampled_from("abc"), max_size=12), st.integers(1, 5))
def test_law_a_run_is_found_where_it_is_and_nowhere_else(words, evaluation, n):
    grams, short = collect({"e": [" ".join(evaluation)]}, n)
    own = {tuple(evaluation[i : i + n]) for i in range(len(evaluation) - n + 1)}
    first = next((" ".join(words[i : i + n]) for i in range(len(words) - n + 1) if tuple(words[i : i + n]) in own), None)
    assert grams.find(" ".join(words)) == (first and ("e", first))
    assert short == (len(evaluation) < n)
