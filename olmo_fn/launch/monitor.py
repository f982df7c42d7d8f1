"""A rank that dies ends the job in seconds: every rank keeps a connection to rank 0, and the kernel closes a dead one's.

Rank 0 hears the failure of any rank, or finds its connection closed, and tells the others; they say which rank failed, after
which step and why, and exit. Where a machine is lost without a word, TCP's keepalive finds out in half a minute. A rank that
stands still is named after a minute, by rank 0 or, if it is rank 0 that is silent, by rank 1; and ends the job in the end.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from olmo_fn.launch.local import FAILURE, PEER_FAILED, SAID
from olmo_fn.launch.place import STATUS
from olmo_fn.launch.process import Process

Failure = tuple[int, float, str]


@contextmanager
def monitor(process: Process, stall_seconds: float = 60.0, stall_timeout: float = math.inf) -> Iterator[Callable[[int], None]]:
    """End this rank if another fails inside the block; gives a function to call with each step that is done.

    All ranks enter the block, once in the life of a process, and wait for each other at its end. A rank that raises tells the
    others and goes on raising. They print ``rank 3 failed after step 41:`` with its traceback and exit with `PEER_FAILED`,
    whatever they are doing. If no step is done for ``stall_seconds`` and a rank is behind or silent, a line says so; if it is
    so for ``stall_timeout`` seconds, that rank has failed.

    >>> with monitor(Process()) as step_done:
    ...     step_done(1)
    """
    this = RankMonitor(process, stall_seconds, stall_timeout)
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

    def __init__(self, process: Process, stall_seconds: float, stall_timeout: float) -> None:
        self.rank, self.stall_seconds, self.stall_timeout = process.rank, stall_seconds, stall_timeout
        self.steps = dict.fromkeys({process.rank, *process.peers.values()}, 0.0)  # the last that it did
        self.heard = dict.fromkeys(self.steps, time.monotonic())  # when a rank last gave a sign of life
        self.looked = self.advanced = time.monotonic()  # when a rank last did a step
        self.named = False  # the rank that stands still
        self.failures: list[Failure] = []  # the first counts
        self.failed, self.raising, self.finished = threading.Event(), threading.Event(), threading.Event()
        self.sending, self.sent_end = threading.Lock(), False
        self.status = Path(os.environ[STATUS]) if STATUS in os.environ else None
        self.launcher = os.getppid() if self.status else None
        flags = os.O_CREAT | os.O_WRONLY
        self.step_file = os.open(self.status / f"rank{self.rank}.step", flags) if self.status else None
        self.peers = dict(process.peers)
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
        peers, interval, next_sign = dict[Any, int](self.peers), min(1.0, self.stall_seconds / 10), 0.0
        while not self.finished.is_set():
            ready: list[Any] = wait(list(peers), interval)
            for peer in ready:
                try:
                    message = json.loads(peer.recv_bytes())
                except (EOFError, OSError):
                    rank = peers.pop(peer)
                    message = (rank, self.steps[rank], "it died: its connection was closed")
                if isinstance(message, float | int):
                    self._heard(peers[peer], message)
                elif message[1] < math.inf and not self.finished.is_set():
                    self._announce(tuple(message))
            if self.failed.is_set():
                if not self.raising.wait(0.5):  # a rank that is failing by itself says so itself
                    self._exit()
                return
            if self.launcher not in (None, os.getppid()):  # it was killed: stop in order
                self.launcher = None
                os.kill(os.getpid(), signal.SIGTERM)
            if (now := time.monotonic()) >= next_sign:
                next_sign = now + interval
                self._send(0.0)  # a sign of life
                self._look_for_stall(now)

    def _heard(self, rank: int, step: float) -> None:
        self.heard[rank] = time.monotonic()
        if step > self.steps[rank]:  # else a sign of life
            self.steps[rank], self.advanced, self.named = step, time.monotonic(), False
        if (self.steps[0] if self.rank else min(self.steps.values())) == math.inf:
            self._send(math.inf)
            self.finished.set()

    def _look_for_stall(self, now: float) -> None:
        """Name, once a stall, a rank that others seem to wait for: a silent one, else one behind; in the end it failed."""
        self.heard[self.rank] = now
        asleep, self.looked = max(0.0, now - self.looked - 5.0), now  # this process was stopped as well: Ctrl-Z, a closed lid
        self.advanced += asleep
        self.heard = {rank: heard + asleep for rank, heard in self.heard.items()}
        seconds = now - self.advanced
        running = {rank: step for rank, step in self.steps.items() if step < math.inf}
        silent = [rank for rank in running if now - self.heard[rank] > self.stall_seconds / 2]
        behind = [rank for rank, step in running.items() if step < max(self.steps.values())]
        for rank in (silent or behind if self.rank == 0 else silent)[:1]:
            if seconds >= self.stall_timeout and (rank in silent or self.steps[rank] < max(running.values())):
                self._announce((rank, self.steps[rank], f"it stood still for {seconds:.0f} s (--run.stall-timeout)"))
            elif seconds >= self.stall_seconds and not self.named and self.rank < 2:
                self.named = True
                self._say(f"rank {rank} has been at step {running[rank]:.0f} for {seconds:.0f} s; the others wait for it")

    def _say(self, line: str) -> None:
        """On the terminal, which only rank 0 has: for any other `launch` passes it on."""
        if self.status and self.rank:
            with (self.status / SAID).open("a") as file:
                file.write(f"{line}\n")
        else:
            print(line, file=sys.stderr, flush=True)

    def _announce(self, failure: Failure) -> None:
        """The first failure counts; rank 0 passes it on to all."""
        self.failures.append(failure)
        if self.failures[0] is failure and self.rank in (0, failure[0]):
            self._send(failure)
        self.failed.set()

    def _exit(self) -> None:
        rank, step, why = self.failures[0]
        text = f"rank {rank} failed after step {step:.0f}:\n{why.rstrip()}"
        if self.status:  # the launcher says it in rank 0's place
            (self.status / FAILURE).write_text(text)
        if self.status is None or self.rank:
            print(text, file=sys.stderr, flush=True)
        os._exit(PEER_FAILED)

    def _send(self, message: float | Failure) -> None:
        with self.sending:
            for peer in () if self.sent_end else self.peers:  # nothing after the end: unread, it would reset the connection
                with suppress(OSError):  # a dead one, which the thread finds out
                    peer.send_bytes(json.dumps(message).encode())
            self.sent_end |= message == math.inf
