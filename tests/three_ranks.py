"""A program run as three ranks, each a real process."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from olmo_fn.launch.process import rendezvous
from olmo_fn.testing.pool import PRELOAD

SIZE = 3


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of the loopback, kept from others: bound, so that only one who asks for it by number can listen there."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def run_ranks(tmp_path: Path, program, before_meeting: bool = False) -> tuple[list[int], list[str], float]:
    """Run ``program(process)`` as three ranks: their exit codes, what they said, the seconds from the failure to the end.

    A program that is run ``before_meeting`` gets None.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with reserved_port() as port:
        ranks = [context.Process(target=member, args=(program, rank, port, tmp_path, before_meeting)) for rank in range(SIZE)]
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


def member(program, rank: int, port: int, tmp_path: Path, before_meeting: bool) -> None:
    os.dup2(os.open(tmp_path / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(SIZE), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.chdir(tmp_path)
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(40)  # should it hang, the test shows where
    program(None if before_meeting else rendezvous())
