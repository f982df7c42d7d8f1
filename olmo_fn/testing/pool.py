"""A persistent pool of real processes that are connected by gloo: the oracle of everything that is distributed.

For each number of ranks that is asked for, a *world* of that many processes is started once and kept, with its process
groups, meshes and compiled functions. Processes are forked from a server that has torch loaded already, so a new world
takes a fraction of a second; the first takes as long as importing torch.
"""

from __future__ import annotations

import faulthandler
import fcntl
import io
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from itertools import count
from multiprocessing.connection import Connection as Pipe
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from olmo_fn.core.compile import prepare_cache
from olmo_fn.mesh.connect import Connection, connect
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.train.choices import load_module

PRELOAD = ["torch", "torch.distributed.tensor"]


class RankFailed(RuntimeError):
    """A function failed on a rank of the pool: ``rank``, and ``traceback``, its text, or how the process ended."""

    def __init__(self, rank: int, traceback: str) -> None:
        super().__init__(f"rank {rank} failed:\n{traceback}")
        self.rank, self.traceback = rank, traceback


class Pool:
    """Runs functions on real ranks, one CPU thread each. ``processes`` is how many are kept at most.

    Functions and arguments travel by pickle: a function must stand at the top of a module that the ranks can import. They look
    where the caller does, in its ``sys.path`` and in a user's files (`olmo_fn.train.choices.load`).

    >>> with Pool() as pool:
    ...     pool.run(where, mesh=Mesh(dp_shard=2))
    [('dp_shard', 0), ('dp_shard', 1)]
    """

    def __init__(self, processes: int = 16, timeout: float = 120.0) -> None:
        self.processes, self.timeout = processes, timeout
        self.worlds: dict[int, _World] = {}  # by number of ranks, the least recently used first

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(
        self, fn: Callable[..., Any], *args: Any, ranks: int = 0, mesh: Mesh | None = None, timeout: float | None = None
    ) -> list[Any]:
        """Call ``fn(connection, *args)`` on every rank of ``mesh``, or of ``Mesh(dp_shard=ranks)``; the ranks' results.

        ``torch.distributed`` is initialised for exactly these ranks, and ``connection`` is ``connect(mesh)``, made once.
        The first error on any rank, or ``timeout`` seconds without an end, kills these processes and raises `RankFailed`;
        the next call starts new ones.
        """
        mesh = mesh or Mesh(dp_shard=ranks)
        message = pickle.dumps((sys.path, pickle.dumps((mesh, fn, args))))
        world = self.worlds.pop(mesh.size, None)
        if world is None:
            while self.worlds and sum(self.worlds) + mesh.size > self.processes:
                self.worlds.pop(next(iter(self.worlds))).kill()
            world = _World(mesh.size)
        try:
            results = world.call(message, self.timeout if timeout is None else timeout)
        except BaseException:  # of the caller too, who may have been interrupted: the ranks are in an unknown state
            world.kill()
            raise
        self.worlds[mesh.size] = world
        return results

    def close(self) -> None:
        """End all processes."""
        while self.worlds:
            self.worlds.popitem()[1].kill()


def where(connection: Connection) -> tuple[str, int]:
    """The largest axis and this rank's place on it: an example of what `Pool.run` runs."""
    axes = connection.axes
    axis = max(axes.pp, axes.dp_replicate, axes.dp_shard, axes.cp, axes.tp, key=lambda axis: axis.size)
    return axis.name, axis.index


class _World:
    """``size`` processes, the store through which they meet, and a pipe to each."""

    def __init__(self, size: int) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.folder, self.lock = _own_folder()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.pipes: list[Pipe] = []
        self.processes: list[Any] = []
        for rank in range(size):
            ours, theirs = context.Pipe()
            args = (theirs, rank, size, self.store.port, self.folder)
            process = context.Process(target=_serve, args=args, daemon=True, name=f"rank {rank} of {size}")
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for rank, pipe in enumerate(self.pipes):  # starting may take long on a busy machine: no part of a call's time
            try:
                pipe.recv_bytes()
            except EOFError:
                self.kill()
                raise RankFailed(rank, "the process ended while it was starting") from None

    def call(self, message: bytes, timeout: float) -> list[Any]:
        """Send every rank the message and collect the answers."""
        end = time.monotonic() + timeout
        for pipe in self.pipes:
            with suppress(BrokenPipeError):  # it is dead, which its end of the pipe says below
                pipe.send_bytes(message)
        answers: dict[int, bytes] = {}
        failures: dict[int, str] = {}
        while len(answers) < len(self.pipes) and not failures:
            ready = self._ready({*answers}, end - time.monotonic())
            if not ready:
                silent = [rank for rank in range(len(self.pipes)) if rank not in answers]
                where = "".join(f"\nrank {rank}: {self._stack(rank)}" for rank in silent)
                raise RankFailed(silent[0], f"no answer from rank {', '.join(map(str, silent))} within {timeout:g} s{where}")
            for rank in ready:
                self._read(rank, answers, failures)
        if failures:  # a rank that died makes others fail: name it, not them
            for rank in self._ready({*answers, *failures}, 0.1):
                self._read(rank, answers, failures)
            rank = min(failures, key=lambda rank: not failures[rank].startswith(DIED))
            raise RankFailed(rank, failures[rank])
        return [pickle.loads(answers[rank]) for rank in range(len(self.pipes))]

    def _ready(self, known: set[int], seconds: float) -> list[int]:
        """The ranks with something to read, those in ``known`` left out; waits for the first."""
        ready = set(wait([pipe for rank, pipe in enumerate(self.pipes) if rank not in known], max(0.0, seconds)))
        return [rank for rank, pipe in enumerate(self.pipes) if pipe in ready]

    def _stack(self, rank: int) -> str:
        """What the rank is doing: its innermost functions."""
        os.kill(self.processes[rank].pid, signal.SIGUSR1)
        path, end = self.folder / f"rank{rank}.stack", time.monotonic() + 2
        while time.monotonic() < end and "_serve" not in path.read_text():
            time.sleep(0.02)
        return "\n".join(path.read_text().splitlines()[:12])

    def _read(self, rank: int, answers: dict[int, bytes], failures: dict[int, str]) -> None:
        try:
            kind, value = pickle.loads(self.pipes[rank].recv_bytes())
            if kind == "result":
                answers[rank] = value
            else:
                failures[rank] = value.decode()
        except (EOFError, ConnectionResetError):
            self.processes[rank].join(1)
            where = (self.folder / f"rank{rank}.stack").read_text()
            failures[rank] = "\n".join([f"{DIED}, exit code {self.processes[rank].exitcode}", *where.splitlines()[:40]])

    def kill(self) -> None:
        """End the processes, whatever they are doing."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes, strict=True):
            process.join()
            pipe.close()
        os.close(self.lock)


DIED = "the process died"


def _own_folder() -> tuple[Path, int]:
    """A folder, compiled functions in it kept from run to run, that no other world uses now; and the lock that says so."""
    base = Path(tempfile.gettempdir(), f"olmo_fn-pool-{os.getuid()}")
    for i in count():
        folder = base / str(i)
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return folder, lock
        except BlockingIOError:
            os.close(lock)
    raise AssertionError


class Unpickler(pickle.Unpickler):
    """Runs the user's files (``--use``) that what it reads is from."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        load_module(module_name)
        return super().find_class(module_name, global_name)


def _serve(pipe: Pipe, rank: int, size: int, port: int, folder: Path) -> None:
    """A rank's process: answers messages until its pipe is closed. SIGUSR1, or a crash, makes it write down where it is."""
    torch.set_num_threads(1)
    stack = (folder / f"rank{rank}.stack").open("w")
    faulthandler.register(signal.SIGUSR1, stack, all_threads=False)
    faulthandler.enable(stack)
    warnings.filterwarnings("error", message="cannot compile")  # what is tested compiled must not go on eager
    cache = folder / "compiled"
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if os.path.exists("/sys/class/net/lo") else "lo0")
    if rank == 0:
        prepare_cache(cache)  # killed worlds leave broken files
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    # The pool has its own timeout, and names who did not answer.
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(hours=1))
    pipe.send_bytes(b"ready")
    connections: dict[Mesh, Connection] = {}
    while True:
        try:
            message = pipe.recv_bytes()
        except EOFError:
            os._exit(0)  # without the clean-up of groups, which may wait for others
        try:
            sys.path[:], call = pickle.loads(message)
            mesh, fn, args = Unpickler(io.BytesIO(call)).load()
            if mesh not in connections:
                connections[mesh] = connect(mesh)
            kind, answer = "result", pickle.dumps(fn(connections[mesh], *args))
        except BaseException:
            kind, answer = "failure", traceback.format_exc().encode()
        with suppress(BrokenPipeError):
            pipe.send_bytes(pickle.dumps((kind, answer)))
