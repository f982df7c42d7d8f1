"""Kills, full disks, second writers: older checkpoints stay whole, nothing half written is taken for one."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import file_size_limit, small_disk

from olmo_fn.checkpoint import SaveFailed, load, newest_whole, save, steps, sweep, verify
from olmo_fn.checkpoint.commit import hidden, locked

# For each line it reads, this process forks a child that saves without end and kills it -9 after that many
# seconds; it answers with the last value that the child said was committed.
NURSERY = """
import itertools, os, signal, sys, time
import torch
from olmo_fn.checkpoint import Retention, Saver, save, steps
torch.set_num_threads(1)
folder, how = sys.argv[1:]

def save_forever(said):
    first = max(steps(folder), default=0) + 1
    tree = lambda step: {"step": torch.tensor(step), "w": torch.full((300_000,), float(step))}
    if how == "saver":
        saver = Saver(folder, retention=Retention(keep_last=2), threads=2)
        for step in itertools.count(first):
            saver.submit(tree(step), step=step)
            os.write(said, b"%d " % (step - 1))
    for value in itertools.count(first):
        save(tree(value), folder, step=7, replace=True, file_bytes=1 << 16)
        os.write(said, b"%d " % value)

for line in sys.stdin:
    hear, said = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            save_forever(said)
        finally:
            os._exit(1)
    os.close(said)
    time.sleep(float(line))
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended by itself"
    with open(hear, "rb") as answers:
        print(([0] + [int(word) for word in answers.read().split()])[-1], flush=True)
"""


@contextmanager
def nursery(folder: Path, how: str) -> Iterator[Callable[[float], int]]:
    command = [sys.executable, "-c", NURSERY, str(folder), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def run_and_kill(seconds: float) -> int:
            assert process.stdin is not None
            assert process.stdout is not None
            print(seconds, file=process.stdin, flush=True)
            return int(process.stdout.readline())

        yield run_and_kill


def half_written(folder: Path) -> bool:
    return any(path.name.startswith((".partial", ".deleted", ".replaced")) for path in folder.iterdir())


def test_killed_at_any_instant_every_checkpoint_is_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    committed = kills = hits = 0
    with nursery(tmp_path, "saver") as run_and_kill:
        # On a busy machine a child may not get far: go on until the kills have hit something.
        while kills < 12 or committed < 10 or hits < 4:
            committed = max(committed, run_and_kill(rng.uniform(0.0, 0.2)))
            kills += 1
            hits += half_written(tmp_path)
            there = steps(tmp_path)
            assert [verify(tmp_path / f"step{step}") for step in there] == [[] for _ in there]
            if committed:
                newest = newest_whole(tmp_path, on_skip=pytest.fail)
                assert newest == tmp_path / f"step{max(there)}"
                assert max(there) >= committed
                assert (load(newest)[0]["w"] == float(max(there))).all()
    sweep(tmp_path)
    assert not half_written(tmp_path)


def test_killed_while_replacing_one_of_the_two_is_there(tmp_path: Path) -> None:
    rng = random.Random(1)
    first = save({"w": torch.zeros(300_000)}, tmp_path, step=7)
    kills = hits = replaced = 0
    with nursery(tmp_path, "replace") as run_and_kill:
        while kills < 10 or hits < 4 or replaced < 3:
            replaced += run_and_kill(rng.uniform(0.0, 0.2)) > 0
            kills += 1
            hits += half_written(tmp_path)
            sweep(tmp_path)
            assert steps(tmp_path) == [7]
            assert verify(first) == []


def test_killed_between_the_renames_of_a_replacement(tmp_path: Path) -> None:
    path = save({"w": torch.ones(3)}, tmp_path, step=7)
    path.rename(hidden(path, "replaced"))
    assert steps(tmp_path) == []
    sweep(tmp_path)
    assert steps(tmp_path) == [7]
    assert verify(path) == []


def test_sweeping_leaves_alone_what_a_live_process_writes(tmp_path: Path) -> None:
    partial = hidden(tmp_path / "step3", "partial")
    mine = tmp_path / ".partial-notes"
    mine.mkdir()
    with locked(tmp_path):
        partial.mkdir()
        sweep(tmp_path)
        assert partial.exists()
    sweep(tmp_path)
    assert not partial.exists()
    assert mine.exists(), "only names that this package gives are its to remove"


def test_a_second_writer_waits_and_then_says_why(tmp_path: Path) -> None:
    expected = pytest.raises(TimeoutError, match="another process has been saving there")
    with locked(tmp_path), expected, locked(tmp_path, patience=0.1):
        pass
    with locked(tmp_path, patience=0.0):
        pass


def test_a_child_forked_while_saving_does_not_keep_the_lock(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        with locked(tmp_path, patience=0.0):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_write_that_fails_halfway_leaves_the_old_one_whole(tmp_path: Path) -> None:
    old = save({"w": torch.ones(10)}, tmp_path, step=1)
    with file_size_limit(3 << 20), pytest.raises(SaveFailed) as error:
        save({"w": torch.ones(1 << 20)}, tmp_path, step=2)
    assert str(error.value).startswith(
        f"could not save step 2 into {tmp_path}: File too large; the checkpoint needs 4,194,304 bytes, "
    )
    assert names(tmp_path) == [".lock", "step1"]
    assert verify(old) == []
    save({"w": torch.ones(1 << 20)}, tmp_path, step=2)
    assert steps(tmp_path) == [1, 2]


def test_a_full_disk_is_refused_with_the_numbers(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        old = save({"w": torch.ones(1 << 18)}, disk, step=1)
        touched = disk.stat().st_mtime_ns
        with pytest.raises(SaveFailed, match=r"No space left on device; the checkpoint needs 4,194,304 bytes, 3,\d{3},"):
            save({"w": torch.ones(1 << 20)}, disk, step=2)
        assert disk.stat().st_mtime_ns == touched, "refused before anything was written"
        assert names(disk) == [".lock", "step1"]
        assert verify(old) == []


def test_a_disk_that_fills_while_saving(tmp_path: Path) -> None:
    """Enough bytes are free, so the early check passes; the kernel says ENOSPC for the third file."""
    with small_disk(tmp_path / "disk", "size=64m,nr_inodes=8") as disk:
        old = save({"w": torch.ones(100)}, disk, step=1)
        many = {f"w{i}": torch.ones(100) for i in range(9)}
        with pytest.raises(SaveFailed, match=r"No space left on device; the checkpoint needs 3,600 bytes, 6\d,\d{3}"):
            save(many, disk, step=2, file_bytes=1)
        assert names(disk) == [".lock", "step1"]
        assert verify(old) == []
        save(many, disk, step=2)
        assert steps(disk) == [1, 2]
