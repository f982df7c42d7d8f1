"""Mixtures: OLMo-core's sampling and sizes, exactly; counts that equal their table at every step; and what users get wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.data.instances import TokenData
from olmo_fn.data.instances.fixed import FixedLength
from olmo_fn.data.instances.operators import Concatenated, concatenate, mix, resize, sample_all, sliced, split
from olmo_fn.data.mix import find_mix, read_mix
from olmo_fn.data.mixing import (
    TURN,
    MixPhase,
    Mixture,
    apportion,
    sample_documents,
    sample_sizes,
    sample_tokens,
    span_slice,
)
from olmo_fn.data.settings import Data
from olmo_fn.data.shuffle import source_order
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokens import open_tokens

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"


def read(name):
    return json.loads((FIXTURES / name).read_text())


CASES, FILES = read("composable.json"), read("files.json")
PARTS = ["part-a.npy", "part-b.npy", "part-c.npy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mix")
    for name in PARTS:
        np.array(FILES["tokens"][name], "<u2").tofile(place / name)
    return place


@pytest.fixture(scope="module")
def parts(folder):
    return [FixedLength().build(TokenData((open_tokens(str(folder / name), "uint16"),), 4, 256)) for name in PARTS]


def ids(instances):
    return instances.read(np.arange(len(instances)))["input_ids"].tolist()


def tokens_of(spans):
    return [t for file, start, end in spans.tolist() for t in FILES["tokens"][PARTS[file]][start:end]]


STREAMS = [np.array([[i, 0, len(FILES["tokens"][name])]]) for i, name in enumerate(PARTS)]
DOCUMENTS = [np.insert(np.array(offsets), 0, i, axis=1) for i, offsets in enumerate(CASES["in_memory_document_offsets"])]


@pytest.mark.parametrize("case", CASES["calculate_sample_sizes"])
def test_sizes_of_samples_are_olmo_cores(case):
    given = case["source_sizes"], case["ratios"], case["max_repetition_factors"], case["target_size"]
    if "error" in case:
        with pytest.raises(ValueError, match="missing"):
            sample_sizes(*given)
    else:
        assert sample_sizes(*given).tolist() == case["sample_sizes"]


@pytest.mark.parametrize("case", CASES["sampling"])
def test_samples_of_tokens_and_documents_are_olmo_cores(case):
    if "error" in case:
        with pytest.raises(ValueError, match="no whole document fits into 7 tokens"):
            sample_documents(np.concatenate(DOCUMENTS), case["max_tokens"], case["seed"])
        return
    if case["kind"] == "token":
        found = sample_tokens(STREAMS, case["max_tokens"], case["seed"])
    else:
        found = sample_documents(np.concatenate(DOCUMENTS), case["max_tokens"], case["seed"])
    assert tokens_of(found) == case["input_ids"]
    assert len(case["input_ids"]) == case["num_tokens"]


@pytest.mark.parametrize("case", CASES["mixing"])
def test_mixtures_of_tokens_and_documents_are_olmo_cores(case):
    sources = STREAMS if case["kind"] == "token" else DOCUMENTS
    have = [int((spans[:, 2] - spans[:, 1]).sum()) for spans in sources]
    counts = sample_sizes(have, case["ratios"], case["max_repetition_factors"], case["num_tokens"]).tolist()
    found = []
    for i, (spans, n) in enumerate(zip(sources, counts, strict=True)):
        seed = case["seed"] + i
        found.append(
            tokens_of(sample_tokens([spans], n, seed) if case["kind"] == "token" else sample_documents(spans, n, seed))
        )
    assert [len(part) for part in found] == case["counts"]
    assert [t for part in found for t in part] == case["input_ids"]


def test_samples_mixtures_and_splits_of_instances_are_olmo_cores(parts):
    for case in CASES["sampling_instances"]:
        found = sample_all(parts, case["max_instances"], case["seed"])
        assert [len(part) for part in found.parts] == case["source_sample_sizes"]
        assert ids(found) == case["instances"]
    for case in CASES["mixing_instances"]:
        found = mix(parts, case["ratios"], case["max_repetition_factors"], case["seed"], 4, case["num_instances"])
        assert [len(part) for part in found.parts] == case["counts"]
        assert ids(found) == case["instances"]
    assert [ids(part) for part in split(parts[2], 0.7)] == CASES["split_0.7"]
    with pytest.raises(ValueError, match="missing"):
        mix(parts, [0.1, 0.8, 0.1], [1, 1, 1], 0, 4, 1000)


@pytest.mark.parametrize("case", [c for c in CASES["loader"] if "error" not in c and c["sources_per_epoch"] == -1])
def test_orders_over_sources_are_olmo_cores(case, parts):
    how = {"inter_source": "all", "intra_source": "by-source", "interleaved_source": "round-robin", None: "all"}
    sizes = [len(part) for part in parts]
    seed = case["seed"] if case["shuffle"] else None
    found = source_order(sizes, how[case["shuffle_strategy"]], seed, case["epoch"])
    assert found.tolist() == case["global_indices"]
    rows, world = case["global_batch_size"] // 4, case["dp_world_size"]
    everything = concatenate(*parts)
    for rank, batches in enumerate(case["first_two_batches_per_rank"]):
        for n, expected in enumerate(batches):
            batch = everything.read(found[n * rows : (n + 1) * rows])["input_ids"]
            assert batch[rank::world].tolist() == expected


@pytest.mark.parametrize("case", read("mixture.json"))
def test_source_mixtures_are_olmo_cores(case, folder):
    s = case["settings"]
    sources = s.get("sources") or [
        {"name": path[5], "paths": [path], "ratio": ratio} for path, ratio in zip(s["paths"], s["target_ratios"], strict=True)
    ]
    wanted, most, names, short = [], [], [], ""
    for source in sources:
        have = [len(FILES["tokens"][path]) for path in source["paths"]]
        times = source.get("max_repetition_ratio", s.get("max_repetition_ratio", 1.0))
        usable, needed = (
            int(sum(have) * s.get("max_source_fraction", 1.0) * times),
            int(s["requested_tokens"] * source["ratio"]),
        )
        short = short or (f"{usable} < {needed}" if usable < needed else "")
        left = needed / sum(have)
        while left > 0:  # once through all files, and again for what is left
            for path, n in zip(source["paths"], have, strict=True):
                names.append([source["name"], path])
                wanted.append(int(np.ceil(n * min(1.0, left))))
                most.append(n)
            left -= min(1.0, left)
    if "error" in case:
        assert short in case["message"]
        return
    T = s["sequence_length"]
    batches = -(-s["requested_tokens"] // s["global_batch_size"])
    found = apportion(wanted, most, T, batches * (s["global_batch_size"] // T))
    got = [[*name, tokens] for name, tokens in zip(names, found, strict=True)]
    assert got == case["tokens_per_path"]
    if "instances" in case:
        rows = [np.array(FILES["tokens"][path][: n // T * T]).reshape(-1, T).tolist() for _, path, n in got]
        assert [row for part in rows for row in part] == case["instances"]


# --- laws -------------------------------------------------------------------------------------------------------------


@st.composite
def mixtures(draw):
    count = draw(st.integers(1, 4))
    starts = sorted({0, *draw(st.lists(st.integers(1, 300), max_size=2))})
    phases = []
    for start in starts:
        weights = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count).filter(any))
        phases.append(MixPhase(start, tuple(w / sum(weights) for w in weights)))
    return Mixture(
        tuple(draw(st.lists(st.integers(1, 50), min_size=count, max_size=count))), tuple(phases), draw(st.integers(0, 9))
    )


@given(mixtures(), st.integers(0, 400), st.integers(0, 60))
@settings(deadline=None)
def test_a_mixture_is_what_its_table_says_at_every_instance(mixture, first, count):
    whole = mixture(0, 460)
    assert np.array_equal(mixture(first, count), whole[first : first + count])
    source = np.searchsorted(np.cumsum(mixture.sizes), whole, side="right")
    assert np.array_equal(source, mixture.sources(0, 460))
    for n in (0, first, first + count, 460):
        assert mixture.counts(n).tolist() == [int((source[:n] == s).sum()) for s in range(len(mixture.sizes))]
    for s, size in enumerate(mixture.sizes):  # all of a source before any of it again
        drawn = whole[source == s]
        for start in range(0, len(drawn), size):
            assert len(np.unique(drawn[start : start + size])) == len(drawn[start : start + size])


def test_any_stretch_of_a_mixture_is_close_to_its_ratios():
    ratios = (0.5, 0.3, 0.15, 0.05)
    mixture = Mixture((10**6,) * 4, (MixPhase(0, ratios),), 0)
    for n in (10, 100, 1000, 10**4, 10**6, 10**9):
        assert np.abs(mixture.counts(n) - np.array(ratios) * n).max() < 4 + n / TURN * 4
    steps = np.array([mixture.counts(512 * (s + 1)) - mixture.counts(512 * s) for s in range(200)])
    assert np.abs(steps - 512 * np.array(ratios)).max() < 4


def test_spans_and_operators_lose_nothing(parts):
    spans = np.array([[0, 5, 9], [1, 0, 4], [2, 3, 3], [0, 1, 8]])
    flat = [(f, t) for f, a, b in spans.tolist() for t in range(a, b)]
    for start in range(len(flat) + 1):
        for stop in range(start, len(flat) + 1):
            assert [(f, t) for f, a, b in span_slice(spans, start, stop).tolist() for t in range(a, b)] == flat[start:stop]
    everything = concatenate(*parts)
    assert ids(everything) == [row for part in parts for row in ids(part)]
    assert ids(sliced(everything, 20, -3)) == ids(everything)[20:-3]
    assert sorted(ids(resize(parts[0], 2.0, seed=1))) == sorted(ids(parts[0]) * 2)
    assert everything.origin(len(parts[0])).path.endswith("part-b.npy")
    assert isinstance(everything, Concatenated)


# --- files ------------------------------------------------------------------------------------------------------------

MIX = """
sources:
  - {name: a, paths: [part-a.npy], ratio: 0.5, max_repetition: 4}
  - {name: bc, paths: ["part-[bc].npy"], ratio: 0.5}
schedule:
  - {from: 0.5, ratios: {bc: 1.0}}
"""


def write(folder, text, name="mix.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_run_of_a_mixture(folder):
    data = Data(mix=write(folder, MIX), dtype="uint16", heldout_fraction=0.1)
    source = open_data(data, 256, constant_sizes(4, 4), steps=20)
    assert sorted(source.heldout) == ["a", "bc"]
    mixture = source.train.mixture
    assert [phase.first for phase in mixture.phases] == [0, 40]
    names = [Path(source.train.origin(step, row).path).name for step in range(20) for row in range(4)]
    assert abs(names[:40].count("part-a.npy") - 20) <= 1
    assert names[40:].count("part-a.npy") == 0
    trained = {tuple(row) for step in range(20) for row in source.train(step)["input_ids"].tolist()}
    held = source.heldout["a"].tokens.reshape(-1, 4).tolist()
    assert not trained & {tuple(row) for row in held}
    assert ("mix", str(folder / "mix.yaml")) in {(kind, path) for path, kind in source.files}
    natural = open_data(
        Data(mix=write(folder, MIX.split("schedule")[0].replace(", ratio: 0.5", "")), dtype="uint16"), 256, constant_sizes(4, 4)
    )
    assert natural.train.mixture is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            ("ratio: 0.5}", "ratio: 0.4}"),
            r"the ratios sum to 0\.9 and not to 1; divided by that they are a 0\.5556, bc 0\.4444",
        ),
        ((", ratio: 0.5}", "}"), "no ratio for 'bc'"),
        (("max_repetition: 4", "max_repetition: 0.5"), "max_repetition must be at least 1"),
        (("name: bc", "name: a"), "two sources 'a'"),
        (("paths: [part-a.npy], ", ""), "has no paths"),
        (("max_repetition", "max_repetitions"), "'max_repetitions' is nothing that a source has"),
        (("from: 0.5", "from: -1"), "it is a step"),
        (("{bc: 1.0}", "{d: 1.0}"), "a ratio of 'd'"),
        (("sources:", "source:"), "no list of sources"),
        (("ratio: 0.5,", "ratio: [,"), "is no YAML"),
        (
            ("max_repetition: 4", "max_repetition: 1"),
            r"need \d+ tokens of 'a', which has 88 in instances, used at most 1 times: ",
        ),
        (("part-a.npy", "part-x.npy"), "no token file matches"),
    ],
)
def test_mistakes_in_a_mix_file(folder, change, message):
    data = Data(mix=write(folder, MIX.replace(*change, 1), "bad.yaml"), dtype="uint16", heldout_fraction=0.0)
    with pytest.raises(ValueError, match=message) as found:
        open_data(data, 256, constant_sizes(4, 4), steps=30)
    assert "\n" not in str(found.value)


def test_published_mixes(folder, tmp_path):
    found = read_mix("v3-small-ppl-validation")
    assert found.sources[0].name == "c4_en-validation"
    assert (
        found.sources[0]
        .paths[0]
        .startswith("http://olmo-data.org/eval-data/perplexity/v3_small_allenai/dolma2-tokenizer/c4_en/")
    )
    own = tmp_path / "own.txt"
    own.write_text(f"# comment\nweb,{folder}/part-a.npy\nweb,{folder}/part-b.npy\ncode,{folder}/part-c.npy\n")
    source = open_data(Data(mix=str(own), dtype="uint16", heldout_fraction=0.0), 256, constant_sizes(4, 4))
    assert source.train.num_instances == 89
    own.write_text("web\n")
    with pytest.raises(ValueError, match="line 1 is 'web', and not label,path"):
        read_mix(str(own))
    with pytest.raises(ValueError, match="no published mix that is here"):
        find_mix("OLMo-mix-9999")
    with pytest.raises(ValueError, match="leave out --data"):
        open_data(Data(("x.npy",), mix=str(own)), 256, constant_sizes(4, 4))
