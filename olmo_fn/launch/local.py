"""Several processes on one machine without torchrun: ``python train.py … --nproc 2``. Imports no torch."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

STATUS = "OLMO_FN_STATUS"
"""Environment variable: the folder in which each rank notes its last step, and how it failed."""
TORN_DOWN = os.EX_TEMPFAIL
"""Exit code of a rank that ended because another failed."""
PATIENCE = 2.0  # seconds that the other ranks get to end by themselves


def launch(arguments: Sequence[str], nproc: int, folder: Path | None = None) -> int:
    """Run ``python *arguments`` as ``nproc`` ranks and wait; returns the exit code for this process.

    What rank 0 prints goes through; the others' goes to ``logs/rank{n}.log`` in ``folder``, the run's, as soon as that has
    a ``config.yaml``. The cores are divided among the ranks. SIGINT and SIGTERM are passed on, and then the code is
    128 + n. If a rank fails, the others are ended, and one block says which, after which step and why.
    """
    with ExitStack() as stack:
        status = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="olmo_fn-")))
        logs = Logs(status, folder)
        stack.callback(logs.settle)
        port = stack.enter_context(_reserved_port())
        job = Job([_start(arguments, rank, nproc, port, status, logs) for rank in range(nproc)])
        stack.callback(job.kill)
        stack.enter_context(job.passing_signals_on())
        while job.running():
            logs.move()
            time.sleep(0.05)
        failed = job.culprit(status)
        if failed is None:
            return 128 + job.signal if job.signal else 0
        job.wait(PATIENCE)
        job.kill()
        failed = job.culprit(status)
        assert failed is not None
        logs.move()
        code = job.codes[failed]
        if (code, job.codes[0]) != (2, 2):  # wrong input, which rank 0 has explained
            print(_report(failed, code, status, logs), file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code


@dataclass
class Logs:
    """Where the ranks but the first print: in ``first``, until the run has a folder."""

    first: Path
    folder: Path | None
    moved: bool = False

    def path(self, rank: int) -> Path:
        """The log of ``rank``."""
        return (self.folder / "logs" if self.moved and self.folder else self.first) / f"rank{rank}.log"

    def move(self) -> None:
        """Move what is in ``first`` to the run's folder if that is there now; the ranks write on, into the same files."""
        if self.moved or self.folder is None or not (self.folder / "config.yaml").exists():
            return
        (self.folder / "logs").mkdir(exist_ok=True)
        for log in self.first.glob("rank*.log"):
            target = self.folder / "logs" / log.name
            try:
                os.replace(log, target)
            except OSError:  # on another disk: a link now, a copy at the end
                target.unlink(missing_ok=True)
                target.symlink_to(log)
        self.moved = True

    def settle(self) -> None:
        """At the end: leave nothing in ``first`` that belongs to the run's folder."""
        self.move()
        for log in self.first.glob("rank*.log") if self.moved else ():
            shutil.copyfile(log, beside := self.path(int(log.stem[4:])).with_suffix(".copy"))
            os.replace(beside, beside.with_suffix(".log"))


@dataclass
class Job:
    """The ranks' processes, and how those that ended did."""

    ranks: list[subprocess.Popen[bytes]]
    codes: dict[int, int] = field(default_factory=dict)  # in the order in which they ended
    killed: set[int] = field(default_factory=set)  # by this process
    signal: int = 0  # passed on

    def poll(self) -> None:
        """Note which have ended."""
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes and (code := process.poll()) is not None:
                self.codes[rank] = code

    def running(self) -> bool:
        """Whether to wait on: some rank runs, and none has failed."""
        self.poll()
        return len(self.codes) < len(self.ranks) and not any(map(self._bad, self.codes.values()))

    def _bad(self, code: int) -> bool:
        return code != 0 and not (self.signal and code in (128 + self.signal, -self.signal))

    def culprit(self, status: Path) -> int | None:
        """The rank that failed first: rather one that was killed than one that raised, never one that was torn down."""

        def order(rank: int) -> tuple[bool, bool, int]:
            traced = status / f"rank{rank}.traceback"
            when = int(traced.read_text().split("\n", 1)[0]) if traced.exists() else sys.maxsize
            return self.codes[rank] == TORN_DOWN, self.codes[rank] > 0, when

        ended = self.codes.keys() - {rank for rank in self.killed if not (status / f"rank{rank}.traceback").exists()}
        bad = [rank for rank in self.codes if rank in ended and self._bad(self.codes[rank])]
        return min(bad, key=order, default=None)

    def wait(self, seconds: float) -> None:
        """Wait at most so long for all to end."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.ranks) and time.monotonic() < end:
            time.sleep(0.05)
            self.poll()

    def kill(self) -> None:
        """End what still runs, and wait for it."""
        self.poll()
        for rank, process in enumerate(self.ranks):
            if rank not in self.codes:
                self.killed.add(rank)
                process.kill()
                process.wait()
                self.codes[rank] = 1

    @contextmanager
    def passing_signals_on(self) -> Iterator[None]:
        """SIGINT and SIGTERM go to every rank, once each: the ranks are not in the terminal's process group."""

        def forward(number: int, frame: FrameType | None) -> None:
            self.signal = number
            for process in self.ranks:
                process.send_signal(number)

        before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _start(arguments: Sequence[str], rank: int, nproc: int, port: int, status: Path, logs: Logs) -> subprocess.Popen[bytes]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(nproc),
        "LOCAL_WORLD_SIZE": str(nproc),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        STATUS: str(status),
    }
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
    }
    command, environment = [sys.executable, *arguments], {**defaults, **os.environ, **own}
    if rank == 0:
        return subprocess.Popen(command, env=environment, process_group=0, stdin=subprocess.DEVNULL)
    with logs.path(rank).open("wb") as log:
        return subprocess.Popen(command, env=environment, process_group=0, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


@contextmanager
def _reserved_port() -> Iterator[int]:
    """A free port of the loopback, kept from others: bound, so that only one who asks for it by number can listen there."""
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def _report(rank: int, code: int, status: Path, logs: Logs) -> str:
    """Which rank failed, after which step and how, and its traceback or the end of its log."""
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    how += ", as a system does when memory runs out" if code == -signal.SIGKILL else ""
    step, traced, log = status / f"rank{rank}.step", status / f"rank{rank}.traceback", logs.path(rank)
    if code == 2 and traced.exists():  # wrong input, which is said in one line
        return "error: " + traced.read_text().rpartition("ValueError: ")[2].strip()
    after = f" after step {step.read_text().strip()}" if step.exists() and step.stat().st_size else ""
    lines = [f"rank {rank} failed{after}: {how}"]
    if traced.exists():
        lines += traced.read_text().splitlines()[1:]
    elif log.exists():
        lines += log.read_text(errors="replace").splitlines()[-20:]
    if logs.moved and log.exists():
        lines.append(f"log: {log}")
    return "\n".join(lines)
