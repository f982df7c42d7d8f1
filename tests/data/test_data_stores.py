"""Token files elsewhere: the same tokens as on a disk, whatever the server does; pages that processes share; errors by name."""

import gzip
import json
import os
import struct
import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.cli import main as cli
from olmo_fn.data import stores
from olmo_fn.data.bounds import document_bounds
from olmo_fn.data.identity import difference, identity
from olmo_fn.data.megatron import MAGIC
from olmo_fn.data.meta import read_meta
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.stores import PAGE, head, is_remote, listed, trim
from olmo_fn.data.tokens import expand, open_tokens, read_tokens
from olmo_fn.testing.object_server import serving

TOKENS = np.random.default_rng(0).integers(0, 250, 1_400_000).astype("<u2")  # 2.8 MB, several pages


@pytest.fixture
def server():
    with serving() as (objects, address):
        objects["a.npy"] = TOKENS.tobytes()
        yield objects, address


@given(st.lists(st.tuples(st.integers(0, len(TOKENS)), st.integers(0, 600_000)), min_size=1, max_size=5), st.booleans())
@settings(max_examples=10, deadline=None)
def test_ranges_are_those_of_the_file(tmp_path_factory, ranges, keep):
    with serving() as (objects, address):
        objects["a.npy"] = TOKENS.tobytes()
        file = open_tokens(f"{address}/a.npy", "uint16", tmp_path_factory.mktemp("pages") if keep else None, 10**9)
        assert file.num_tokens == len(TOKENS)
        for start, count in ranges:
            stop = min(start + count, len(TOKENS))
            assert np.array_equal(read_tokens(file, start, stop), TOKENS[start:stop])


def test_pages_are_read_once_and_shared(server, tmp_path):
    objects, address = server
    file = open_tokens(f"{address}/a.npy", "uint16", tmp_path, 10**9)
    threads = [threading.Thread(target=read_tokens, args=(file, i * 1000, 900_000 + i)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    objects.requests.clear()
    assert np.array_equal(read_tokens(file), TOKENS)
    again = open_tokens(f"{address}/a.npy", "uint16", tmp_path, 10**9)  # another process would make the same value
    assert np.array_equal(read_tokens(again), TOKENS)
    ranges = [ranged for _, _, ranged in objects.requests if ranged]
    first = 1_800_010 // PAGE + 1  # the first page that was not there yet
    assert sorted(int(ranged[6:].split("-")[0]) // PAGE for ranged in ranges) == list(range(first, -(-2 * len(TOKENS) // PAGE)))
    assert not list(tmp_path.rglob("*.draft"))


@pytest.mark.parametrize("failures", [[503, 503], ["cut"], [500, "cut", 503]])
def test_failures_are_waited_out(server, tmp_path, failures):
    objects, address = server
    file = open_tokens(f"{address}/a.npy", "uint16", tmp_path, 10**9)
    objects.fail = list(failures)
    assert np.array_equal(read_tokens(file), TOKENS)
    assert not objects.fail


def test_a_changed_or_vanished_object_is_named(server, tmp_path):
    objects, address = server
    file = open_tokens(f"{address}/a.npy", "uint16", tmp_path, 10**9)
    before = identity([(file.path, file.dtype)])
    objects["a.npy"] = TOKENS[::-1].tobytes()
    with pytest.raises(ValueError, match=r"a\.npy has changed since the run opened it"):
        read_tokens(file, 1_000_000, 1_000_100)
    assert difference(before, identity([(file.path, file.dtype)])).endswith("has another content than it had")
    assert np.array_equal(read_tokens(open_tokens(file.path, "uint16", tmp_path, 10**9)), TOKENS[::-1])
    del objects["a.npy"]
    with pytest.raises(ValueError, match=r"a\.npy is not there"):
        read_tokens(file, 1_000_000, 1_000_100)
    with pytest.raises(ValueError, match=r"b\.npy is not there"):
        head(f"{address}/b.npy")


def test_a_server_that_is_away_is_said_in_one_line(monkeypatch):
    monkeypatch.setattr(stores, "RETRIES", 1)
    stores._store.cache_clear()
    with pytest.raises(ValueError, match=r"cannot read http://127\.0\.0\.1:9/a\.npy") as found:
        head("http://127.0.0.1:9/a.npy")
    stores._store.cache_clear()
    assert "\n" not in str(found.value)


def test_a_cache_that_is_full_or_cannot_be_written_costs_no_token(server, tmp_path):
    objects, address = server
    (tmp_path / "file").touch()
    file = open_tokens(f"{address}/a.npy", "uint16", tmp_path / "file" / "pages", 10**9)
    with pytest.warns(UserWarning, match="cannot keep pages"):
        assert np.array_equal(read_tokens(file), TOKENS)
    small = open_tokens(f"{address}/a.npy", "uint16", tmp_path / "small", 1 << 20)
    assert np.array_equal(read_tokens(small), TOKENS)
    assert trim(tmp_path / "small", 1 << 20) <= 1 << 20
    assert np.array_equal(read_tokens(small), TOKENS)
    page = next((tmp_path / "small").glob("*/*"))
    os.truncate(page, 100)  # as a disk that was full leaves it
    assert np.array_equal(read_tokens(small), TOKENS)
    objects.clear()


def test_a_run_reads_the_same_batches_from_elsewhere(server, tmp_path):
    _, address = server
    TOKENS.tofile(tmp_path / "a.npy")
    sources = [
        open_data(Data((path,), dtype="uint16", eos_id=0, cache_dir=str(tmp_path / "cache")), 256, constant_sizes(4, 64))
        for path in (str(tmp_path / "a.npy"), f"{address}/a.npy")
    ]
    for step in (0, 7, 5000):
        here, there = (source.train(step) for source in sources)
        assert all(here[name].equal(there[name]) for name in here)
    with pytest.raises(ValueError, match="take it out of one"):
        open_data(Data((f"{address}/a.npy",), (f"{address}/a.npy",), dtype="uint16"), 256, constant_sizes(4, 64))


META = {"dtype": "uint32", "vocab_size": 257, "eos_id": 3, "files": {"part-00000.npy": {"tokens": 4000, "bytes": 9000}}}


def test_meta_json_is_read_beside_files(server):
    objects, address = server
    objects["web/part-00000.npy"] = TOKENS[:4000].astype("<u4").tobytes()
    objects["web/meta.json"] = json.dumps(META).encode()
    path = f"{address}/web/part-00000.npy"
    opened = open_data(Data((path,), heldout_fraction=0.1), 257, constant_sizes(4, 64))
    assert opened.eos_id == 3
    assert opened.train.instances.files[0].dtype == "uint32"
    assert np.array_equal(opened.train.instances.read(np.array([1]))["input_ids"][0], TOKENS[64:128])
    objects["other/part-00000.npy"] = objects["web/part-00000.npy"]
    objects["other/meta.json"] = json.dumps(META | {"eos_id": 4}).encode()
    both = Data((path,), heldout_paths=(f"{address}/other/part-00000.npy",))
    with pytest.raises(ValueError, match=r"other' are of another tokenizer \(257 ids, end of document 4\)"):
        open_data(both, 257, constant_sizes(4, 64))
    assert cli.main(["data", "inspect", path, "--documents", "1"]) == 0


def test_documents_and_masks_are_read_beside_files(server, tmp_path):
    """Of dolma, of Megatron-LM, and as the end-of-document token says; of an object that changed they are found anew."""
    objects, address = server
    objects["a.csv.gz"] = gzip.compress(b"0,10,id,src,1\n10,4000,id,src,1\n")
    mask = TOKENS % 3 > 0
    objects["mask.npy"] = mask.tobytes()
    objects["m.bin"] = TOKENS[:50].tobytes()
    ends = np.array([20, 30], "<i4").tobytes() + np.array([0, 40], "<i8").tobytes() + np.array([0, 1, 2], "<i8").tobytes()
    objects["m.idx"] = MAGIC + struct.pack("<QBQQ", 1, 8, 2, 3) + ends
    a, m = f"{address}/a.npy", f"{address}/m.bin"
    for path, expected in ((a, [[0, 10], [10, 4000]]), (m, [[0, 20], [20, 50]])):
        assert document_bounds(open_tokens(path, "uint16"), 0, boundaries="metadata").tolist() == expected
    assert open_data(Data((m,), heldout_fraction=0.0), 256, constant_sizes(1, 8)).train.instances.files[0].dtype == "uint16"
    objects["x.bin"], objects["t.arrow"] = b"1234", b"ARROW1"
    with pytest.raises(ValueError, match=r"needs its index: http://.*/x\.idx is not there"):
        open_data(Data((f"{address}/x.bin",)), 256, constant_sizes(1, 8))
    with pytest.raises(ValueError, match=r"mask\.csv\.gz' is not there"):
        document_bounds(open_tokens(f"{address}/mask.npy", "uint8"), 0, boundaries="metadata")
    for shift in (0, 1):
        objects["a.npy"] = (TOKENS ^ shift).tobytes()
        found = document_bounds(open_tokens(a, "uint16", tmp_path, 10**9), 8, cache=tmp_path)
        assert np.array_equal(found[:, 1], np.flatnonzero((TOKENS ^ shift) == 8) + 1)
    masked = Data((a,), dtype="uint16", label_mask_paths=(f"{address}/mask.npy",), heldout_fraction=0.0, order="sequential")
    batch = open_data(replace(masked, cache_dir=str(tmp_path)), 256, constant_sizes(2, 8)).train(5)
    expected = np.where(mask, (TOKENS ^ 1).astype(np.int64), -100)[80:96].reshape(2, 8)
    assert np.array_equal(batch["labels"][:, :-1], expected[:, 1:])
    with pytest.raises(ValueError, match="is a table, and these are read from a disk alone"):
        open_data(Data((f"{address}/t.arrow",)), 256, constant_sizes(1, 8))


@pytest.mark.parametrize("content", [b"[1]", b'{"dtype": "float"}', b"\xff", b"{", b"[" * 100_000])
def test_what_is_no_meta_json_is_none(server, content):
    objects, address = server
    objects["web/meta.json"] = content
    assert read_meta(f"{address}/web") is None


def test_a_store_that_shows_no_meta_json_has_none_and_one_that_fails_is_an_error(server):
    objects, address = server
    assert read_meta(f"{address}/web") is None
    objects["web/meta.json"] = json.dumps(META).encode()
    objects.fail = [403]
    assert read_meta(f"{address}/web") is None
    objects.fail = [400]
    with pytest.raises(ValueError, match=r"cannot read http://.*/web/meta\.json"):
        read_meta(f"{address}/web")


def test_a_bad_token_is_found_at_the_start_in_the_beginning_and_later_where_it_is_used(server, tmp_path):
    """Nobody waits for gigabytes to be read that are looked at again when they are used."""
    objects, address = server
    bad = TOKENS.copy()
    bad[1_000_000] = 60_000
    objects["bad.npy"] = bad.tobytes()
    data = Data((f"{address}/bad.npy",), dtype="uint16", heldout_fraction=0.0, order="sequential", cache_dir=str(tmp_path))
    source = open_data(data, 256, constant_sizes(4, 64))
    assert sum(method == "GET" for method, _, _ in objects.requests) <= 3
    with pytest.raises(ValueError, match=r"token 60000 at offset 1,000,000 of 'http"):
        source.train(1_000_000 // 256)
    bad[1000] = 60_000
    objects["bad.npy"] = bad.tobytes()
    with pytest.raises(ValueError, match=r"token 60000 at offset 1,000 of 'http"):
        open_data(data, 256, constant_sizes(4, 64))


def test_addresses():
    assert is_remote("gs://bucket/a.npy")
    with pytest.raises(ValueError, match=r"ftp:// is nothing that is read; there are http://"):
        is_remote("ftp://a/b.npy")
    with pytest.raises(ValueError, match="http cannot list files"):
        listed("http://a/*.npy")
    with pytest.raises(ValueError, match="names no bucket"):
        stores.store_of("s3:///a.npy")


def test_r2_says_which_variable_is_missing(monkeypatch):
    monkeypatch.delenv("R2_ENDPOINT_URL", raising=False)
    stores._store.cache_clear()
    with pytest.raises(ValueError, match="R2_ENDPOINT_URL is not set"):
        head("r2://bucket/a.npy")


@pytest.fixture
def s3(monkeypatch):
    """A server that speaks S3, with a bucket."""
    moto = pytest.importorskip("moto.server")
    boto3 = pytest.importorskip("boto3")
    server = moto.ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "ENDPOINT_URL": f"http://{host}:{port}"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=f"http://{host}:{port}")
    client.create_bucket(Bucket="tokens")
    stores._store.cache_clear()
    yield client
    server.stop()
    stores._store.cache_clear()


def test_s3(s3, tmp_path, monkeypatch):
    for name in ("part-1.npy", "part-0.npy", "other.npy"):
        s3.put_object(Bucket="tokens", Key=f"web/{name}", Body=TOKENS.tobytes())
    assert expand(["s3://tokens/web/part-*.npy"]) == ("s3://tokens/web/part-0.npy", "s3://tokens/web/part-1.npy")
    with pytest.raises(ValueError, match="no token file matches 's3://tokens/web/x-"):
        expand(["s3://tokens/web/x-*.npy"])
    file = open_tokens("s3://tokens/web/part-0.npy", "uint16", tmp_path, 10**9)
    assert np.array_equal(read_tokens(file, 100, 500_000), TOKENS[100:500_000])
    s3.put_object(Bucket="tokens", Key="web/part-0.npy", Body=TOKENS[::-1].tobytes())
    with pytest.raises(ValueError, match="has changed since the run opened it"):
        read_tokens(file, 1_300_000, 1_300_010)
    with pytest.raises(ValueError, match=r"s3://tokens/web/no\.npy is not there"):
        head("s3://tokens/web/no.npy")


def test_numpy_headers_are_passed_over(tmp_path):
    np.save(tmp_path / "a.npy", TOKENS[:1000])
    file = open_tokens(str(tmp_path / "a.npy"), "uint16")
    assert file.num_tokens == 1000
    assert np.array_equal(read_tokens(file, 10, 20), TOKENS[10:20])
    np.save(tmp_path / "b.npy", TOKENS[:1000].reshape(10, 100))
    with pytest.raises(ValueError, match=r"of an array \(10, 100\) of uint16, and not of a row of uint16"):
        open_tokens(str(tmp_path / "b.npy"), "uint16")


def test_a_run_whose_data_vanishes_saves_its_state_and_names_the_file(server, tmp_path, monkeypatch, capsys):
    objects, address = server
    monkeypatch.setattr(stores, "PAGE", 1 << 10)  # so that every batch asks for more
    small = "--model.n-layers 1 --model.d-model 16 --model.n-heads 2 --model.vocab-size 65536 --recipe.no-compile"
    small += " --recipe.batch-size 2 --recipe.sequence-length 32 --run.steps 400 --schedule.warmup 3"
    small += " --run.eval-tokens 0 --data.heldout-fraction 0"
    words = ["train", "olmo2-tiny", *small.split(), "--data.paths", f"{address}/a.npy", "--data.dtype", "uint16"]
    words += ["--data.eos-id", "0", "--data.cache-dir", str(tmp_path / "cache"), "--run.folder", str(tmp_path / "run")]
    monkeypatch.setattr(objects, "vanish_after", 60)
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert "a.npy is not there" in said.err
    assert "is saved" in said.out + said.err
    assert list((tmp_path / "run" / "checkpoints").glob("step*"))
