"""Ranks find each other, also after a restart, and refuse to run together what differs. Real processes."""

from __future__ import annotations

import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from three_ranks import SIZE, run_ranks

from olmo_fn.launch.meeting import meet
from olmo_fn.launch.place import Place
from olmo_fn.launch.process import Process, agree, code_hash, rendezvous


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
    codes, said, _ = run_ranks(tmp_path, differ)
    assert codes == [0] * SIZE
    assert said == ["rank 2 has another config than rank 0: 'steps: 1' instead of 'steps: 0'\n"] * SIZE
    (tmp_path / "all").mkdir()
    _, said, _ = run_ranks(tmp_path / "all", differ_all)
    assert said == ["rank 1 has another data than rank 0: '1' instead of '0' (2 of 3 ranks differ)\n"] * SIZE


def test_a_store_of_an_earlier_start_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """After a restart, rank 0's address still stands in torchrun's store; another process may even listen there by now."""
    monkeypatch.delenv("OLMO_FN_TOKEN", raising=False)
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = []
    with socket.create_server(("127.0.0.1", 0)) as stranger, ThreadPoolExecutor(SIZE) as threads:
        for dead in ("", "1 of-the-dead", f"{stranger.getsockname()[1]} of-the-dead"):
            host.set("monitor", dead or "1 ")
            stores = [dist.TCPStore("127.0.0.1", host.port, is_master=False) for _ in range(SIZE)]
            places = [Place(rank, SIZE, rank, SIZE, "127.0.0.1", host.port) for rank in range(SIZE)]
            jobs = [threads.submit(meet, places[r], stores[r], lambda missing: None) for r in reversed(range(1, SIZE))]
            time.sleep(0.2)  # so that they try the old address first
            jobs.append(threads.submit(meet, places[0], stores[0], lambda missing: None))
            found = [job.result(20) for job in jobs]
            assert [sorted(peers.values()) for _, peers in found] == [[0]] * (SIZE - 1) + [list(range(1, SIZE))]
            names.append({name for name, _ in found})
    assert len(set.union(*names)) == 3
    assert [len(each) for each in names] == [1, 1, 1]


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
        rendezvous()
    assert not dist.is_initialized()
