"""Kinds of instances: OLMo-core's, exactly; and what holds for any documents: no token is lost, doubled, or misplaced."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.data.bounds import document_bounds
from olmo_fn.data.curricula import batch_order
from olmo_fn.data.instances import TokenData
from olmo_fn.data.instances.documents import MaskedDocuments
from olmo_fn.data.instances.filtered import Filtered, RepetitionFilter
from olmo_fn.data.instances.fixed import FixedLength, Windows
from olmo_fn.data.instances.interleaved import Interleaved
from olmo_fn.data.instances.joined import Joined
from olmo_fn.data.instances.operators import concatenate
from olmo_fn.data.instances.packed import Packed, best_fit, next_fit
from olmo_fn.data.instances.padded import Padded
from olmo_fn.data.instances.variable import VariableLength
from olmo_fn.data.loader import Loader
from olmo_fn.data.shuffle import BLOCK, keyed, keyed_range, shuffled
from olmo_fn.data.sizes import constant_sizes, together
from olmo_fn.data.tokens import open_masks, open_tokens

FIXTURES = Path(__file__).parents[1] / "fixtures" / "data"
EOS, PAD = 0, 1


def read(name):
    return json.loads((FIXTURES / name).read_text())


DATASETS, VSL = read("datasets.json"), read("vsl.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place, files = tmp_path_factory.mktemp("tokens"), read("files.json")
    for name, tokens in files["tokens"].items():
        np.array(tokens, "<u2").tofile(place / name)
    for name, mask in files["masks"].items():
        np.array(mask, np.bool_).tofile(place / name.replace(".npy", ".mask.npy"))
    for file in VSL["large_files"]:
        p = np.arange(sum(map(abs, file["doc_lens"])))
        ids = 3 + (7 * p + 13 * (p * p % 11) + 101 * file["fid"]) % 250
        ids[[end - 1 for end, n in zip(np.cumsum(np.abs(file["doc_lens"])), file["doc_lens"], strict=True) if n > 0]] = EOS
        ids.astype("<u2").tofile(place / file["path"])
    return place


def token_data(folder, settings, T):
    files = tuple(open_tokens(str(folder / name), "uint16") for name in settings["paths"])
    given = settings.get("label_mask_paths", ())
    masks = open_masks([str(folder / n.replace(".npy", ".mask.npy")) for n in settings["paths"]] if given else [], files)
    return TokenData(files, T, 256, masks, EOS, settings.get("bos_token_id"), PAD)


def kind(folder, name, s):
    if name == "NumpyFSLDataset":
        return FixedLength(longest=s.get("max_target_sequence_length", 0))
    if name == "NumpyPaddedFSLDataset":
        return Padded()
    if name == "NumpyPackedFSLDataset":
        return Packed(long=s.get("long_doc_strategy", "truncate"), files_together=s.get("source_group_size", 1))
    exempt = tuple(str(folder / path) for path in s.get("interleaving_exempt_paths", ()))
    return Interleaved(docs=s["docs_per_instance"], chunks=s["chunks_per_doc"], seed=s["seed"], exempt_paths=exempt)


def lengths(documents):
    """Lengths of documents in a row of numbers."""
    return np.diff(np.flatnonzero(np.diff(documents, prepend=-1, append=-1))).tolist()


@pytest.mark.parametrize("case", range(len(DATASETS)))
def test_instances_are_olmo_cores(folder, case):
    case = DATASETS[case]
    s, T = case["settings"], case["settings"]["sequence_length"]
    longest = s.get("max_target_sequence_length", T)
    instances = kind(folder, case["dataset"], s).build(token_data(folder, s, longest))
    arrays = instances.read(np.arange(len(instances)))
    arrays = {name: x.reshape(-1, T) for name, x in arrays.items()}
    assert len(arrays["input_ids"]) == case["num_instances"]
    rows = [i["input_ids"] for i in case["instances"]]
    if "tie" in (s.get("note") or "") and s["source_group_size"] > 1:  # documents of equal length change places in numpy's sort
        assert sorted(map(len, rows)) == sorted(map(len, arrays["input_ids"].tolist()))
        assert np.array_equal(np.sort(arrays["input_ids"], axis=None), np.sort(rows, axis=None))
        return
    assert arrays["input_ids"].tolist() == rows
    for i, expected in enumerate(case["instances"]):
        if "label_mask" in expected:
            assert arrays["label_mask"][i].astype(int).tolist() == expected["label_mask"]
    if "doc_lens" in case["instances"][0]:
        found = MaskedDocuments(instances, EOS, s.get("bos_token_id")).read(np.arange(len(instances)))["documents"]
        for i, expected in enumerate(case["instances"]):
            ends = set(np.cumsum(lengths(found[i])).tolist())
            theirs = set(np.cumsum(expected["doc_lens"]).tolist())
            assert ends >= theirs  # ours also end where a document was cut off, theirs run on into the next one
            if case["dataset"] == "NumpyFSLDataset":
                assert ends == theirs
    if "instance_filter_config" in s:
        f = s["instance_filter_config"]
        how = RepetitionFilter(f["repetition_max_count"], f["repetition_max_period"], f["repetition_min_period"])
        mask = Filtered(instances, how).read(np.arange(len(instances)))["label_mask"]
        assert mask.all(axis=1).tolist() == [i["instance_mask"] for i in case["instances"]]
        assert (mask.all(axis=1) | ~mask.any(axis=1)).all()


@pytest.mark.parametrize("case", range(10))
def test_repetition_is_found_as_olmo_core_finds_it(case):
    case = read("repetition.json")[case]
    for count, keep in case["instance_mask_by_max_count_period13"].items():
        found = RepetitionFilter(max_count=int(count)).repeats(np.array([case["input_ids"]]))
        assert found.tolist() == [not keep]


@pytest.mark.parametrize("group", ["small", "large"])
@pytest.mark.parametrize("case", range(6))
def test_variable_lengths_and_curricula_are_olmo_cores(folder, group, case):
    case = VSL[group][case]
    name = case["curriculum"].replace("_", "-").removesuffix("-balanced").removesuffix("-1")
    how = VariableLength(
        shortest=case["min_sequence_length"], curriculum=name, cycles=case["num_cycles"] or 8, balanced=bool(case["balanced"])
    )
    longest = case["max_sequence_length"]
    buckets = how.build(token_data(folder, case, longest))
    if case["buckets"]:
        assert {str(n): x.tolist() for n, x in buckets.members.items()} == case["buckets"]
    if case["instances"]:
        ids = buckets.read(np.arange(len(buckets)))["input_ids"]
        assert [row[: len(e)].tolist() for row, e in zip(ids, case["instances"], strict=True)] == case["instances"]
    for expected in case["loaders"]:
        sizes = constant_sizes(expected["global_batch_size"] // longest, longest)
        if "error" in expected:  # OLMo-core's exception: too few batches for cycles
            continue
        loader = buckets.loader(sizes, expected["seed"], len(buckets))
        per_epoch, first = loader.steps_per_epoch, (expected["epoch"] - 1) * loader.steps_per_epoch
        assert per_epoch == expected["total_batches"]
        order = batch_order(loader.counts, name, how.cycles, expected["seed"] + expected["epoch"])
        assert order.tolist() == expected["batch_indices"]
        if expected["index_per_rank"]:
            batches = [[n for part in parts for n in part] for parts in zip(*expected["index_per_rank"], strict=True)]
            assert [loader.numbers(first + i).tolist() for i in range(per_epoch)] == batches


@pytest.mark.parametrize("case", [c for c in read("loader.json")["orders"] if c.get("max_target_sequence_length")])
def test_the_order_for_a_longest_length_is_olmo_cores(case):
    T, longest, world = case["sequence_length"], case["max_target_sequence_length"], case["dp_world_size"]
    per = longest // T
    sizes = together(longest, [(0, case["global_batch_size"] // longest)], [(0, T)])
    if case["global_batch_size"] % longest:
        pytest.skip("such a batch has a part of a window")
    order = "olmo-core" if case.get("shuffle", True) else "sequential"
    loader = Loader(None, sizes, case["seed"], case["dataset_size"] // per, order)
    first = (case["epoch"] - 1) * loader.steps_per_epoch
    for step in range(case["total_batches"]):
        rows = [per * n + i for n in loader.numbers(first + step).tolist() for i in range(per)]
        assert [rows[rank::world] for rank in range(world)] == [ranks[step] for ranks in case["index_per_rank"]]


def test_windows_of_each_and_of_all_files(folder):
    paths = ["part-a.npy", "part-b.npy", "part-c.npy"]
    for case in read("composable.json")["concat_and_chunk"]:
        T, longest = case["sequence_length"], case["max_sequence_length"] or case["sequence_length"]
        tokens = token_data(folder, {"paths": paths}, longest)
        instances = FixedLength(longest=longest).build(tokens)
        rows = instances.read(np.arange(len(instances)))["input_ids"].reshape(-1, T)
        assert rows.tolist() == [i["input_ids"] for i in case["instances"]]
    everything = np.concatenate([np.fromfile(folder / path, "<u2") for path in paths])
    for T in (1, 7, 16, 90, 91, len(everything)):
        joined = Joined().build(token_data(folder, {"paths": paths, "label_mask_paths": paths}, T))
        rows = joined.read(np.arange(len(joined)))
        count = len(everything) // T
        assert rows["input_ids"].tolist() == everything[: count * T].reshape(count, T).tolist()
        mask = np.concatenate([np.fromfile(folder / path.replace(".npy", ".mask.npy"), np.bool_) for path in paths])
        assert rows["label_mask"].tolist() == mask[: count * T].reshape(count, T).tolist()
    assert joined.origin(0).path.endswith("part-a.npy")


def test_documents_as_dolma_writes_them(folder, tmp_path):
    import gzip

    file = open_tokens(str(folder / "part-a.npy"), "uint16")
    beside = tmp_path / "part-a.npy"
    beside.write_bytes((folder / "part-a.npy").read_bytes())
    with gzip.open(tmp_path / "part-a.csv.gz", "wt") as out:
        out.writelines(f"{a},{b},id,source,{i}\n" for i, (a, b) in enumerate(document_bounds(file, EOS).tolist()))
    same = open_tokens(str(beside), "uint16")
    assert np.array_equal(document_bounds(same, EOS, boundaries="metadata"), document_bounds(file, EOS))
    assert np.array_equal(
        document_bounds(file, EOS, cache=tmp_path / "kept"), document_bounds(file, EOS, cache=tmp_path / "kept")
    )
    (tmp_path / "part-a.csv.gz").write_bytes(gzip.compress(b"0,5\n5,500\n"))
    with pytest.raises(ValueError, match=r"from token 5 to 500, and .* 90 tokens"):
        document_bounds(same, EOS, boundaries="metadata")
    (tmp_path / "part-a.csv.gz").unlink()
    with pytest.raises(ValueError, match="metadata"):
        document_bounds(same, EOS, boundaries="metadata")


# --- laws -------------------------------------------------------------------------------------------------------------

documents = st.lists(st.integers(1, 30), min_size=1, max_size=40)


@given(documents, st.integers(4, 24), st.sampled_from(["best", "next"]), st.sampled_from([0, 1, 2]), st.data())
@settings(max_examples=60, deadline=None)
def test_packing_loses_and_doubles_no_token_and_joins_no_documents(tmp_path_factory, doc_lens, T, fit, together, data):
    place = tmp_path_factory.mktemp("packed")
    cut = data.draw(st.integers(0, len(doc_lens)))
    files, at = [], 0
    for i, part in enumerate(p for p in (doc_lens[:cut], doc_lens[cut:]) if p):
        ids = np.arange(at, at + sum(part), dtype=np.uint32) % 60000 + 1  # every token another one
        at += sum(part)
        ids[np.cumsum(part) - 1] = EOS
        ids.tofile(place / f"{i}.npy")
        files.append(open_tokens(str(place / f"{i}.npy"), "uint32"))
    tokens = TokenData(tuple(files), T, 2**17, (), EOS, None, EOS)
    packed = Packed(long="fragment", fit=fit, files_together=together).build(tokens)
    rows = packed.read(np.arange(len(packed)))
    kept = rows["input_ids"][rows["label_mask"]]
    assert np.array_equal(np.sort(kept), np.sort(np.concatenate([np.fromfile(f.path, np.uint32) for f in files])))
    numbers = packed.documents(np.arange(len(packed)))
    for ids, mask, docs in zip(rows["input_ids"], rows["label_mask"], numbers, strict=True):
        for piece in np.unique(docs[mask]):
            tokens_of = ids[(docs == piece) & mask]
            assert (np.flatnonzero(tokens_of == EOS) == len(tokens_of) - 1).all()  # an end is the last of its piece
            assert (np.diff(tokens_of[tokens_of != EOS].astype(np.int64)) == 1).all()  # and nothing else comes between
        assert not (set(docs[mask]) & set(docs[~mask]))
    if fit == "best":
        assert len(packed) <= len(Packed(long="fragment", fit="next", files_together=together).build(tokens))


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 80))
def test_fits_hold_each_document_once_and_no_instance_too_many(lens, capacity):
    lens = np.array(lens, np.int64)
    for order, first in (best_fit(lens, capacity), next_fit(lens, capacity)):
        assert sorted(order.tolist()) == list(range(len(lens)))
        assert all(lens[order[a:b]].sum() <= capacity and b > a for a, b in pairwise(first))


@given(st.data())
@settings(deadline=None)
def test_places_of_the_keyed_order_come_in_blocks(data):
    """Whatever part of it is asked for, over the borders of blocks and of epochs."""
    n = data.draw(st.integers(1, 3 * BLOCK))
    start, stop = sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n))))
    assert np.array_equal(keyed_range(start, stop, n, 5, 2), keyed(np.arange(start, stop), n, 5, 2))
    first, count = data.draw(st.integers(0, 3 * n)), data.draw(st.integers(0, 2 * n))
    whole = np.concatenate([keyed(np.arange(n), n, 5, epoch) for epoch in range(1, 7)])
    assert np.array_equal(shuffled(first, count, n, 1, 5, "keyed"), whole[first : first + count])


@given(st.lists(st.sampled_from(["u1", "u2", "u4", "u8"]), min_size=1, max_size=4), st.booleans(), st.data())
@settings(max_examples=30, deadline=None)
def test_windows_of_files_of_several_types(tmp_path_factory, dtypes, header, data):
    """Rows are read to where they belong, those of narrow files beside those of wide ones; with headers and without."""
    folder, files, windows = tmp_path_factory.mktemp("types"), [], []
    for i, dtype in enumerate(dtypes):
        tokens = np.random.default_rng(i).integers(0, 250, 23 + i).astype(f"<{dtype}")
        np.save(folder / f"{i}.npy", tokens) if header else tokens.tofile(folder / f"{i}.npy")
        files.append(open_tokens(str(folder / f"{i}.npy"), np.dtype(dtype).name))
        windows += [tokens[at : at + 4].astype(np.int64) for at in range(0, len(tokens) - 3, 4)]
    numbers = np.array(data.draw(st.lists(st.integers(0, len(windows) - 1), max_size=9)), np.int64)
    found = Windows(tuple(files), 4, 256).read(numbers)["input_ids"]
    assert found.shape == (len(numbers), 4)
    assert np.array_equal(found.astype(np.int64), np.array([windows[n] for n in numbers]).reshape(-1, 4))


def test_instances_of_several_types_are_put_together(tmp_path):
    """The ids of wide files do not wrap around in the type of narrow ones."""
    parts = []
    for dtype, first in (("uint8", 0), ("uint32", 90_000), ("uint64", 70_000)):
        np.arange(first, first + 8, dtype=dtype).tofile(tmp_path / dtype)
        parts.append(FixedLength().build(TokenData((open_tokens(str(tmp_path / dtype), dtype),), 4, 100_000)))
    found = concatenate(*parts).read(np.array([5, 0, 3]))["input_ids"]
    assert found.tolist() == [[*range(70_004, 70_008)], [*range(4)], [*range(90_004, 90_008)]]


@given(st.integers(1, 3000), st.integers(0, 2**62), st.integers(1, 9))
@settings(deadline=None)
def test_the_keyed_order_is_a_bijection(n, seed, epoch):
    order = keyed(np.arange(n), n, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(keyed(np.arange(n)[::-1], n, seed, epoch), order[::-1])  # a function of the place alone


def test_the_keyed_order_is_as_good_as_a_shuffle():
    """Of neighbours and of halves; and seeds and epochs differ. Bounds are 5 deviations of a random order."""
    n = 100_000
    orders = [keyed(np.arange(n), n, seed, epoch).astype(float) for seed, epoch in ((0, 1), (0, 2), (1, 1))]
    for order in orders:
        assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 5 / n**0.5
        assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / n**0.5
        low = (order[: n // 2] < n / 2).sum()
        assert abs(low - n / 4) < 5 * (n / 16) ** 0.5
        assert abs((order == np.arange(n)).sum() - 1) < 6
    assert abs(np.corrcoef(orders[0], orders[1])[0, 1]) < 5 / n**0.5
    assert abs(np.corrcoef(orders[0], orders[2])[0, 1]) < 5 / n**0.5


def test_ten_billion_instances_are_shuffled_at_once():
    import time
    import tracemalloc

    tracemalloc.start()
    start = time.process_time()
    found = shuffled(3 * 10**9, 4096, 10**10, 4096, 0, "keyed")
    used, peak = time.process_time() - start, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(found)) == 4096
    assert found.max() < 10**10
    assert used < 0.2
    assert peak < 100e6


@given(
    st.lists(st.integers(0, 12), min_size=1, max_size=5),
    st.sampled_from(["natural", "grow-p2", "grow-linear"]),
    st.integers(1, 4),
)
def test_curricula_see_each_batch_once(counts, curriculum, cycles):
    counts = counts if curriculum == "natural" else [n * cycles for n in counts]
    if sum(counts):
        order = batch_order(counts, curriculum, cycles, seed=3)
        assert np.array_equal(np.sort(order), np.arange(sum(counts)))
        if counts[-1]:
            assert order[0] >= sum(counts[:-1])  # the longest length comes first


@given(st.lists(st.lists(st.integers(0, 2), min_size=12, max_size=12), min_size=1, max_size=4), st.integers(2, 6))
def test_repetition_is_what_the_definition_says(rows, count):
    def repeats(row):
        return any(
            row[start : start + period] * count == row[start : start + period * count]
            for period in range(1, 5)
            for start in range(len(row) - period * count + 1)
        )

    found = RepetitionFilter(max_count=count, max_period=4).repeats(np.array(rows))
    assert found.tolist() == [repeats(row) for row in rows]
