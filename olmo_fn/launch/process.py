"""This process among the others of its job: who it is, and whether all run the same program on the same data."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import olmo_fn


@dataclass(frozen=True)
class Process:
    """A process of a job, by default of one process."""

    rank: int = 0
    size: int = 1  # processes of the job
    local_rank: int = 0  # among those of this machine
    store: Any = None  # the torch.distributed.Store that they share


def init_process_group_from_env(device_type: str = "cpu", timeout: timedelta = timedelta(minutes=30)) -> Process:
    """Join the job that the environment describes (``RANK``, ``WORLD_SIZE``, …: torchrun sets it, and `launch`).

    Initialises ``torch.distributed`` with gloo for the CPU, and NCCL beside it for ``cuda``. Without that environment
    the job is this process alone, and nothing is initialised. ValueError if only a part of the environment is set.
    """
    if "RANK" not in os.environ:
        return Process()
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ValueError(f"RANK is set, but {', '.join(missing)} is not; start with torchrun or --nproc, or unset RANK")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    shared, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = _new_prefix(shared, rank, size)
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size, timeout=timeout)
    return Process(rank, size, local_rank, store)


def _new_prefix(store: Any, rank: int, size: int) -> Any:
    """The part of ``store`` that belongs to this start of the job alone.

    torchrun (torch 2.13) gives restarted ranks the store of the ranks before them, addresses of dead processes included; its
    ``TORCHELASTIC_RESTART_COUNT`` may differ between machines. So every rank leaves a random token, rank 0 publishes all
    that it sees, and a rank that finds its own token there knows that the list is of this start.
    """
    token = secrets.token_hex(8)
    store.set(f"token{rank}", token)
    while True:
        if rank == 0:
            store.set("tokens", b" ".join(store.get(f"token{other}") for other in range(size)))
        tokens = store.get("tokens").decode().split()
        if token in tokens:
            prefix = dist.PrefixStore(tokens[0], store)
            prefix.set(f"joined{rank}", "")
            if prefix.check([f"joined{other}" for other in range(size)]):
                return prefix
        time.sleep(0.02)


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
