"""Token files of other programs: Megatron-LM's pairs, and tables whose rows are lists of tokens."""

import struct

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from olmo_fn.data.bounds import document_bounds
from olmo_fn.data.instances.packed import Packed
from olmo_fn.data.megatron import MAGIC, read_index
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.source import open_data
from olmo_fn.data.tokens import open_tokens

DOCUMENTS = [np.random.default_rng(i).integers(1, 60_000, n) for i, n in enumerate((5, 17, 40, 1, 300, 64))]
FLAT = np.concatenate(DOCUMENTS)
ENDS = np.cumsum([len(d) for d in DOCUMENTS])


def megatron(folder, kind=8, dtype="<u2"):
    FLAT.astype(dtype).tofile(folder / "text.bin")
    lengths = np.diff(ENDS, prepend=0)
    header = MAGIC + struct.pack("<QBQQ", 1, kind, len(lengths), len(lengths) + 1)
    places = (ENDS - lengths) * np.dtype(dtype).itemsize
    ends = np.arange(len(lengths) + 1)
    (folder / "text.idx").write_bytes(
        header + lengths.astype("<i4").tobytes() + places.astype("<i8").tobytes() + ends.astype("<i8").tobytes()
    )
    return str(folder / "text.bin")


def run_of(path, folder, **options):
    data = Data((path,), eos_id=0, heldout_fraction=0.0, cache_dir=str(folder / "cache"), order="sequential", **options)
    return open_data(data, 60_000, constant_sizes(2, 32)).train


@pytest.mark.parametrize(("kind", "dtype"), [(8, "<u2"), (4, "<i4"), (5, "<i8")])
def test_megatrons_files(tmp_path, kind, dtype):
    path = megatron(tmp_path, kind, dtype)
    assert read_index(path).bounds[:, 1].tolist() == ENDS.tolist()
    assert run_of(path, tmp_path)(1)["input_ids"].tolist() == FLAT[64:128].reshape(2, 32).tolist()
    packed = run_of(path, tmp_path, boundaries="metadata", instances=Packed(long="fragment"))
    rows = packed.instances.read(np.arange(len(packed.instances)))
    assert np.array_equal(np.sort(rows["input_ids"][rows["label_mask"]]), np.sort(FLAT))


def test_mistakes_with_megatrons_files(tmp_path):
    path = megatron(tmp_path)
    index = tmp_path / "text.idx"
    whole = index.read_bytes()
    for content, message in (
        (whole[:-3], "are announced; it is cut off"),
        (b"nothing", "is no index of Megatron-LM"),
        (whole[:17] + b"\x07" + whole[18:], "of version 1 and type 7"),
    ):
        index.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            run_of(path, tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"needs its index, and .*text\.idx' cannot be read"):
        run_of(path, tmp_path)


@pytest.mark.parametrize("name", ["t.parquet", "t.arrow", "t.feather", "stream.arrow"])
def test_tables_of_token_lists(tmp_path, name):
    table = pa.table({"id": list(range(len(DOCUMENTS))), "input_ids": [d.tolist() for d in DOCUMENTS]})
    path = tmp_path / name
    if name == "t.parquet":
        pa.parquet.write_table(table, path, row_group_size=2)
    elif name == "stream.arrow":
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    else:
        pa.feather.write_feather(table, path, compression="uncompressed")
    for _ in range(2):  # the second time out of the cache
        loader = run_of(str(path), tmp_path)
        assert loader(1)["input_ids"].tolist() == FLAT[64:128].reshape(2, 32).tolist()
    file = loader.instances.files[0]
    assert document_bounds(file, 0, boundaries="metadata")[:, 1].tolist() == ENDS.tolist()
    assert open_tokens(file.path, "uint16").num_tokens == len(FLAT)


def test_mistakes_with_tables(tmp_path):
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(ValueError, match=r"no column of lists of tokens .* but text; text is tokenized first"):
        run_of(str(tmp_path / "text.parquet"), tmp_path)
    pa.parquet.write_table(pa.table({"tokens": [[1, 2], [-1]]}), tmp_path / "negative.parquet")
    with pytest.raises(ValueError, match="which uint16 cannot hold"):
        run_of(str(tmp_path / "negative.parquet"), tmp_path)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match="is not a parquet file that can be read"):
        run_of(str(tmp_path / "bad.parquet"), tmp_path)
