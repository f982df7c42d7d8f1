"""A rank that dies ends the job in seconds: every rank keeps a connection to rank 0, and the kernel closes a dead one's.

No heartbeats, which a long kernel would hold up. Rank 0 hears the failure of any rank, or finds its connection closed, and
tells the others; they say which rank failed, after which step and why, and exit. Where a machine is lost without a word,
TCP's keepalive finds out in half a minute.
"""

from __future__ import annotations

import json
import os
import secrets
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olmo_fn.launch.local import STATUS, TORN_DOWN
from olmo_fn.launch.process import Process

DIED = "it died: its connection was closed"
Message = dict[str, Any]


@contextmanager
def watch(process: Process) -> Iterator[Callable[[int], None]]:
    """Watch over the ranks inside the block; gives ``beat``, to be called with each step that is done.

    Every rank enters and leaves it together, once in the life of a process. A rank that raises tells the others and goes
    on raising. The others print ``rank 3 failed after step 41:`` with its traceback and exit with `TORN_DOWN`, whatever
    they are doing. Leaving without an error waits until all ranks have come as far.

    >>> with watch(Process()) as beat:
    ...     beat(1)
    """
    status = Status(process.rank)
    if process.size == 1:
        with status.recording():
            yield status.beat
        return
    line = Line(process, status)
    try:
        with status.recording():
            yield line.beat
    except SystemExit as end:
        if end.code not in (None, 0):
            line.fail(end)
        else:
            line.finish()
        raise
    except BaseException as error:
        line.fail(error)
        raise
    line.finish()


class Status:
    """What the process that launched this one reads when it dies: files with its last step, and how it failed."""

    def __init__(self, rank: int) -> None:
        self.step = 0
        self.folder = Path(os.environ[STATUS]) if STATUS in os.environ else None
        self.rank = rank
        self.file = os.open(self.folder / f"rank{rank}.step", os.O_CREAT | os.O_WRONLY) if self.folder else None

    def beat(self, step: int) -> None:
        """Note that ``step`` is done."""
        self.step = step
        if self.file is not None:
            os.pwrite(self.file, f"{step:<20}".encode(), 0)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write down an exception that leaves the block."""
        try:
            yield
        except BaseException:
            if self.folder:
                (self.folder / f"rank{self.rank}.traceback").write_text(f"{time.time_ns()}\n{traceback.format_exc()}")
            raise


class Line:
    """The connections of a rank: rank 0's to all others, another's to rank 0; and the thread that listens to them."""

    def __init__(self, process: Process, status: Status) -> None:
        self.rank, self.size, self.status = process.rank, process.size, status
        self.steps: dict[int, int] = {}  # the last of each rank that talks to this one
        self.done: set[int] = set()
        self.failure: Message | None = None
        self.failed, self.leaving, self.all_done = threading.Event(), threading.Event(), threading.Event()
        self.lock, self.sending = threading.Lock(), threading.Lock()
        self.launcher = os.getppid() if STATUS in os.environ else None
        self.peers: dict[int, socket.socket] = self._meet(process)
        threading.Thread(target=self._listen, daemon=True, name="watch").start()

    def _meet(self, process: Process) -> dict[int, socket.socket]:
        host = os.environ["MASTER_ADDR"]
        if process.rank:
            port, token = process.store.get("watch").decode().split()
            peer = socket.create_connection((host, int(port)))
            peer.sendall(f"{token} {process.rank:8}".encode())
            return {0: _alive(peer)}
        token = secrets.token_hex(16)
        local = host in ("127.0.0.1", "localhost", "::1")
        peers: dict[int, socket.socket] = {}
        with socket.create_server(("127.0.0.1" if local else "", 0), backlog=process.size) as server:
            process.store.set("watch", f"{server.getsockname()[1]} {token}")
            while len(peers) < process.size - 1:
                peer, _ = server.accept()
                hello = peer.recv(41, socket.MSG_WAITALL).decode()
                if hello[:32] == token:
                    peers[int(hello[32:])] = _alive(peer)
        return peers

    def beat(self, step: int) -> None:
        """Tell rank 0, or as rank 0 all others, that ``step`` is done."""
        self.status.beat(step)
        self._send({"step": step})

    def fail(self, error: BaseException) -> None:
        """This rank is leaving with an error. Unless it is only that another rank is gone, tell the others."""
        if isinstance(error, RuntimeError) and self.failed.wait(1.0):  # as a collective with a dead rank raises
            self._exit()
        self.leaving.set()
        self._announce({"failed": self.rank, "after": self.status.step, "why": traceback.format_exc()})
        deadline = threading.Timer(3, os._exit, (1,))  # whatever waits for other ranks at the end
        deadline.daemon = True
        deadline.start()

    def finish(self) -> None:
        """Wait until all ranks are here."""
        if self.rank:
            self._send({"done": True})
        else:
            self._finished(0)
        self.all_done.wait()

    def _listen(self) -> None:
        """The thread: reads what comes until all are done or one has failed."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self.peers.items():
                selector.register(peer, selectors.EVENT_READ, (rank, bytearray()))
            while not self.all_done.is_set():
                for key, _ in selector.select(1.0):
                    rank, unread = key.data
                    data = b""
                    with suppress(OSError):
                        data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                    unread += data
                    *lines, rest = unread.split(b"\n")
                    unread[:] = rest
                    for line in lines:
                        self._receive(rank, json.loads(line))
                    if not data:
                        selector.unregister(key.fileobj)
                        if rank not in self.done and not self.all_done.is_set():
                            self._announce({"failed": rank, "after": self.steps.get(rank, 0), "why": DIED})
                if self.failed.is_set():
                    if not self.leaving.wait(0.5):  # a rank that is failing by itself says so itself
                        self._exit()
                    return
                if self.launcher not in (None, os.getppid()):  # it was killed: stop in order
                    self.launcher = None
                    os.kill(os.getpid(), signal.SIGTERM)

    def _receive(self, rank: int, message: Message) -> None:
        if "step" in message:
            self.steps[rank] = message["step"]
        elif "failed" in message:
            self._announce(message)
        elif self.rank:
            self.all_done.set()
        else:
            self._finished(rank)

    def _finished(self, rank: int) -> None:
        with self.lock:
            self.done.add(rank)
            complete = len(self.done) == self.size
        if complete:
            self._send({"done": True})
            self.all_done.set()

    def _announce(self, failure: Message) -> None:
        """The first failure counts; rank 0 passes it on to all."""
        with self.lock:
            first, self.failure = self.failure is None, self.failure or failure
        if first and (self.rank == 0 or failure["failed"] == self.rank):
            self._send(failure)
        self.failed.set()

    def _exit(self) -> None:
        assert self.failure is not None
        failed, after, why = self.failure["failed"], self.failure["after"], self.failure["why"]
        if STATUS not in os.environ or self.rank:  # the launching process says it in rank 0's place
            print(f"rank {failed} failed after step {after}:\n{why.rstrip()}", file=sys.stderr, flush=True)
        os._exit(TORN_DOWN)

    def _send(self, message: Message) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self.sending:
            for peer in self.peers.values():
                with suppress(OSError):  # a dead one, which the thread finds out
                    peer.sendall(data)


def _alive(peer: socket.socket) -> socket.socket:
    """Small messages at once; and find out that the other machine is gone within half a minute."""
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4), ("TCP_USER_TIMEOUT", 30_000)):
        if hasattr(socket, name):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return peer
