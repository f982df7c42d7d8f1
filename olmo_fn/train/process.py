"""This process among those that train together, as a value: its rank, its device, and its place in the mesh."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
import torch.distributed as dist

from olmo_fn.checkpoint import Ranks
from olmo_fn.launch.monitor import monitor
from olmo_fn.launch.place import place_from_env
from olmo_fn.launch.process import Process, agree, code_hash, init_process_group, rendezvous
from olmo_fn.mesh.connect import Connection, connect
from olmo_fn.train import machine
from olmo_fn.train.config import Config
from olmo_fn.train.serialize import to_yaml

T = TypeVar("T")


@dataclass(frozen=True)
class ProcessContext:
    """Who this process is, what it computes on, and how it reaches the others: ``connection`` is None for one alone."""

    device: torch.device
    process: Process = field(default_factory=Process)
    connection: Connection | None = None
    ranks: Ranks = field(default_factory=Ranks)
    """The same ranks, as checkpoints know them."""
    step_done: Callable[[int], None] = lambda step: None
    """Tells the others that a step is done."""

    @property
    def is_main(self) -> bool:
        """Whether this is the process that reports, and writes what is written once."""
        return self.process.rank == 0

    def local_main_first(self, make: Callable[[], T]) -> T:
        """``make()``, by the first process of each machine before the others: it may fill a cache."""
        if self.process.local_rank == 0:
            made = make()
            self.barrier()
            return made
        self.barrier()
        return make()

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.connection is not None:
            dist.barrier()

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' values, on all of them. Waits for them, and for no GPU."""
        if self.connection is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


@contextmanager
def join(cfg: Config) -> Iterator[ProcessContext]:
    """Take part in the job that the environment describes; a process alone is one as well.

    If another process fails inside the block, this one ends, and says why. ValueError if the processes do not fill the mesh,
    or run another program or config than the first.
    """
    device, timeout = machine.pick_device(cfg.run.device, place_from_env()), cfg.run.stall_timeout
    process = rendezvous(timeout)
    cfg.check_processes(process.size)
    try:
        with monitor(process, stall_timeout=timeout) as step_done:
            if process.size == 1:
                yield ProcessContext(device, process, step_done=step_done)
                return
            init_process_group(process, device, timeout + 60)  # so that the monitor names who stands still
            agree(code_hash(), "program", process)
            agree(to_yaml(replace(cfg, run=replace(cfg.run, threads=0))), "config", process)
            ranks = Ranks(process.rank, process.size, dist.PrefixStore("checkpoint", process.store))
            connection = connect(cfg.mesh.on(process.size), device.type)
            yield ProcessContext(device, process, connection, ranks, step_done)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
