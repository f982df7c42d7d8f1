"""Checkpoints that are damaged, crafted or unreadable, and disks that are full or odd: each case, by its number."""

from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from checkpoint_jobs import file_size_limit, small_disk

from olmo_fn.average import average
from olmo_fn.checkpoint import (
    BrokenCheckpoint,
    Retention,
    SaveFailed,
    Saver,
    load,
    load_newest,
    newest_whole,
    save,
    steps,
    verify,
)
from olmo_fn.checkpoint.commit import hidden
from olmo_fn.checkpoint.format import FORMAT, crc32
from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.data.tokenizer import Tokenizer, byte_level, train_bpe
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.spec import init
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.events import Event, Observer, Stepped
from olmo_fn.train.folder import write_config
from olmo_fn.train.loop import train
from olmo_fn.train.schedules import Constant
from olmo_fn.tree import Tree

STATE: Tree = {"step": torch.tensor(7), "params": {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(3).bfloat16()}}
FILE = "state-00000.safetensors"


# --- crafted: the checksums are right, the content is not -------------------------------------------------------------


def signed(rest: bytes, version: int = FORMAT) -> bytes:
    """An index whose checksum is right, whatever follows its first line."""
    first = b'{"format": "olmo_fn %d", "crc32": "%s",\n'
    return first % (version, crc32(first % (version, b"0" * 8) + rest).encode()) + rest


def write_index(path: Path, index: Any) -> None:
    """``index``, JSON or text that follows the first line, as the index of a checkpoint."""
    if not isinstance(index, bytes):
        index = json.dumps({key: value for key, value in index.items() if key not in ("format", "crc32")})[1:].encode()
    (path / "index.json").write_bytes(signed(index))


def read_json(path: Path) -> Any:
    return json.loads((path / "index.json").read_bytes())


def read_header(path: Path) -> Any:
    data = (path / FILE).read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_header(path: Path, header: Any) -> None:
    """``header``, JSON or text, before the same tensors, and an index that says so."""
    index, data = read_json(path), (path / FILE).read_bytes()
    tensors = data[8 + int.from_bytes(data[:8], "little") :]
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text = len(text).to_bytes(8, "little") + text
    (path / FILE).write_bytes(text + tensors)
    index["files"][FILE] = {"bytes": len(text + tensors), "header_bytes": len(text), "header_crc32": crc32(text)}
    write_index(path, index)


def put(*keys: Any) -> Callable[[Any], None]:
    """A change of JSON: what is at all keys but the last becomes the last."""
    *place, key, value = keys

    def change(root: Any) -> None:
        for step in place:
            root = root[step]
        root[key] = value

    return change


def rename(old: str, new: str) -> Callable[[Any], None]:
    """A change of an index: the file or tensor ``old`` is called ``new``, everywhere."""

    def change(index: Any) -> None:
        for group in (index["files"], index["tensors"]):
            if old in group:
                group[new] = group.pop(old)
        for tensor in index["tensors"].values():
            for box in tensor["boxes"]:
                box["file"] = new if box["file"] == old else box["file"]

    return change


W, B, BOX = ("tensors", "params.w"), ("tensors", "params.b"), ("tensors", "params.w", "boxes", 0)
HUGE = 1 << 62
INDEX: dict[str, Callable[[Any], None] | bytes] = {
    "NaN": b'"step": NaN}',
    "not closed": b'"step": 1',
    "a list": b"[]}",
    "not UTF-8": b'"\xff": 1}',
    "deep": b'"meta": ' + b"[" * 100_000,
    "a number of 5,000 digits": b'"step": ' + b"9" * 5000 + b"}",
    "nothing": b"}",
    "chunk_bytes 0": put("chunk_bytes", 0),
    "chunk_bytes a list": put("chunk_bytes", []),
    "chunk_bytes true": put("chunk_bytes", True),
    "chunk_bytes negative": put("chunk_bytes", -1),
    "chunk_bytes 1": put("chunk_bytes", 1),
    "chunk_bytes 1e9": put("chunk_bytes", 1e9),
    "step a text": put("step", "7"),
    "step negative": put("step", -7),
    "step null": put("step", None),
    "step huge": put("step", 1 << 64),
    "meta a list": put("meta", []),
    "empty a number": put("empty", 3),
    "empty of numbers": put("empty", [3]),
    "unknown": put("more", 1),
    "tensors a list": put("tensors", []),
    "tensor null": put(*W, None),
    "files a text": put("files", FILE),
    "file a list": put("files", FILE, []),
    "file without length": lambda index: index["files"][FILE].pop("bytes"),
    "file longer": put("files", FILE, "bytes", 1 << 40),
    "header huge": put("files", FILE, "header_bytes", HUGE),
    "header 0": put("files", FILE, "header_bytes", 0),
    "no file": put("files", {}),
    "box elsewhere": put(*BOX, "file", "other"),
    "file a number": put(*BOX, "file", 3),
    "dtype unknown": put(*W, "dtype", "F4"),
    "dtype a list": put(*W, "dtype", ["F32"]),
    "dtype other": put(*W, "dtype", "F64"),
    "shape a text": put(*W, "shape", "34"),
    "shape nested": put(*W, "shape", [[3, 4]]),
    "shape negative": put(*W, "shape", [-3, -4]),
    "shape overflows": put(*W, "shape", [HUGE, HUGE]),
    "shape floats": put(*W, "shape", [3.0, 4.0]),
    "shape other": put(*W, "shape", [4, 3]),
    "empty shape overflows": put(
        "tensors",
        "e",
        {
            "dtype": "F32",
            "shape": [0, HUGE, HUGE],
            "boxes": [{"file": FILE, "offset": [0, 0, 0], "shape": [0, HUGE, HUGE], "crc32": ["0" * 8]}],
        },
    ),
    "shape of 5,000 dims": put(*W, "shape", [1] * 5000),
    "boxes none": put(*W, "boxes", []),
    "boxes an object": put(*W, "boxes", {}),
    "box twice": lambda index: index["tensors"]["params.w"]["boxes"].append(index["tensors"]["params.w"]["boxes"][0]),
    "box null": put(*W, "boxes", [None]),
    "box elsewhere in the tensor": put(*BOX, "offset", [1, 0]),
    "box of fewer dims": put(*BOX, "shape", [12]),
    "box huge": put(*BOX, "shape", [HUGE, 4]),
    "no checksum": put(*BOX, "crc32", []),
    "checksums numbers": put(*BOX, "crc32", [1]),
    "too many checksums": put(*BOX, "crc32", ["0" * 8] * 9),
    "a tensor that is a branch": rename("params.b", "params.w.b"),
    "empty that is a tensor": put("empty", ["params.w"]),
    "empty that is a branch": put("empty", ["params"]),
    "path with an end": rename("params.w", "params."),
    "path empty": rename("step", ""),
    "path of 9,999 keys": rename("step", "a." * 9999 + "a"),
    "path of 9,999 letters": rename("step", "a" * 9999),
    "path of two lines": rename("step", "a\nb"),
    "path of half a letter": rename("step", "\ud800"),
    **{
        f"file name {name[:30]!r}": rename(FILE, name)
        for name in (
            f"/proc/self/cwd/{FILE}",
            f"../step7/{FILE}",
            f"./{FILE}",
            f"a/{FILE}",
            ".hidden",
            "..",
            "",
            "a\0b",
            "\ud800",
            "x" * 5000,
        )
    },
}
HEADER: dict[str, Callable[[Any], None] | bytes] = {
    "NaN": b"NaN",
    "a list": b"[]",
    "nothing": b"",
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\xfe\xff",
    "UTF-16": "{}".encode("utf-16"),
    "empty": b"{}",
    "a tensor less": lambda header: header.pop("params.b"),
    "another name": lambda header: put("v", header.pop("params.w"))(header),
    "entry a list": put("params.w", []),
    "entry null": put("params.w", None),
    "offsets a text": put("params.w", "data_offsets", "08"),
    "offsets of three": put("params.w", "data_offsets", [0, 4, 8]),
    "offsets none": put("params.w", "data_offsets", []),
    "offsets reversed": lambda header: header["params.w"]["data_offsets"].reverse(),
    "offsets huge": put("params.w", "data_offsets", [HUGE, HUGE]),
    "offsets negative": put("params.w", "data_offsets", [-4, 44]),
    "offsets floats": put("params.w", "data_offsets", [0.0, 48.0]),
    "overlapping": lambda header: put("params.b", "data_offsets", header["params.w"]["data_offsets"])(header),
    "dtype a number": put("params.w", "dtype", 3),
    "dtype unknown": put("params.w", "dtype", "F4"),
    "dtype other": put("params.w", "dtype", "I32"),
    "shape other": put("params.w", "shape", [4, 3]),
    "shape huge": put("params.w", "shape", [HUGE, HUGE, 0]),
    "shape a text": put("params.w", "shape", "12"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints, of which the newer is to be broken."""
    for step in (6, 7):
        save(STATE, tmp_path, step=step)
    return tmp_path


def assert_broken(folder: Path) -> str:
    """Step 7 is broken by name, in one line, at once; the older one is used. The line."""
    path, started = folder / "step7", time.monotonic()
    problems = verify(path)
    assert problems
    for problem in problems:
        assert problem.startswith(f"{path}/")
        assert problem.isprintable()
        assert len(problem) < len(str(path)) + 1300
    with pytest.raises(BrokenCheckpoint) as error:
        load(path)
    assert str(error.value) in problems
    skipped: list[str] = []
    found = load_newest(folder, load, on_skip=skipped.append)
    assert found is not None
    assert found[0] == newest_whole(folder, on_skip=skipped.append) == folder / "step6"
    assert [line.startswith(f"skipping {path}, it is broken: {path}/") for line in skipped] == [True, True]
    assert time.monotonic() - started < 20
    return problems[0]


def changed(read: Callable[[Path], Any], path: Path, change: Callable[[Any], None] | bytes) -> Any:
    if isinstance(change, bytes):
        return change
    change(value := read(path))
    return value


@pytest.mark.parametrize("case", INDEX, ids=[f"reliability-13-index-{case}" for case in INDEX])
def test_a_crafted_index(folder: Path, case: str) -> None:
    write_index(folder / "step7", changed(read_json, folder / "step7", INDEX[case]))
    assert_broken(folder)


@pytest.mark.parametrize("case", HEADER, ids=[f"reliability-13-header-{case}" for case in HEADER])
def test_a_crafted_header(folder: Path, case: str) -> None:
    write_header(folder / "step7", changed(read_header, folder / "step7", HEADER[case]))
    assert_broken(folder)


def test_what_rewrites_without_a_change_leaves_it_whole(folder: Path) -> None:
    """So what the tables break is broken by their changes."""
    write_index(folder / "step7", read_json(folder / "step7"))
    write_header(folder / "step7", read_header(folder / "step7"))
    assert verify(folder / "step7") == []


def test_a_newer_format_and_an_unknown_dtype_say_what_to_do(folder: Path) -> None:
    path = folder / "step7"
    write_index(path, changed(read_json, path, put(*W, "dtype", "F4")))
    assert "params.w has the dtype 'F4', unknown to olmo_fn" in assert_broken(folder)
    (path / "index.json").write_bytes(signed(b'"of": "another world"}', version=FORMAT + 1))
    assert "load it with a newer olmo_fn" in assert_broken(folder)


BAD = [
    None,
    True,
    -1,
    0,
    1,
    7,
    HUGE,
    1 << 70,
    1.5,
    1e400,
    "",
    "F32",
    "../x",
    "\ud800",
    "a.b",
    [],
    [[]],
    [0],
    [-1, 2],
    {},
    {"a": {}},
]


def mutate(value: Any, rng: random.Random) -> Any:
    """``value`` with something in it replaced, added, taken away, or put twice."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        match rng.randrange(12):
            case 0:
                value.pop(key)
            case 1 if isinstance(value, dict):
                value[rng.choice(["", "a", "w.x", "params", "__metadata__", "/etc/passwd"])] = value[key]
            case 1:
                value.insert(key, value[key])
            case 2 if isinstance(value[key], int):
                value[key] += rng.choice([-1, 1, 4, 8])
            case _:
                value[key] = mutate(value[key], rng)
        return value
    return deepcopy(rng.choice(BAD))


def fuzz(folder: Path, seed: int) -> None:
    """Damage, with right checksums: the checkpoint is broken, or loads; nothing else, and soon."""
    rng, path = random.Random(seed), folder / "step7"
    read, write = rng.choice([(read_json, write_index), (read_header, write_header)])
    value = read(path)
    for _ in range(rng.choice([1, 1, 2, 4])):
        value = mutate(value, rng)
    if rng.random() < 0.15 or not isinstance(value, dict):
        text = bytearray(json.dumps(value).encode())
        for _ in range(rng.randint(0, 3)):
            text[rng.randrange(len(text))] = rng.randrange(256)
        value = bytes(text)
    before, started = {file: (path / file).read_bytes() for file in ("index.json", FILE)}, time.monotonic()
    try:
        write(path, value)
        problems = verify(path)
        assert all(problem.isprintable() and len(problem) < 2000 for problem in problems)
        if problems:
            with pytest.raises(BrokenCheckpoint):
                load(path)
        else:
            load(path)
        assert time.monotonic() - started < 10
    finally:
        for file, data in before.items():
            (path / file).write_bytes(data)


def test_fuzz(folder: Path) -> None:
    for seed in range(300):
        fuzz(folder, seed)


@pytest.mark.slow
def test_fuzz_longer(folder: Path) -> None:
    for seed in range(1000, 6000):
        fuzz(folder, seed)


# --- unreadable -------------------------------------------------------------------------------------------------------


def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        file.unlink()
        make(file)

    return change


def too_long(file: Path) -> None:
    os.truncate(file, (1 << 30) + 1)


UNREADABLE = {
    "a folder": (replaced(Path.mkdir), "not a regular file"),
    "a link to itself": (replaced(lambda file: file.symlink_to(file)), "cannot be read (Too many levels of symbolic links)"),
    "a link to nothing": (replaced(lambda file: file.symlink_to("nothing")), "missing"),
    "a pipe": (replaced(os.mkfifo), "not a regular file"),
    "a link to /dev/zero": (replaced(lambda file: file.symlink_to("/dev/zero")), "not a regular file"),
    "of a gibibyte": (too_long, ""),
    "empty": (lambda file: os.truncate(file, 0), ""),
}


@pytest.mark.parametrize("name", ["index.json", FILE])
@pytest.mark.parametrize("case", UNREADABLE, ids=[f"reliability-12-{case}" for case in UNREADABLE])
def test_what_cannot_be_read_is_broken(folder: Path, case: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = UNREADABLE[case]
    change(folder / "step7" / name)
    assert words in assert_broken(folder)
    for where in (folder, folder / "step7"):
        assert cli.main(["checkpoint", str(where)]) == 1
        out, err = capsys.readouterr()
        assert "broken" in out
        assert err == ""


@contextmanager
def another_user() -> Iterator[None]:
    """As a user without rights; skips the test where that cannot be."""
    try:
        os.seteuid(65534)
    except PermissionError:
        pytest.skip("only root can be another user")
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["step7", "step7/index.json", f"step7/{FILE}"], ids=lambda name: f"reliability-12-{name}")
def test_what_may_not_be_read_is_broken_with_advice(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.chmod(0o755)
    monkeypatch.chdir(folder)
    (folder / name).chmod(0)
    with another_user():
        assert "may not be read by you (permission denied); its owner can let you, with chmod" in assert_broken(Path("."))


def test_a_step_that_links_to_nothing_makes_way(tmp_path: Path) -> None:
    (tmp_path / "step7").symlink_to("nothing")
    assert verify(save(STATE, tmp_path, step=7)) == []
    assert [path.is_symlink() for path in tmp_path.glob("step7.broken-*")] == [True]


# --- links, and what cannot be deleted --------------------------------------------------------------------------------


def save_all(folder: Path, *which: int, keep: int = 2) -> None:
    with Saver(folder, retention=Retention(keep_last=keep)) as saver:
        for step in which:
            saver.submit(STATE, step=step)


@pytest.mark.parametrize("case", ["reports-23", "reliability-5"])
def test_a_linked_step_goes_and_what_it_links_to_stays(tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "checkpoints"
    save_all(folder, 1, 2)
    shutil.move(folder / "step1", tmp_path / "disk2")
    (folder / "step1").symlink_to(tmp_path / "disk2")
    assert verify(folder / "step1") == [], "a linked checkpoint is one"
    if case == "reliability-5":  # what an older program left, in hidden names
        (folder / "step1").rename(hidden(folder / "step1", "deleted"))
        hidden(folder / "step9", "partial").write_text("a file")
    save_all(folder, 3)
    save_all(folder, 4)
    assert sorted(os.listdir(folder)) == [".lock", "step3", "step4"]
    assert verify(tmp_path / "disk2") == []
    assert caplog.messages == []


def test_what_cannot_be_deleted_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Another filesystem is mounted inside the old checkpoint, so that its folder is busy."""
    save_all(tmp_path, 1, 2)
    with small_disk(tmp_path / "step1" / "disk", "size=1m"):
        save_all(tmp_path, 3)
        save_all(tmp_path, 4)
        assert steps(tmp_path) == [3, 4]
        assert caplog.messages
        assert all(message.startswith(f"cannot delete {tmp_path}/.deleted-step1-") for message in caplog.messages)
        next(tmp_path.glob(".deleted-*")).rename(tmp_path / "step1")  # where it is unmounted


# --- disks ------------------------------------------------------------------------------------------------------------


def big(step: int) -> Tree:
    return {"w": torch.full((1 << 18,), float(step))}


def test_reports_25a_a_failed_save_is_made_up_for_by_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Saver(tmp_path) as saver:
        with file_size_limit(100_000):
            saver.submit(big(1), step=1)
            while not saver.is_done:
                time.sleep(0.01)
        saver.submit(big(2), step=2)
        assert saver.wait() == tmp_path / "step2"
    assert [message.startswith("could not save step 1 into") for message in caplog.messages] == [True]
    assert steps(tmp_path) == [2]


def test_reports_25a_two_in_a_row_end_it_and_each_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Saver(tmp_path) as saver:
        with file_size_limit(100_000):
            saver.submit(big(1), step=1)
            with pytest.raises(SaveFailed, match="could not save step 2"):
                saver.submit(big(2), step=2)
        assert [message.startswith("could not save step 1") for message in caplog.messages] == [True]
        saver.submit(big(3), step=3)
        assert saver.wait() == tmp_path / "step3"


def test_reports_25b_what_is_free_is_counted_before_the_draft_goes(tmp_path: Path) -> None:
    """The bytes suffice, but for what the filesystem needs for itself; so it fails halfway."""
    words = r"No space left on device; the checkpoint needs 1,044,480 bytes, 0 are free there.*; free some space, or save"
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        with pytest.raises(SaveFailed, match=words):
            save({"w": torch.ones((1 << 20) - 4096, dtype=torch.uint8)}, disk, step=1)
        assert sorted(os.listdir(disk)) == [".lock"]


@pytest.mark.parametrize("keep", [1, 2], ids=lambda keep: f"reliability-23-keep-last-{keep}")
def test_old_checkpoints_go_before_a_save_that_does_not_fit(tmp_path: Path, keep: int) -> None:
    with small_disk(tmp_path / "disk", "size=5m") as disk:
        for step in (1, 2, 3, 4):
            save(big(step), disk, step=step)
        (disk / "step4" / FILE).write_bytes(b"")  # the newest is broken: the one before must stay
        with Saver(disk, retention=Retention(keep_last=keep)) as saver:
            saver.submit(big(5), step=5)
            assert saver.wait() == disk / "step5"
        assert steps(disk) == ([4, 5] if keep == 1 else [3, 4, 5])


@contextmanager
def a_file_is_there(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "checkpoints").write_text("")
    yield tmp_path / "checkpoints"


@contextmanager
def no_more_files(tmp_path: Path) -> Iterator[Path]:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
    try:
        yield tmp_path
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@contextmanager
def a_disk_that_is_only_read(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "ro") as disk:
        yield disk / "checkpoints"


@contextmanager
def a_folder_of_others(tmp_path: Path) -> Iterator[Path]:
    tmp_path.chmod(0o700)
    with another_user():
        yield tmp_path


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (a_file_is_there, "File exists"),
        (no_more_files, "Too many open files"),
        (a_disk_that_is_only_read, "Read-only file system"),
        (a_folder_of_others, "Permission denied"),
    ],
    ids=[f"reliability-23-{name}" for name in ("EEXIST", "EMFILE", "EROFS", "EACCES")],
)
def test_only_a_full_disk_is_told_to_free_space(tmp_path: Path, where: Any, words: str) -> None:
    with where(tmp_path) as folder, pytest.raises(SaveFailed) as error:
        save(STATE, folder, step=1)
    assert f"could not save step 1 into {folder}: {words} ({folder}" in str(error.value)
    assert "free" not in str(error.value)


class FillsTheDisk(Observer):
    """Leaves no room for the checkpoint after step 4, and makes room again before that of step 8."""

    def __init__(self, disk: Path) -> None:
        self.other = disk / "other"

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped) and event.step == 4:
            self.other.write_bytes(bytes(shutil.disk_usage(self.other.parent).free))
        elif isinstance(event, Stepped) and event.step == 7:
            self.other.unlink()


def test_reports_25a_a_run_goes_on_when_there_is_room_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    np.random.default_rng(0).integers(1, 64, 4_000, dtype=np.uint8).tofile(tmp_path / "tokens.npy")
    with small_disk(tmp_path / "disk", "size=1m") as disk:
        result = train(
            Config(
                dense(8, 1, 2, 12, vocab_size=64),
                data=Data(paths=(str(tmp_path / "tokens.npy"),), dtype="uint8", heldout_fraction=0, cache_dir=str(tmp_path)),
                recipe=Recipe(4, 16, compile=False, dtype="float32"),
                schedule=Constant(warmup=0),
                run=Run(str(disk / "run"), steps=10, checkpoint_every=4, threads=1, sample="", device="cpu"),
            ),
            [FillsTheDisk(disk)],
        )
        assert (result.exit_code, result.step) == (0, 10)
        assert steps(disk / "run" / "checkpoints") == [8, 10]
        failed = [message for message in caplog.messages if message.startswith("could not save")]
        assert [message.startswith("could not save step 4 into") for message in failed] == [True]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=["reports-26-EINVAL", "reports-26-ENOTSUP"])
def test_a_filesystem_that_cannot_sync_folders(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, files = os.fsync, []

    def of_files(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(number, os.strerror(number))
        files.append(os.readlink(f"/proc/self/fd/{fd}"))
        fsync(fd)

    monkeypatch.setattr(os, "fsync", of_files)
    assert verify(save(STATE, tmp_path, step=1)) == []
    assert {Path(file).name for file in files} == {FILE, "index.json"}


def test_reports_27_a_filesystem_that_does_not_count_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    none = SimpleNamespace(f_bavail=0, f_bfree=0, f_blocks=0, f_frsize=4096)
    monkeypatch.setattr(os, "statvfs", lambda path: none)
    assert shutil.disk_usage(tmp_path).free == 0
    assert verify(save(STATE, tmp_path, step=1)) == []
    none.f_blocks = 9  # a disk that is full is believed
    with pytest.raises(SaveFailed, match="No space left on device"):
        save(STATE, tmp_path, step=2)


def test_the_folders_that_a_save_makes_are_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, synced = os.fsync, set()
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    save(STATE, tmp_path / "runs" / "a" / "checkpoints", step=1)
    assert {str(tmp_path), f"{tmp_path}/runs", f"{tmp_path}/runs/a", f"{tmp_path}/runs/a/checkpoints"} <= synced


# --- the commands -----------------------------------------------------------------------------------------------------

MODEL = dense(d_model=16, n_layers=1, n_heads=2, hidden_size=32, vocab_size=300)


def make_run(folder: Path, tokenizer: Tokenizer | None, model: Any = MODEL) -> Path:
    """The folder of a run with two checkpoints, as training leaves it."""
    write_config(Config(model), folder)
    if tokenizer:
        tokenizer.save(folder / "tokenizer.json")
    for step in (1, 2):
        save({"params": init(transformer.specs(model), step)}, folder / "checkpoints", step=step)
    return folder


def one_line(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert cli.main([str(word) for word in words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


def test_commands_on_a_broken_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "run", byte_level())
    write_index(run / "checkpoints" / "step2", b'"chunk_bytes": []}')
    assert cli.main(["generate", str(run), "a", "--max-tokens", "1"]) == 0
    err = capsys.readouterr().err
    assert f"skipping {run}/checkpoints/step2, it is broken" in err
    assert cli.main(["checkpoint", str(run)]) == 1
    assert capsys.readouterr().out.count("whole") == 1
    named = f"{run}/checkpoints/step2/index.json: damaged, it holds the wrong kind of value at 'step'"
    assert named in one_line(capsys, "generate", run / "checkpoints" / "step2", "a")
    assert named in one_line(capsys, "average", run, "-o", tmp_path / "mean")
    assert not (tmp_path / "mean").exists()


def test_an_average_says_what_to_type_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b = (make_run(tmp_path / name, byte_level()) for name in ("a", "b [2]"))
    out = tmp_path / "the mean"
    assert cli.main(["average", str(a), str(b), "-o", str(out)]) == 0
    text = capsys.readouterr().out
    assert text == (
        f"{out}/checkpoints/step2\n"
        f"sample:        olmo-fn generate '{out}' 'def '\n"
        f"train on:      olmo-fn train '{out}' --run.start-from '{out}' --run.start-with params --run.folder '{out}-2'\n"
    )
    assert sorted(os.listdir(out)) == ["checkpoints", "config.yaml", "tokenizer.json"]
    assert not list(tmp_path.glob(".average-*"))


@pytest.mark.parametrize("case", ["another tokenizer", "another model", "a share that is no number"])
def test_averages_that_mean_nothing_are_refused(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    other = train_bpe(["ab ab cd cd"], 260) if case == "another tokenizer" else byte_level()
    model = dense(d_model=16, n_layers=1, n_heads=4, hidden_size=32, vocab_size=300) if case == "another model" else MODEL
    a, b = make_run(tmp_path / "a", byte_level()), make_run(tmp_path / "b", other, model)
    shares = ["--shares", "nan", "1"] if case == "a share that is no number" else []
    words = {
        "another tokenizer": f"{b} has another tokenizer.json than {a}",
        "another model": f"{b} is of another model than {a}: --model.n-heads is 4, not 2",
        "a share that is no number": "--shares is nan; it must be a finite number",
    }
    assert words[case] in one_line(capsys, "average", a, b, "-o", tmp_path / "mean", *shares)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_an_average_of_linked_checkpoints_of_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", None)
    (tmp_path / "link").symlink_to(run)
    paths = [run / "checkpoints" / "step1", tmp_path / "link" / "checkpoints" / "step2"]
    assert average(paths)["embed"].shape == (300, 16)
