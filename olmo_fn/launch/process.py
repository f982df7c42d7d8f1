"""This process among the others of its job: who it is, and whether all run the same program on the same data."""

from __future__ import annotations

import hashlib
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from itertools import zip_longest
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import olmo_fn
from olmo_fn.launch.meeting import listen, meet, patience
from olmo_fn.launch.place import Place, alone_note, place_from_env

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Process:
    """A process of a job, by default of one process."""

    rank: int = 0
    size: int = 1  # processes of the job
    local_rank: int = 0  # among those of this machine
    store: Any = None  # the torch.distributed.Store that they share
    peers: Mapping[Connection, int] = field(default_factory=dict)
    """The connections that `olmo_fn.launch.monitor` listens to, and the rank at the other end of each."""


def rendezvous(timeout: float = 1800.0) -> Process:
    """Meet the other processes of the job that the environment describes; without one the job is this process alone.

    After ten seconds a line says who is waited for. ValueError for an environment that cannot be, OSError if another process
    does not come for ``timeout`` seconds. One that comes and dies is found out by `monitor`, which is to be entered next.
    """
    place = place_from_env()
    if place is None or place.size == 1:
        if place is None and (note := alone_note()):
            print(note, file=sys.stderr, flush=True)
        return Process()
    wait = patience(place, timeout)
    store = _store(place, wait, timeout)
    try:
        prefix, peers = meet(place, store, wait)
    except RuntimeError as error:  # of the store
        raise ConnectionError(f"process 0 of {place.size} has ended: {str(error).splitlines()[0]}") from None
    return Process(place.rank, place.size, place.local_rank, dist.PrefixStore(prefix, store), peers)


def init_process_group(process: Process, device: torch.device = CPU, timeout: float = 1800.0) -> None:
    """Initialise ``torch.distributed`` for these processes, with gloo for the CPU, and NCCL beside it for a ``cuda`` device.

    NCCL connects them now, and groups that are made later by splitting these connections, not each at its first transfer.
    ``timeout``: seconds that a collective may take.
    """
    if (place := place_from_env()) and place.one_machine:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    gpu = device if device.type == "cuda" else None
    store, longest = dist.PrefixStore("groups", process.store), timedelta(seconds=timeout)
    options: Any = {"store": store, "rank": process.rank, "world_size": process.size, "timeout": longest}
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo", device_id=gpu, **options)


def _store(place: Place, wait: Callable[[str], None], timeout: float) -> Any:
    """The store of a job: files in the folder of `launch`, which nobody else can read; torchrun's; or one that rank 0 hosts,
    which only this machine can reach if all processes are on it.
    """
    if place.status:
        return dist.FileStore(str(place.status / "store"), place.size)
    options: Any = {"timeout": timedelta(seconds=timeout), "wait_for_workers": False}
    host, port = place.host if place.agent or not place.one_machine else "127.0.0.1", place.port
    if place.rank == 0 and not place.agent:
        try:
            server = listen(place, port)
        except OSError as error:
            raise ValueError(f"MASTER_PORT={port} cannot be had here ({error.strerror}); take another, or unset RANK") from None
        return dist.TCPStore(host, port, place.size, is_master=True, master_listen_fd=server.detach(), **options)
    while True:
        try:  # as often as it takes, for torch's own waiting cannot be interrupted
            socket.create_connection((host, port), 2.0).close()
        except OSError:
            wait(f"process 0 of {place.size} (RANK={place.rank})")
            time.sleep(0.05)
        else:
            return dist.TCPStore(host, port, place.size, is_master=False, **options)


def agree(value: str, name: str, process: Process) -> None:
    """Compare ``value`` on all ranks; ValueError on every rank, with one line, if it differs on any from rank 0's.

    Every rank calls it at the same point, with a ``name`` that is used once. Only hashes travel while they agree.

    >>> agree("step 1", "config", Process())
    """
    if process.size == 1:
        return
    store, ranks = dist.PrefixStore(f"agree/{name}", process.store), range(process.size)
    store.set(f"hash{process.rank}", hashlib.sha256(value.encode()).hexdigest())
    hashes = store.multi_get([f"hash{rank}" for rank in ranks])
    if not (different := [rank for rank in ranks if hashes[rank] != hashes[0]]):
        return
    if process.rank in (0, different[0]):
        store.set(f"value{process.rank}", value)
    first, other = (text.decode() for text in store.multi_get(["value0", f"value{different[0]}"]))
    store.set(f"read{process.rank}", "")
    if process.rank == 0:  # its process may host the store: it stays until the others have read
        store.wait([f"read{rank}" for rank in ranks])
    more = f" ({len(different)} of {process.size} ranks differ)" if len(different) > 1 else ""
    raise ValueError(f"rank {different[0]} has another {name} than rank 0: {difference(first, other)}{more}")


def difference(first: str, other: str) -> str:
    """The first line in which two texts differ.

    >>> difference("lr: 0.1\\nsteps: 5", "lr: 0.1\\nsteps: 6")
    "'steps: 6' instead of 'steps: 5'"
    """
    lines = zip_longest(first.splitlines(), other.splitlines(), fillvalue="")
    texts = (f"{y[:100]!r} instead of {x[:100]!r}" for x, y in lines if x != y)
    return next(texts, "it differs in its line ends")


def code_hash() -> str:
    """The program as text to `agree` on: the version of torch, and a line with the hash of each source file of olmo_fn."""
    root = Path(olmo_fn.__file__).parent
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in sorted(root.rglob("*.py"))}
    return "\n".join([f"torch {torch.__version__}", *(f"{p.relative_to(root.parent)} {hash}" for p, hash in hashes.items())])
