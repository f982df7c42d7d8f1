"""A dead, raising or differing rank ends the job within seconds, whatever the others wait for. Real processes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from three_ranks import SIZE, run_ranks

from olmo_fn.launch.local import PEER_FAILED
from olmo_fn.launch.monitor import monitor
from olmo_fn.launch.process import Process, init_process_group
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.connect import connect
from olmo_fn.mesh.mesh import Mesh


def training(process: Process, rank: int, how: str) -> None:
    """Steps with a collective each; ``rank`` fails in the fifth."""
    with monitor(process) as step_done:
        init_process_group(process)
        axis = connect(Mesh(dp_shard=SIZE)).axes.world
        for step in range(1, 1000):
            if step == 5 and process.rank == rank:
                Path("failed").touch()
                os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else fail()
            psum(torch.ones(3), axis)
            step_done(step)


def fail():
    raise LookupError("on purpose")


def killed_2(process: Process) -> None:
    training(process, 2, "kill")


def killed_0(process: Process) -> None:
    training(process, 0, "kill")


def raised_1(process: Process) -> None:
    training(process, 1, "raise")


def raised_0(process: Process) -> None:
    training(process, 0, "raise")


@pytest.mark.parametrize(("program", "rank"), [(killed_2, 2), (killed_0, 0), (raised_1, 1), (raised_0, 0)])
def test_survivors_of_a_failure_name_it_and_end(tmp_path: Path, program, rank: int) -> None:
    codes, said, seconds = run_ranks(tmp_path, program)
    kill = program.__name__.startswith("killed")
    assert codes == [(-signal.SIGKILL if kill else 1) if r == rank else PEER_FAILED for r in range(SIZE)]
    assert seconds < 20, "about a second on an idle machine; the collective would wait for half an hour"
    for r in range(SIZE):
        if r != rank:
            assert said[r].startswith(f"rank {rank} failed after step 4:\n")
            assert ("its connection was closed" if kill else "LookupError: on purpose") in said[r]
    if not kill:
        assert said[rank].endswith("LookupError: on purpose\n")


def fail_alike(process: Process) -> None:
    with monitor(process):
        raise ValueError(f"rank {process.rank} says the same")


def test_ranks_that_fail_alike_each_speak_for_themselves(tmp_path: Path) -> None:
    codes, said, _ = run_ranks(tmp_path, fail_alike)
    assert codes == [1] * SIZE, said
    assert [text.endswith(f"ValueError: rank {r} says the same\n") for r, text in enumerate(said)] == [True] * SIZE


def end_late(process: Process) -> None:
    with monitor(process) as step_done:
        step_done(1)
        if process.rank == 1:
            time.sleep(0.5)
            Path("late").touch()
        if process.rank == 2:
            sys.exit()
    assert Path("late").exists(), "all wait for the last"


def test_an_orderly_end_waits_for_all(tmp_path: Path) -> None:
    codes, said, _ = run_ranks(tmp_path, end_late)
    assert (codes, said) == ([0] * SIZE, [""] * SIZE)


def stopped(process: Process) -> None:
    """Rank 1 stops itself after step 3, the others wait for it in step 4; a helper lets it go on."""
    with monitor(process, stall_seconds=2.0) as step_done:
        init_process_group(process)
        axis = connect(Mesh(dp_shard=SIZE)).axes.world
        for step in range(1, 6):
            if process.rank == 1 and step == 4:
                subprocess.Popen(["sh", "-c", f"sleep 6; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            psum(torch.ones(3), axis)
            step_done(step)


def behind(process: Process) -> None:
    """Rank 2 has steps without a collective and is slow, yet its process answers."""
    with monitor(process, stall_seconds=2.0) as step_done:
        step_done(1)
        if process.rank == 2:
            time.sleep(4)
        step_done(2)


@pytest.mark.parametrize(("program", "rank", "step"), [(stopped, 1, 3), (behind, 2, 1)])
def test_rank_0_names_a_rank_that_stands_still_and_the_job_goes_on(tmp_path: Path, program, rank: int, step: int) -> None:
    codes, said, _ = run_ranks(tmp_path, program)
    assert codes == [0] * SIZE
    assert re.fullmatch(rf"rank {rank} has been at step {step} for [2-5] s; the others wait for it\n", said[0]), "once"
    assert said[1:] == ["", ""]


def all_slow(process: Process) -> None:
    with monitor(process, stall_seconds=0.5) as step_done:
        step_done(1)
        time.sleep(3)


def test_nothing_is_said_while_all_ranks_do_the_same_for_long(tmp_path: Path) -> None:
    assert run_ranks(tmp_path, all_slow)[:2] == ([0] * SIZE, [""] * SIZE)
