"""A byte that is not as it was written is found and named; the newest whole checkpoint is used instead."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.checkpoint import (
    BrokenCheckpoint,
    load,
    load_newest,
    newest_whole,
    read_index,
    save,
    steps,
    verify,
)
from olmo_fn.checkpoint.stored import OpenFiles, PartBytes
from olmo_fn.cli import main as cli
from olmo_fn.tree import Tree


def main(words):
    """``olmo-fn checkpoint``."""
    return cli.main(["checkpoint", *map(str, words)])


def state(seed: int = 0) -> Tree:
    generator = torch.Generator().manual_seed(seed)
    params = {
        "a": torch.randn(7, 5, generator=generator),
        "b": torch.randn(33, generator=generator).bfloat16(),
    }
    return {"step": torch.tensor(seed), "params": params, "mask": torch.tensor([True, False, True])}


def owner(path: Path, file: str, at: int) -> str | None:
    """The tensor that the byte belongs to, by the header; None for a byte of the header."""
    with ExitStack() as stack:
        _, header = OpenFiles(path, read_index(path), stack).open(file)
        return next((name for name, (_, _, start, stop) in header.items() if start <= at < stop), None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(state(), tmp_path_factory.mktemp("checkpoints"), step=0, meta={"tokens": 1}, file_bytes=150)


@given(data=st.data())
@examples(150)
def test_any_flipped_byte_is_found_and_named(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(os.listdir(whole))))
    target = whole / file
    good = target.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    name = owner(whole, file, at) if file != "index.json" else None
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    target.write_bytes(bad)
    try:
        problems = verify(whole)
        assert problems
        assert all(str(target) in problem for problem in problems)
        if name is not None:
            assert problems == [f"{target}: {name} does not match its checksum"]
        with pytest.raises(BrokenCheckpoint, match=re.escape(problems[0])):
            load(whole)
    finally:
        target.write_bytes(good)
    assert verify(whole) == []


@given(data=st.data())
@examples(60)
def test_any_truncation_is_found_and_says_what_is_lost(whole: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(os.listdir(whole))))
    target = whole / file
    good = target.read_bytes()
    length = data.draw(st.integers(0, len(good) - 1))
    last = in_data = None
    if file != "index.json":
        last, in_data = owner(whole, file, len(good) - 1), owner(whole, file, length)
    target.write_bytes(good[:length])
    try:
        for deep in (True, False):
            (problem,) = verify(whole, deep=deep)
            assert problem.startswith(f"{target}: ")
        if last is not None and in_data is not None:
            assert f"truncated, {length:,} bytes of {len(good):,}; lost: " in problem
            assert last in problem
        with pytest.raises(BrokenCheckpoint, match=re.escape(str(target))):
            load(whole)
    finally:
        target.write_bytes(good)


def test_missing_and_grown_files_are_named(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=1, file_bytes=150)
    first, second = path / "state-00000.safetensors", path / "state-00001.safetensors"
    first.unlink()
    with second.open("ab") as file:
        file.write(b"\0")
    size = second.stat().st_size
    assert verify(path) == [f"{first}: missing", f"{second}: too long, {size:,} bytes of {size - 1:,}"]
    (path / "index.json").unlink()
    assert verify(path) == [f"{path / 'index.json'}: missing, so {path} is not a whole checkpoint"]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="reads of it are input/output errors on Linux")
def test_what_the_disk_cannot_read_is_named(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=1)
    for file in ("state-00000.safetensors", "index.json"):
        (path / file).unlink()
        (path / file).symlink_to("/proc/self/mem")
        assert verify(path) == [f"{path / file}: cannot be read from the disk (input/output error)"]
    expected = pytest.raises(BrokenCheckpoint, match=r"file: w cannot be read from the disk \(input/output error\)")
    with open("/proc/self/mem", "rb") as memory, expected:
        PartBytes("file: w", memory.fileno(), 0, 10, 1 << 20, ("",)).read(0, 10)


def flip_in(path: Path, name: str) -> None:
    index = read_index(path)
    file = path / index.tensors[name].parts[0].file
    with ExitStack() as stack:
        start = OpenFiles(path, index, stack).open(file.name)[1][name][2]
    data = bytearray(file.read_bytes())
    data[start] ^= 1
    file.write_bytes(data)


def test_the_newest_whole_one_is_used_instead(tmp_path: Path) -> None:
    for step in (100, 200, 300, 1000):
        save(state(step), tmp_path, step=step)
    flip_in(tmp_path / "step1000", "params.b")
    (tmp_path / "step300" / "state-00000.safetensors").unlink()
    (tmp_path / "step2000").mkdir()
    (tmp_path / "step03").mkdir()
    assert steps(tmp_path) == [100, 200, 300, 1000, 2000]
    expected = [
        f"skipping {tmp_path}/step2000, it is broken: {tmp_path}/step2000/index.json: missing, "
        f"so {tmp_path}/step2000 is not a whole checkpoint",
        f"skipping {tmp_path}/step1000, it is broken: "
        f"{tmp_path}/step1000/state-00000.safetensors: params.b does not match its checksum",
        f"skipping {tmp_path}/step300, it is broken: {tmp_path}/step300/state-00000.safetensors: missing",
    ]
    skipped: list[str] = []
    assert newest_whole(tmp_path, on_skip=skipped.append) == tmp_path / "step200"
    assert skipped == expected
    skipped.clear()
    found = load_newest(tmp_path, lambda path: load(path, like=state()), on_skip=skipped.append)
    assert found is not None
    path, (tree, meta) = found
    assert (path, int(tree["step"]), meta, skipped) == (tmp_path / "step200", 200, {}, expected)


def test_skipping_is_never_silent(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(state(), tmp_path, step=1)
    flip_in(tmp_path / "step1", "step")
    with caplog.at_level(logging.WARNING):
        assert newest_whole(tmp_path) is None
        assert load_newest(tmp_path, load) is None
    assert caplog.text.count("step does not match its checksum") == 2


def test_a_whole_checkpoint_of_another_model_is_not_skipped(tmp_path: Path) -> None:
    save(state(), tmp_path, step=1)
    save({"step": torch.tensor(2)}, tmp_path, step=2)
    with pytest.raises(ValueError, match=r"step2 does not hold the state asked for:\n  asked for but not there"):
        load_newest(tmp_path, lambda path: load(path, like=state()))


def test_the_command_lists_and_finds_broken_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run" / "checkpoints"
    for step in (1, 20):
        save(state(), folder, step=step)
    for where in (folder.parent, folder, folder / "step1"):
        assert main([str(where)]) == 0
        assert re.search(r"step1 .* 4 .*whole", capsys.readouterr().out)
    flip_in(folder / "step20", "params.a")
    assert main([str(folder), "--quick"]) == 0
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out
    assert re.search(r"step1 .*whole", out)
    assert re.search(r"step20 .*broken", out)
    assert f"{folder}/step20/state-00000.safetensors: params.a does not match its checksum\n" in out
    (folder / "step20" / "index.json").write_bytes(b"\xff\x00")
    assert main([str(folder)]) == 1
    assert re.search(r"step20 .*\? .*broken", capsys.readouterr().out)


def test_the_command_refuses_a_wrong_folder_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "olmo_fn", "checkpoint", str(tmp_path / "no")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    message = f"error: {tmp_path}/no: no such folder; give a run's folder, its checkpoints folder or one checkpoint\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_the_command_refuses_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no checkpoints in it")
