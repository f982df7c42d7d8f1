"""A rank that dies ends the job in seconds: every rank keeps a connection to rank 0, and the kernel closes a dead one's.

Rank 0 hears the failure of any rank, or finds its connection closed, and tells the others; they say which rank failed, after
which step and why, and exit. Where a machine is lost without a word, TCP's keepalive finds out in half a minute. A rank that
is only slow or stopped is never taken for dead.
"""

from __future__ import annotations

import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from typing import Any

from olmo_fn.launch.local import PEER_FAILED, STATUS
from olmo_fn.launch.process import Process

# Small messages go at once; a machine that does not answer is given up after 10 + 4 x 5 s, or 30 s (in ms) with data under way.
TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
Failure = tuple[int, float, str]


@contextmanager
def monitor(process: Process, stall_seconds: float = 60.0) -> Iterator[Callable[[int], None]]:
    """End this rank if another fails inside the block; gives a function to call with each step that is done.

    All ranks enter the block, once in the life of a process, and wait for each other at its end. A rank that raises tells the
    others and goes on raising. They print ``rank 3 failed after step 41:`` with its traceback and exit with `PEER_FAILED`,
    whatever they are doing. If no step is done for ``stall_seconds`` and a rank is behind or silent, rank 0 says so.

    >>> with monitor(Process()) as step_done:
    ...     step_done(1)
    """
    this = RankMonitor(process, stall_seconds)
    try:
        yield this.step_done
    except BaseException as error:
        if isinstance(error, SystemExit) and error.code in (None, 0):
            this.finish()
        else:
            this.fail(error)
        raise
    this.finish()


class RankMonitor:
    """The connections of a rank: rank 0's to all others, another's to rank 0; and the thread that listens to them.

    A message is the sender's last step, infinity at the end of the block, or a failure: (rank, its last step, why).
    """

    def __init__(self, process: Process, stall_seconds: float) -> None:
        self.rank, self.stall_seconds = process.rank, stall_seconds
        self.steps = dict.fromkeys(range(process.size), 0.0)  # the last of each rank; ranks but 0 hear only of rank 0's
        self.heard = dict.fromkeys(range(process.size), time.monotonic())  # when a rank last gave a sign of life
        self.advanced = time.monotonic()  # when a rank last did a step
        self.failures: list[Failure] = []  # the first counts
        self.failed, self.raising, self.finished = threading.Event(), threading.Event(), threading.Event()
        self.sending, self.sent_end = threading.Lock(), False
        status = os.environ.get(STATUS)
        self.launcher = os.getppid() if status else None
        self.step_file = os.open(Path(status, f"rank{self.rank}.step"), os.O_CREAT | os.O_WRONLY) if status else None
        self.peers = connect(process) if process.size > 1 else {}
        if self.peers:
            threading.Thread(target=self._listen, daemon=True, name="monitor").start()

    def step_done(self, step: int) -> None:
        """Tell rank 0, or as rank 0 all others, that ``step`` is done."""
        self._heard(self.rank, step)
        self._send(step)
        if self.step_file is not None:
            os.pwrite(self.step_file, f"{step:<20}".encode(), 0)

    def fail(self, error: BaseException) -> None:
        """This rank is ending by ``error``: tell the others, unless the error is only that another rank is gone."""
        if isinstance(error, RuntimeError) and self.peers and self.failed.wait(1.0):  # as a collective with a dead rank raises
            self._exit()
        self.raising.set()
        self._announce((self.rank, self.steps[self.rank], why := traceback.format_exc()))
        if self.peers:  # something may wait for them until it is killed
            timer = threading.Timer(2.0, lambda: (print(why, file=sys.stderr, flush=True), os._exit(1)))
            timer.daemon = True
            timer.start()

    def finish(self) -> None:
        """Wait until all ranks are here."""
        self._heard(self.rank, math.inf)
        if self.rank:
            self._send(math.inf)
        self.finished.wait()

    def _listen(self) -> None:
        peers: dict[Any, int] = dict(self.peers)
        while not self.finished.is_set():
            ready: list[Any] = wait(list(peers), min(1.0, self.stall_seconds / 10))
            for peer in ready:
                try:
                    message = peer.recv()
                except (EOFError, OSError):
                    rank = peers.pop(peer)
                    message = (rank, self.steps[rank], "it died: its connection was closed")
                if not isinstance(message, tuple):
                    self._heard(peers[peer], message)
                elif message[1] < math.inf and not self.finished.is_set():
                    self._announce(message)
            if self.failed.is_set():
                if not self.raising.wait(0.5):  # a rank that is failing by itself says so itself
                    self._exit()
                return
            if self.launcher not in (None, os.getppid()):  # it was killed: stop in order
                self.launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if self.rank:
                self._send(self.steps[self.rank])  # a sign of life
            else:
                self._warn_of_stall()

    def _heard(self, rank: int, step: float) -> None:
        self.heard[rank] = time.monotonic()
        if step > self.steps[rank]:  # a sign of life may overtake the report of a step
            self.steps[rank], self.advanced = step, time.monotonic()
        if min([self.steps[0]] if self.rank else self.steps.values()) == math.inf:
            self._send(math.inf)
            self.finished.set()

    def _warn_of_stall(self) -> None:
        """Once a stall, name a rank for which the others seem to wait: a silent one, else one that is behind."""
        now = self.heard[0] = time.monotonic()
        if (seconds := now - self.advanced) < self.stall_seconds:
            return
        running = {rank: step for rank, step in self.steps.items() if step < math.inf}
        silent = [rank for rank in running if now - self.heard[rank] > self.stall_seconds / 2]
        behind = [rank for rank, step in running.items() if step < max(self.steps.values())]
        for rank in (silent or behind)[:1]:
            line = f"rank {rank} has been at step {running[rank]:.0f} for {seconds:.0f} s; the others wait for it"
            print(line, file=sys.stderr, flush=True)
            self.advanced = math.inf

    def _announce(self, failure: Failure) -> None:
        """The first failure counts; rank 0 passes it on to all."""
        self.failures.append(failure)
        if self.failures[0] is failure and self.rank in (0, failure[0]):
            self._send(failure)
        self.failed.set()

    def _exit(self) -> None:
        rank, step, why = self.failures[0]
        if self.step_file is None or self.rank:  # the launcher says it in rank 0's place
            print(f"rank {rank} failed after step {step:.0f}:\n{why.rstrip()}", file=sys.stderr, flush=True)
        os._exit(PEER_FAILED)

    def _send(self, message: float | Failure) -> None:
        with self.sending:
            for peer in () if self.sent_end else self.peers:  # nothing after the end: unread, it would reset the connection
                with suppress(OSError):  # a dead one, which the thread finds out
                    peer.send(message)
            self.sent_end |= message == math.inf


def connect(process: Process) -> dict[Connection, int]:
    """This rank's connections, and the rank at the other end: on rank 0 those to all others, on any other that to rank 0."""
    host, peers = os.environ["MASTER_ADDR"], dict[Connection, int]()
    if process.rank:
        port, key = process.store.get("monitor").decode().split()
        peers[peer := Client((host, int(port)), authkey=key.encode())] = 0
        peer.send(process.rank)
    else:
        key, address = secrets.token_hex(16), "127.0.0.1" if host in ("127.0.0.1", "localhost") else ""
        with Listener((address, 0), backlog=process.size, authkey=key.encode()) as listener:
            process.store.set("monitor", f"{listener.address[1]} {key}")
            while len(peers) < process.size - 1:
                with suppress(AuthenticationError, EOFError, OSError):  # a stranger
                    peer = listener.accept()
                    peers[peer] = peer.recv()
    for peer in peers:
        with socket.socket(fileno=os.dup(peer.fileno())) as tcp:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in TCP_OPTIONS.items():
                if hasattr(socket, name):
                    tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peers
