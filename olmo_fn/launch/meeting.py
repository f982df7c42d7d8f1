"""How the ranks of a job meet: each connects to rank 0, and shows that it knows the token. Imports no torch.

Strangers can connect, too: each has two seconds, in a thread of its own, and nothing that it sends is believed.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from olmo_fn.launch.place import TOKEN, Place

# Small messages go at once; a machine that does not answer is given up after 10 + 4 x 5 s, or 30 s (in ms) with data under way.
TCP_OPTIONS = {"TCP_NODELAY": 1, "TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}
STRANGER_SECONDS = 2.0


def patience(place: Place, timeout: float) -> Callable[[str], None]:
    """A function to call again and again while waiting for somebody: says so after ten seconds, OSError after ``timeout``.

    >>> patience(Place(0, 2, 0, 2, "node1", 29500), 0.0)("1 of 2 processes")
    Traceback (most recent call last):
    TimeoutError: waited 0 s for 1 of 2 processes (WORLD_SIZE=2) at node1:29500 (--run.stall-timeout); unset RANK to run alone
    """
    begun, said = time.monotonic(), False

    def wait(missing: str) -> None:
        nonlocal said
        who = f"{missing} (WORLD_SIZE={place.size})" + (f" at {place.host}:{place.port}" if place.host else "")
        if (seconds := time.monotonic() - begun) >= timeout:
            raise TimeoutError(f"waited {seconds:.0f} s for {who} (--run.stall-timeout); unset RANK to run alone")
        if seconds > 10 and missing and not said and place.status is None:  # `launch` watches over its own
            said = True
            print(f"waiting for {who}; unset RANK to run alone", file=sys.stderr, flush=True)

    return wait


def listen(place: Place, port: int = 0) -> socket.socket:
    """A socket for the others of the job: on the loopback if they are all on this machine."""
    if place.one_machine:
        return socket.create_server(("127.0.0.1", port), backlog=128)
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    return socket.create_server(("", port), family=family, dualstack_ipv6=dual, backlog=max(128, place.size))


def meet(place: Place, store: Any, wait: Callable[[str], None]) -> tuple[str, dict[Connection, int]]:
    """Wait until all ranks are there, or have been: a name that is new for each start of the job, and this rank's connections.

    Those are on rank 0 to all others, on any other to rank 0. torchrun (torch 2.13) gives restarted ranks the ``store`` of the
    ranks before them, addresses of dead processes included: one that does not answer is looked up again.
    """
    prefix, peers = _receive(place, store, wait) if place.rank == 0 else _call(place, store, wait)
    for peer in peers:
        with socket.socket(fileno=os.dup(peer.fileno())) as tcp:
            tcp.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in TCP_OPTIONS.items():
                if hasattr(socket, name):
                    tcp.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return prefix, peers


def _receive(place: Place, store: Any, wait: Callable[[str], None]) -> tuple[str, dict[Connection, int]]:
    own, peers, arrived = os.environ.get(TOKEN), dict[Connection, int](), SimpleQueue[tuple[int, Connection]]()
    key = own or secrets.token_hex(16)
    with listen(place) as server:
        server.settimeout(0.05)
        store.set("monitor", f"{server.getsockname()[1]} {'' if own else key}")
        while len(peers) < place.size - 1:
            with suppress(TimeoutError):
                peer = Connection(server.accept()[0].detach())
                Thread(target=_greet, args=(peer, key.encode(), arrived), daemon=True).start()
            while not arrived.empty():
                rank, peer = arrived.get()
                if 0 < rank < place.size and rank not in peers.values():
                    peers[peer] = rank
                else:
                    peer.close()
            wait(f"{place.size - 1 - len(peers)} of {place.size} processes")
    prefix = secrets.token_hex(8)
    for peer in peers:
        with suppress(OSError):  # it has died meanwhile, which its connection tells `monitor`
            peer.send_bytes(prefix.encode())
    return prefix, peers


def _greet(peer: Connection, key: bytes, arrived: SimpleQueue[tuple[int, Connection]]) -> None:
    """Ask who knocks; put a rank that knows the key into ``arrived``, and hang up on anybody else."""
    nonce = secrets.token_bytes(32)
    with suppress(OSError, EOFError, ValueError):
        peer.send_bytes(nonce)
        if peer.poll(STRANGER_SECONDS):
            rank, _, proof = peer.recv_bytes(80).partition(b" ")
            if hmac.compare_digest(proof, _proof(key, nonce, rank)):
                arrived.put((int(rank), peer))
                return
    peer.close()


def _proof(key: bytes, nonce: bytes, rank: bytes) -> bytes:
    return hmac.new(key, nonce + rank, "sha256").hexdigest().encode()


def _call(place: Place, store: Any, wait: Callable[[str], None]) -> tuple[str, dict[Connection, int]]:
    address, rank = "127.0.0.1" if place.one_machine else place.host, str(place.rank).encode()
    while True:
        wait(f"process 0 of {place.size} (RANK={place.rank})")
        if store.check(["monitor"]):
            port, _, shared = store.get("monitor").decode().partition(" ")
            key = (os.environ.get(TOKEN) or shared).encode()
            with suppress(OSError, EOFError):
                tcp = socket.create_connection((address, int(port)), STRANGER_SECONDS)
                tcp.settimeout(None)
                peer = Connection(tcp.detach())
                if peer.poll(STRANGER_SECONDS):  # or else somebody else has the port of a dead process by now
                    nonce = peer.recv_bytes(32)
                    peer.send_bytes(rank + b" " + _proof(key, nonce, rank))
                    while not peer.poll(1.0):
                        wait("")
                    return peer.recv_bytes(32).decode(), {peer: 0}
                peer.close()
        time.sleep(0.05)
