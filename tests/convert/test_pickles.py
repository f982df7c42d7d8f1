"""A hostile or damaged file of a checkpoint is refused in one line, and nothing of it runs."""

import io
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.cli import main as cli
from olmo_fn.formats.dcp import IN_METADATA, read_metadata
from olmo_fn.formats.pickles import Refused, loads
from olmo_fn.formats.torch_files import read_tensors

FIXTURE = Path(__file__).parents[1] / "fixtures" / "olmo_core" / "olmo2.tar.xz"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("olmo_core")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder / "run" / "step3"


@pytest.fixture
def copy(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "step3"))


class Hostile:
    """What runs a command when it is unpickled."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def frames(text):
    """A pickle of protocol 2 with this body."""
    return b"\x80\x02" + text + b"."


MARK = "touched"
HOSTILE = {
    "os.system": (pickle.dumps(Hostile(os.system, f"touch {MARK}")), "names posix.system"),
    "os.system, protocol 0": (pickle.dumps(Hostile(os.system, f"touch {MARK}"), protocol=0), "names posix.system"),
    "eval": (pickle.dumps(Hostile(eval, f"open({MARK!r}, 'w')")), "names builtins.eval"),
    "an unknown class": (pickle.dumps(Path), "names pathlib.Path"),
    "another name of a known module": (pickle.dumps(torch.load), "names torch.serialization.load"),
    "a call of what is no name": (frames(b"}\x8c\x01a\x8c\x01b\x86R"), "damaged"),
    "a call of a value that was made": (frames(b"ccollections\nOrderedDict\n)R)R"), "damaged"),
    "INST": (frames(b"(ios\nsystem\n"), "it uses INST"),
    "OBJ": (frames(b"(cos\nsystem\no"), "names os.system"),
    "EXT": (frames(b"\x82\x01"), "it uses EXT1"),
    "nested": (frames(b"(" * 100_000), "nested more than"),
    "nested tuples": (frames(b")" + b"\x85" * 100_000 + b"}\x94"), "damaged"),
    "a nested key": (frames(b"})" + b"\x85" * 100_000 + b"Ns"), "damaged"),
    "a nested list": (frames(b"]" * 100_000 + b"a" * 99_999), "not the metadata"),
    "a huge text": (frames(b"\x8d" + struct.pack("<Q", 1 << 60)), "damaged"),
    "huge bytes": (frames(b"\x8e" + struct.pack("<Q", 1 << 62)), "damaged"),
    "a huge integer": (frames(b"\x8b" + struct.pack("<i", 1 << 30)), "damaged"),
    "a huge place in the memo": (frames(b"Nr\xff\xff\xff\xff"), "not the metadata"),
    "a missing place in the memo": (frames(b"h\x07"), "damaged"),
    "an empty stack": (frames(b""), "damaged"),
    "no bytes": (b"", "damaged"),
    "text": (b"this is no pickle", "damaged"),
    "another thing": (pickle.dumps({"step": 1}), "not the metadata"),
}


@pytest.mark.parametrize("place", ["metadata", "shard", "state"])
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(copy, tmp_path, capsys, monkeypatch, name, place):
    data, says = HOSTILE[name]
    monkeypatch.chdir(tmp_path)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    if place == "metadata":
        (copy / "model_and_optim" / ".metadata").write_bytes(data)
    elif place == "state":
        (copy / "train" / "rank0.pt").write_bytes(made.getvalue())
    else:
        ((_, (path, start, length)),) = read_metadata(copy / "model_and_optim")["model.embeddings.weight"].make.args[-1]
        if len(made.getvalue()) > length:
            return
        file = bytearray(path.read_bytes())
        file[start : start + length] = made.getvalue().rjust(length, b"x")  # a zip file may have anything before it
        path.write_bytes(file)
    assert cli.main(["convert", "from-olmo-core", str(copy), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert len(said) < 600
    assert says in said or (place != "metadata" and says == "not the metadata")
    assert not (tmp_path / MARK).exists()
    assert not (tmp_path / "run").exists()


def test_nothing_is_called_that_is_known():
    value = loads(pickle.dumps(Hostile(os.system, f"touch {MARK}")), {"posix.system"}, "x")
    assert (value.name, value.args) == ("posix.system", (f"touch {MARK}",))
    assert not Path(MARK).exists()


@examples(60)
@given(cut=st.floats(0, 1), change=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3))
def test_damaged_metadata_is_refused_or_read(whole, cut, change):
    data = bytearray((whole / "model_and_optim" / ".metadata").read_bytes())
    for at, byte in change:
        data[int(at * (len(data) - 1))] = byte
    with suppress(Refused):
        loads(bytes(data[: int(cut * len(data)) if not change else None]), IN_METADATA, "x")


# Shards


def first_file(copy):
    return next(path for path in sorted((copy / "model_and_optim").glob("*.distcp")) if path.stat().st_size)


def said_of(copy, capsys, tmp_path):
    assert cli.main(["convert", "from-olmo-core", str(copy), str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "\n" not in said
    assert not (tmp_path / "run").exists()
    return said


def test_damaged_shards_are_named(copy, tmp_path, capsys):
    path = first_file(copy)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{path} is truncated: it has {len(data) - 1:,} bytes" in said_of(copy, capsys, tmp_path)
    path.unlink()
    assert f"{path} is missing" in said_of(copy, capsys, tmp_path)
    at = data.index(b"data/0FB") + 200  # among the numbers of the first tensor, behind what aligns them
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    assert "does not match its checksum" in said_of(copy, capsys, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (b"__0_0.distcp", b"../00.distcp", "a file that is no *.distcp beside it"),
        (b"__0_0.distcp", b"__0_0.whatev", "a file that is no *.distcp beside it"),
        (b"__0_0.distcp", b"__9_9.distcp", "__9_9.distcp is missing"),
    ],
)
def test_metadata_that_say_what_cannot_be(copy, tmp_path, capsys, old, new, says):
    path = copy / "model_and_optim" / ".metadata"
    path.write_bytes(path.read_bytes().replace(old, new))
    assert says in said_of(copy, capsys, tmp_path)


def test_sizes_that_cannot_be(tmp_path):
    dcp.save({"w": torch.zeros(4, 4)}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    path = tmp_path / "dcp" / ".metadata"
    meta = pickle.loads(path.read_bytes())
    (tensor,) = meta.state_dict_metadata.values()

    def refused(says):
        path.write_bytes(pickle.dumps(meta))
        with pytest.raises(ValueError, match=says):
            read_metadata(tmp_path / "dcp")

    tensor.size = torch.Size([1 << 40, 1 << 40])
    refused("do not fill its shape")
    tensor.chunks[0].sizes = torch.Size([1 << 40, 1 << 40])
    refused("in no file, or in too few bytes")
    tensor.size = torch.Size([1 << 50])
    refused("whole numbers below 2\\^48")
    tensor.size = tensor.chunks[0].sizes = torch.Size([4, 4])
    tensor.chunks.append(tensor.chunks[0])
    refused("or fill a part of it twice")
    del tensor.chunks[1]
    (info,) = meta.storage_data.values()
    info.offset = 1
    refused("is truncated")
    info.offset, info.transform_descriptors = 0, ["zstd"]
    refused("were compressed")
    info.transform_descriptors = None
    tensor.properties.dtype = torch.float64
    path.write_bytes(pickle.dumps(meta))
    with pytest.raises(ValueError, match=r"float32 \[4, 4\] there"):
        read_metadata(tmp_path / "dcp")["w"].make()


def test_checkpoints_of_torch_itself_are_read(tmp_path):
    tensors = {
        "w": torch.randn(5, 3),
        "turned": torch.randn(5, 3).T,
        "bits": torch.tensor([True, False]),
        "half": torch.randn(2, 2).bfloat16(),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 4),
    }
    dcp.save({**tensors, "lr": 0.1}, checkpoint_id=tmp_path / "dcp", no_dist=True)
    found = read_metadata(tmp_path / "dcp")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].make(), tensor)


def test_files_of_torch_save_are_read(tmp_path):
    w = torch.randn(4, 6)
    torch.save({"a": {"w": w, "part": w[1:3, ::2]}, "n": 3}, tmp_path / "x.pt")
    found = read_tensors(tmp_path / "x.pt")
    assert torch.equal(found["a.w"].make(), w)
    assert torch.equal(found["a.part"].make(), w[1:3, ::2])
    data = (tmp_path / "x.pt").read_bytes()
    for cut in (0, 3, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "x.pt").write_bytes(data[:cut])
        with pytest.raises(ValueError, match=r"x\.pt"):
            read_tensors(tmp_path / "x.pt")
    torch.save({"w": w}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"not written by torch\.save"):
        read_tensors(tmp_path / "old.pt")


@examples(150)
@given(cut=st.none() | st.floats(0, 1), changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=3))
def test_a_damaged_file_gives_no_traceback(tmp_path_factory, cut, changes):
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save({"w": torch.arange(6.0).view(2, 3).T, "n": torch.ones(3, dtype=torch.bfloat16)}, path)
    data = bytearray(path.read_bytes())
    for at, byte in changes:
        data[int(at * (len(data) - 1))] = byte
    path.write_bytes(data[: None if cut is None else int(cut * len(data))])
    with suppress(ValueError):
        for tensor in read_tensors(path).values():
            tensor.make()
