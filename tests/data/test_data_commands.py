"""The commands that look at data: what a file is, what a mixture holds, what a step trains on."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.cli import main as cli
from olmo_fn.data.inspect import fitting_tokenizers, guess_dtype, histogram, inspect

EOS = {"uint8": 0, "uint16": 50_279, "uint32": 100_257}


def tokens_like(dtype, count=20_000, seed=0):
    """Ids as text has them: small ones often, and ends of documents."""
    rng = np.random.default_rng(seed)
    most = {"uint8": 250, "uint16": 50_000, "uint32": 100_000}[dtype]
    ids = np.minimum(rng.zipf(1.2, count), most - 1)
    if dtype == "uint8":
        ids = rng.choice(np.frombuffer(b"the quick brown fox jumps over a lazy dog. ", np.uint8), count)
    ids[rng.integers(0, count, count // 100)] = EOS[dtype]
    return ids.astype(dtype)


@given(st.sampled_from(["uint8", "uint16", "uint32"]), st.integers(0, 50))
@settings(max_examples=15, deadline=None)
def test_the_type_of_a_file_is_found(tmp_path_factory, dtype, seed):
    path = tmp_path_factory.mktemp("type") / "t.npy"
    tokens_like(dtype, seed=seed).tofile(path)
    assert guess_dtype(str(path)) == dtype


def test_documents_and_tokenizers_are_found(tmp_path):
    ids = tokens_like("uint32")
    ids.tofile(tmp_path / "t.npy")
    found = inspect(str(tmp_path / "t.npy"))
    assert found.file.num_tokens == len(ids)
    assert found.fits[0].name == "allenai/dolma2-tokenizer"
    assert found.eos_id == 100_257
    ends = np.flatnonzero(ids == 100_257) + 1
    assert found.lengths.tolist() == np.diff(ends, prepend=0).tolist()
    assert found.rest == len(ids) - ends[-1]
    assert fitting_tokenizers(np.array([3, 4, 5])) == ()  # no document ends


def test_a_histogram_counts_every_document():
    lengths = np.random.default_rng(0).integers(1, 5000, 1000)
    counts = [int(line[20:].split()[0].replace(",", "")) for line in histogram(lengths).splitlines()]
    assert sum(counts) == 1000


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory):
    place = tmp_path_factory.mktemp("text")
    (place / "in.jsonl").write_text("".join(f'{{"text": "document {i} of the corpus"}}\n' for i in range(400)))
    assert (
        cli.main(["data", "tokenize", f"{place}/in.jsonl", "--output", f"{place}/out", "--tokenizer", "byte", "--workers", "1"])
        == 0
    )
    return place / "out"


def test_inspect_prints_what_a_file_is(tokenized, tmp_path, capsys):
    assert cli.main(["data", "inspect", f"{tokenized}/part-*.npy", "--documents", "1"]) == 0
    out = capsys.readouterr().out
    for part in ("uint16, as meta.json says", "ids up to 256", "that end with 256", "median 27", "| document 0 of the corpus"):
        assert part in out
    assert cli.main(["data", "inspect", f"{tokenized}/part-*.npy", "--dtype", "uint8"]) == 0
    tokens_like("uint16").tofile(tmp_path / "other.npy")
    assert cli.main(["data", "inspect", f"{tmp_path}/other.npy", "--tokenizer", f"{tokenized}/tokenizer.json"]) == 2
    assert "has the id" in capsys.readouterr().err


def test_mix_prints_a_table_and_draws(tokenized, tmp_path, capsys):
    (tmp_path / "b.npy").write_bytes((tokenized / "heldout.npy").read_bytes())
    (tmp_path / "mix.yaml").write_text(
        f"sources:\n- {{name: a, paths: [{tokenized}/part-00000.npy], ratio: 0.75, max_repetition: 9}}\n"
        f"- {{name: b, paths: [{tmp_path}/b.npy], ratio: 0.25, max_repetition: 99}}\n"
        "schedule: [{from: 0.5, ratios: {a: 1.0}}]\n"
    )
    words = ["data", "mix", str(tmp_path / "mix.yaml"), "--steps", "40", "--batch-size", "4", "--sequence-length", "16"]
    assert (
        cli.main([*words, "--vocab-size", "257", "--first", "30", "--last", "40", "--output", str(tmp_path / "mix.png")]) == 0
    )
    out = capsys.readouterr().out
    share = {line.split()[0]: line for line in out.splitlines()}
    assert "87.5" in share["a"]
    assert "12.5" in share["b"]
    assert "640 (100.0%)" in share["a"]
    assert (tmp_path / "mix.png").stat().st_size > 5000
    assert cli.main([*words, "--first", "50"]) == 2


def test_show_prints_what_a_step_trains_on(tokenized, tmp_path, capsys):
    run = tmp_path / "run"
    small = [
        "--model.n-layers",
        "1",
        "--model.d-model",
        "16",
        "--model.n-heads",
        "2",
        "--model.vocab-size",
        "257",
        "--recipe.no-compile",
    ]
    small += ["--recipe.batch-size", "2", "--recipe.sequence-length", "32", "--run.steps", "3", "--run.eval-tokens", "0"]
    small += ["--schedule.warmup", "1"]
    words = ["train", "olmo2-tiny", *small, "--data.paths", f"{tokenized}/part-*.npy", "--run.folder", str(run)]
    assert cli.main([*words, "--data.tokenizer", f"{tokenized}/tokenizer.json"]) == 0
    capsys.readouterr()
    assert cli.main(["data", "show", str(run), "--step", "2", "--texts", "1"]) == 0
    out = capsys.readouterr().out
    assert "step 2: 2 sequences of 32 tokens, 62 in the loss" in out
    assert len(re.findall(r"part-00000\.npy from token [\d,]+ on", out)) == 2
    assert "corpusdocument" in out
    assert cli.main(["data", "show", str(run), "--step", "4"]) == 2
    assert "the steps of this run are 1 to 3" in capsys.readouterr().err
    assert cli.main(["data", "shwo"]) == 2


def test_a_run_of_a_mixture_reports_the_loss_of_each_source(tokenized, tmp_path, capsys):
    (tmp_path / "b.npy").write_bytes((tokenized / "part-00000.npy").read_bytes())
    sources = ((name, f"{folder}.npy") for name, folder in (("a", f"{tokenized}/part-00000"), ("b", f"{tmp_path}/b")))
    lines = [f"- {{name: {name}, paths: [{path}], ratio: 0.5}}\n" for name, path in sources]
    (tmp_path / "mix.yaml").write_text("sources:\n" + "".join(lines))
    small = "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.vocab-size 257 --recipe.no-compile"
    small += " --recipe.batch-size 4 --recipe.sequence-length 32 --run.steps 3 --schedule.warmup 1 --run.eval-tokens 0"
    words = ["train", "olmo2-tiny", *small.split(), "--data.mix", f"{tmp_path}/mix.yaml", "--data.eos-id", "256"]
    words += ["--data.dtype", "uint16"]
    assert cli.main([*words, "--loss.sources", "2", "--run.folder", str(tmp_path / "run")]) == 0
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for step in metrics:
        if "ce" in step:
            a, b = step["loss/a"], step["loss/b"]
            assert any(abs(n / 4 * a + (1 - n / 4) * b - step["ce"]) < 1e-3 for n in (1, 2, 3))  # n rows of 4 are from a
            assert "source_ce" not in step
    assert cli.main([*words, "--loss.sources", "3", "--run.folder", str(tmp_path / "other")]) == 2
    assert "give --loss.sources 2" in capsys.readouterr().err
