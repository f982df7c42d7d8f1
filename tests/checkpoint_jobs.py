"""What the ranks of the checkpoint tests do, each in a process of its own, and how they are started and killed."""

from __future__ import annotations

import multiprocessing
import os
import resource
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from sharding import Layout
from torch.distributed import TCPStore

from olmo_fn.checkpoint import Ranks, Retention, SaveFailed, Saver, save, steps
from olmo_fn.tree import Tree

TIMEOUT = 4.0
Outcome = tuple[str, float]  # what a rank said last, and the seconds from the kill or the start until then


def big(step: int) -> Tree:
    """A state that takes some ten milliseconds to write: what it holds says of which step it is."""
    n = 500_000
    return {"step": torch.tensor(step), "w": torch.full((4, n), float(step)), "v": torch.full((n,), step + 0.5)}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond ``size``: writing fails halfway, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(where: Path, options: str) -> Iterator[Path]:
    """A disk of its own, with the ``options`` of tmpfs; skips the test where mounting is not permitted."""
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", where], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("mounting is not permitted here")
    try:
        yield where
    finally:
        subprocess.run(["umount", where], check=True)


def save_forever(ranks: Ranks, layout: Layout, folder: str, say: Callable[[str], None]) -> None:
    """Checkpoint after checkpoint, in the background, until a rank is lost."""
    with Saver(folder, retention=Retention(keep_last=2), threads=1, ranks=ranks) as saver:
        layout.state(big(0), ranks.rank)  # what is imported when first used is here when the kill comes
        say("ready")
        for step in range(max(steps(folder), default=0) + 1, 10**6):
            saver.submit(layout.state(big(step), ranks.rank), step=step, meta={"step": step})
            saver.wait()
            say(f"step {step}")


def save_on_a_small_disk(ranks: Ranks, layout: Layout, folder: str, say: Callable[[str], None]) -> None:
    """One checkpoint, during which rank 1 cannot write more than 100 kB into a file, as if its disk were full."""
    with file_size_limit(100_000) if ranks.rank == 1 else nullcontext():
        save(layout.state(big(2), ranks.rank), folder, step=2, threads=1, ranks=ranks)


def save_without_the_last(ranks: Ranks, layout: Layout, folder: str, say: Callable[[str], None]) -> None:
    """One checkpoint that the last rank does not come to."""
    if ranks.rank < ranks.size - 1:
        save(layout.state(big(2), ranks.rank), folder, step=2, threads=1, ranks=ranks)


def _run(job: Any, rank: int, port: int, host: bool, layout: Layout, folder: str, timeout: float, pipe: Connection) -> None:
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", port, is_master=host and rank == 0, wait_for_workers=False)
    try:
        job(Ranks(rank, layout.size, store, timeout), layout, folder, pipe.send)
        pipe.send("ended")
    except SaveFailed as error:
        pipe.send(f"SaveFailed: {error}")
    os._exit(0)


def run(
    job: Any,
    layout: Layout,
    folder: Path,
    *,
    kill: int | None = None,
    after: float = 0.0,
    host: bool = False,
    timeout: float = TIMEOUT,
) -> list[Outcome]:
    """The last words of each rank, and when they came.

    Rank ``kill`` is killed with signal 9 ``after`` seconds from when all have said something. The store is the
    caller's, or that of rank 0 if it is ``host``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.tensor", "checkpoint_jobs"])
    store = None if host else TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port if store else _free_port()
    pipes, processes = [], []
    for rank in range(layout.size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_run, args=(job, rank, port, host, layout, str(folder), timeout, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    words = [("", 0.0)] * layout.size
    start = time.monotonic()
    if kill is not None:
        for rank, pipe in enumerate(pipes):
            assert pipe.poll(60), f"rank {rank} did not start"
        time.sleep(after)
        processes[kill].kill()
        start = time.monotonic()
    open_pipes = {pipe: rank for rank, pipe in enumerate(pipes)}
    while open_pipes:
        ready = wait(list(open_pipes), 60)
        assert ready, f"no word from ranks {sorted(open_pipes.values())} for a minute; the others: {words}"
        for pipe in ready:
            assert isinstance(pipe, Connection)
            try:
                words[open_pipes[pipe]] = (pipe.recv(), time.monotonic() - start)
            except EOFError:
                del open_pipes[pipe]
    for process in processes:
        process.join(10)
    return words


def _free_port() -> int:
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store.port
