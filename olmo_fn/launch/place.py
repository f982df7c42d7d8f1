"""Where this process stands among those of its job, as the environment says. Imports no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

STATUS = "OLMO_FN_STATUS"
"""Environment variable: the folder in which the ranks that `launch` started meet, and note their last step."""
TOKEN = "OLMO_FN_TOKEN"
"""Environment variable: what a rank must know to be let in. `launch` sets it; on several machines you may, to the same text."""
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
START = "start one a machine, which starts the others: `torchrun …`, or here --nproc"
STARTED = ("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@dataclass(frozen=True)
class Place:
    """A process of a job: which one it is, and where it meets the others."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    """Processes of the job on this machine."""
    host: str = ""
    """Where process 0 is, if it is on another machine, or torchrun's agent."""
    port: int = 0
    status: Path | None = None
    """The folder that `launch` made for these ranks."""
    agent: bool = False
    """Whether torchrun's agent keeps the store, and watches over the processes."""

    @property
    def one_machine(self) -> bool:
        """Whether all processes are on this one, so that nothing need listen to others."""
        return self.local_size == self.size


def place_from_env() -> Place | None:
    """The place that ``RANK``, ``WORLD_SIZE``, … give this process (torchrun sets them, and `launch`); None if it is alone.

    ValueError, which names the variables, for numbers that cannot be, and for processes that another program started.
    """
    if "RANK" not in os.environ:
        _check_alone()
        return None
    status = os.environ.get(STATUS)
    needed = ("WORLD_SIZE",) if status else ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ValueError(f"RANK is set, but {', '.join(missing)} is not; start with torchrun or --nproc, or unset RANK")
    size, host = _number("WORLD_SIZE", 1, 1 << 20), os.environ.get("MASTER_ADDR", "")
    here = size if status or host in ("127.0.0.1", "::1", "localhost") else 1
    local_size = _number("LOCAL_WORLD_SIZE", 1, size, here)
    return Place(
        _number("RANK", 0, size - 1),
        size,
        _number("LOCAL_RANK", 0, local_size - 1, 0),
        local_size,
        host,
        0 if status else _number("MASTER_PORT", 1, 65535),
        Path(status) if status else None,
        os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _number(name: str, low: int, high: int, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        number = int(text or "")
    except ValueError:
        number = low - 1
    if not low <= number <= high:
        there = ", ".join(f"{variable}={os.environ[variable][:40]!r}" for variable in VARIABLES if variable in os.environ)
        fix = "start with torchrun or --nproc, or unset RANK to run alone"
        raise ValueError(f"{name} must be a whole number from {low} to {high}; the environment has {there}; {fix}")
    return number


def alone_note() -> str:
    """What to say where a batch script asks for several tasks, and its own process trains alone; empty elsewhere."""
    tasks = os.environ.get("SLURM_NTASKS", "")
    if tasks in ("", "1") or "SLURM_PROCID" not in os.environ:
        return ""
    return f"SLURM_NTASKS={tasks}, but this process trains alone; {START} {tasks}"


def _check_alone() -> None:
    """ValueError if another program started this process with others, which would all train alone in one folder."""
    for name in STARTED:
        tasks = os.environ.get(name, "")
        if tasks in ("", "1") or (name == "SLURM_NTASKS" and os.environ.get("SLURM_PROCID", "0") == "0"):
            continue  # a batch script's own process, or the first of srun, is alone
        raise ValueError(f"{name}={tasks}: this is one of {tasks} processes that do not know each other; {START} {tasks}")
