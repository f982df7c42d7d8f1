"""A dead, raising or differing rank ends the job within seconds, whatever the others wait for. Real processes."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from olmo_fn.launch.local import TORN_DOWN, _reserved_port
from olmo_fn.launch.monitor import watch
from olmo_fn.launch.process import Process, _fresh, agree, code_hash, init_process_group_from_env
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.connect import connect
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing.pool import PRELOAD

SIZE = 3


def job(tmp_path: Path, program) -> tuple[list[int], list[str], float]:
    """Run ``program(process)`` as three ranks: their exit codes, what they said, the seconds from the failure to the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with _reserved_port() as port:
        ranks = [context.Process(target=member, args=(program, rank, port, tmp_path)) for rank in range(SIZE)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        ended = time.time()
        for rank in ranks:
            rank.kill()
    failed = tmp_path / "failed"
    seconds = ended - failed.stat().st_mtime if failed.exists() else 0.0
    return [rank.exitcode for rank in ranks], [(tmp_path / f"{rank}.err").read_text() for rank in range(SIZE)], seconds


def member(program, rank: int, port: int, tmp_path: Path) -> None:
    os.dup2(os.open(tmp_path / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    os.chdir(tmp_path)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(40)  # should it hang, the test shows where
    program(init_process_group_from_env())


def training(process: Process, rank: int, how: str) -> None:
    """Steps with a collective each; ``rank`` fails in the fifth."""
    axis = connect(Mesh(dp_shard=SIZE)).axes.world
    with watch(process) as beat:
        for step in range(1, 1000):
            if step == 5 and process.rank == rank:
                Path("failed").touch()
                os.kill(os.getpid(), signal.SIGKILL) if how == "kill" else fail()
            psum(torch.ones(3), axis)
            beat(step)


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
    codes, said, seconds = job(tmp_path, program)
    kill = program.__name__.startswith("killed")
    assert codes == [(-signal.SIGKILL if kill else 1) if r == rank else TORN_DOWN for r in range(SIZE)]
    assert seconds < 20, "about a second on an idle machine; the collective would wait for half an hour"
    for r in range(SIZE):
        if r != rank:
            assert said[r].startswith(f"rank {rank} failed after step 4:\n")
            assert ("its connection was closed" if kill else "LookupError: on purpose") in said[r]
    if not kill:
        assert said[rank].endswith("LookupError: on purpose\n")


def fail_alike(process: Process) -> None:
    with watch(process):
        raise ValueError(f"rank {process.rank} says the same")


def test_ranks_that_fail_alike_each_speak_for_themselves(tmp_path: Path) -> None:
    codes, said, _ = job(tmp_path, fail_alike)
    assert codes == [1] * SIZE, said
    assert [text.endswith(f"ValueError: rank {r} says the same\n") for r, text in enumerate(said)] == [True] * SIZE


def end_late(process: Process) -> None:
    with watch(process) as beat:
        beat(1)
        if process.rank == 1:
            time.sleep(0.5)
            Path("late").touch()
        if process.rank == 2:
            sys.exit()
    assert Path("late").exists(), "all wait for the last"


def test_an_orderly_end_waits_for_all(tmp_path: Path) -> None:
    codes, said, _ = job(tmp_path, end_late)
    assert (codes, said) == ([0] * SIZE, [""] * SIZE)


def differ(process: Process) -> None:
    agree(code_hash(), "code", process)
    try:
        agree("lr: 1\n" + f"steps: {process.rank // 2}", "config", process)
    except ValueError as error:
        print(error, file=sys.stderr)


def differ_all(process: Process) -> None:
    try:
        agree(str(process.rank), "data", process)
    except ValueError as error:
        print(error, file=sys.stderr)


def test_a_rank_with_another_config_is_refused_by_all(tmp_path: Path) -> None:
    codes, said, _ = job(tmp_path, differ)
    assert codes == [0] * SIZE
    assert said == ["rank 2 has another config than rank 0: 'steps: 1' instead of 'steps: 0'\n"] * SIZE
    (tmp_path / "all").mkdir()
    _, said, _ = job(tmp_path / "all", differ_all)
    assert said == ["rank 1 has another data than rank 0: '1' instead of '0' (2 of 3 ranks differ)\n"] * SIZE


def test_a_store_of_an_earlier_start_is_not_believed() -> None:
    """After a restart, rank 0's message to the dead still stands there, and so do their numbers."""
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = []
    for _ in range(3):
        clients = [dist.TCPStore("127.0.0.1", host.port, is_master=False) for _ in range(SIZE)]
        with ThreadPoolExecutor(SIZE) as threads:
            jobs = [threads.submit(_fresh, clients[rank], rank, SIZE) for rank in reversed(range(SIZE))]
            stores = [job.result(20) for job in jobs]
        for rank, store in enumerate(stores):
            assert not store.check(["address"]), "of an earlier start"
            store.set(f"mine{rank}", "")
        assert all(store.check([f"mine{rank}" for rank in range(SIZE)]) for store in stores), "one place for all"
        stores[0].set("address", "of the dead")
        found.append(clients[0].get("numbers"))
    assert len(set(found)) == 3


def test_the_code_is_its_files_and_torch() -> None:
    lines = code_hash().splitlines()
    assert lines[0] == f"torch {torch.__version__}"
    assert any(line.startswith("olmo_fn/launch/process.py ") for line in lines)
    assert code_hash() == code_hash()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"):
        init_process_group_from_env()
    assert not dist.is_initialized()
