"""This process among the others of its job: who it is, and whether all run the same program on the same data."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import olmo_fn


@dataclass(frozen=True)
class Process:
    """A process of a job: its rank, how many there are, its place on this machine, and the store they share.

    ``store`` is a ``torch.distributed`` Store, None for a job of one process.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    store: Any = None


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
    backend = "gloo"
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    shared, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store = _fresh(shared, rank, size)
    dist.init_process_group(backend, store=dist.PrefixStore("groups", store), rank=rank, world_size=size, timeout=timeout)
    return Process(rank, size, local_rank, store)


def _fresh(store: Any, rank: int, size: int) -> Any:
    """A part of the store that only this start of the job uses.

    After a restart torchrun hands out the old store, in which the addresses of the dead still stand. So each rank leaves
    a number drawn now, and believes what rank 0 says only if that number is in it.
    """
    own = secrets.token_hex(8)
    store.set(f"drawn{rank}", own)
    while True:
        if rank == 0:
            numbers = [store.get(f"drawn{r}").decode() for r in range(size)]
            store.set("numbers", " ".join(numbers))
        else:
            numbers = store.get("numbers").decode().split()
        fresh = dist.PrefixStore(numbers[0], store)
        if rank and own in numbers:
            fresh.set(f"here{rank}", "")
            return fresh
        if rank == 0 and (size == 1 or fresh.check([f"here{r}" for r in range(1, size)])):
            return fresh
        time.sleep(0.02)


def agree(value: str, name: str, process: Process) -> None:
    """Compare ``value`` on all ranks; ValueError on every rank, with one line, if it differs on any from rank 0's.

    Every rank calls it at the same point, with a ``name`` that is used once. Only hashes travel while they agree.

    >>> agree("step 1", "config", Process())
    """
    if process.size == 1:
        return
    store = dist.PrefixStore(f"agree/{name}", process.store)
    digest = hashlib.sha256(value.encode()).hexdigest()
    if process.rank == 0:
        store.set("value", value)
        store.set("digest", digest)
    same = store.get("digest").decode() == digest
    store.set(f"rank{process.rank}", "" if same else difference(store.get("value").decode(), value))
    if process.rank == 0:
        found = [(rank, store.get(f"rank{rank}").decode()) for rank in range(process.size)]
        bad = [f"rank {rank} has another {name} than rank 0: {text}" for rank, text in found if text]
        more = f" ({len(bad)} of {process.size} ranks differ)" if len(bad) > 1 else ""
        store.set("verdict", bad[0] + more if bad else "")
    verdict = store.get("verdict").decode()
    store.set(f"read{process.rank}", "")
    if verdict:
        if process.rank == 0:  # it may hold the store: not before the others have read it
            store.wait([f"read{rank}" for rank in range(process.size)])
        raise ValueError(verdict)


def difference(first: str, other: str) -> str:
    """The first line in which two texts differ.

    >>> difference("lr: 0.1\\nsteps: 5", "lr: 0.1\\nsteps: 6")
    "'steps: 6' instead of 'steps: 5'"
    """
    a, b = first.splitlines(), other.splitlines()
    length = max(len(a), len(b))
    for x, y in zip(a + [""] * (length - len(a)), b + [""] * (length - len(b)), strict=True):
        if x != y:
            return f"{y[:100]!r} instead of {x[:100]!r}"
    return "it differs in its line ends"


def code_hash() -> str:
    """The program as text to `agree` on: the version of torch, and a line with the hash of each source file of olmo_fn."""
    root = Path(olmo_fn.__file__).parent
    lines = [f"torch {torch.__version__}"]
    for path in sorted(root.rglob("*.py")):
        lines.append(f"{path.relative_to(root.parent)} {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}")
    return "\n".join(lines)
