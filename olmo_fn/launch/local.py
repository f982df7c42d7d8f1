"""Start the ranks of a job on this machine: ``python train.py … --nproc 2``. Imports no torch.

Several machines are torchrun's, which works as well on one. It is not used here (torch 2.13, two busy cores): rank 0 starts
after 1.3 to 3.5 s instead of 0.1 to 0.4 s; after ``kill -9`` of a rank the job has ended in 5 to 17 s instead of 0.4 to 0.6 s,
with 42 lines instead of one, exit code 1 whatever happened, and failures ordered by a clock of whole seconds, so that it may
name a rank that only followed; and 30 s after SIGTERM it kills ranks that are saving.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import FrameType

from olmo_fn.launch.place import STATUS, TOKEN

SAID, FAILURE = "said", "failure"
"""Files of the status folder: lines for the terminal; what ended the ranks that ended for another."""
PEER_FAILED = os.EX_TEMPFAIL
"""Exit code of a rank that ended because another failed."""
GRACE_SECONDS = 3.0  # after a failure, until the ranks that still run are killed


def launch(arguments: Sequence[str], nproc: int, folder: Path | None = None) -> int:
    """Run ``python *arguments`` as ``nproc`` ranks and wait; returns the exit code for this process.

    What rank 0 prints goes through; the others' goes to ``logs/rank{n}.log`` in ``folder``, the run's, as soon as that has
    a ``config.yaml``. The cores are divided among the ranks. SIGINT and SIGTERM are passed on, and then the code is
    128 + n. If a rank fails, the others are ended, and one block says which, after which step and why.
    """
    with ExitStack() as stack:
        status = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="olmo_fn-")))
        ranks = LocalRanks(arguments, nproc, status, folder)
        stack.callback(ranks.close)
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, ranks.pass_on))
        while ranks.running() and not ranks.failed():
            time.sleep(0.05)
        if not ranks.failed():
            return 128 + ranks.signal if ranks.signal else 0
        deadline = time.monotonic() + GRACE_SECONDS
        while ranks.running() and time.monotonic() < deadline:
            time.sleep(0.05)
        # The first that ended; but rather a killed one than one that raised, and last one that ended for another's failure.
        rank = min(ranks.failed(), key=lambda rank: (ranks.codes[rank] == PEER_FAILED, ranks.codes[rank] > 0))
        if (code := ranks.codes[rank]) != 2 or ranks.codes.get(0) != 2:  # wrong input, which rank 0 has explained
            print(ranks.report(rank), file=sys.stderr, flush=True)
        return code if code > 0 else 128 - code


class LocalRanks:
    """The processes of the ranks, and the exit codes of those that have ended, in that order."""

    def __init__(self, arguments: Sequence[str], nproc: int, status: Path, folder: Path | None) -> None:
        self.status, self.folder, self.signal = status, folder, 0
        self.said = (status / SAID).open("a+")
        self.logs = {rank: status / f"rank{rank}.log" for rank in range(1, nproc)}
        self.codes: dict[int, int] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        environment = {"OMP_NUM_THREADS": str(max(1, cores // nproc)), **os.environ}
        environment |= {STATUS: str(status), TOKEN: secrets.token_hex(16)}
        environment |= {"WORLD_SIZE": str(nproc), "LOCAL_WORLD_SIZE": str(nproc)}
        for rank in range(nproc):
            own, command = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, [sys.executable, *arguments]
            with self.logs[rank].open("wb") if rank else nullcontext() as log:
                # A process group of its own: Ctrl-C in the terminal reaches a rank once, through this process.
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=own, process_group=0)
            self.processes.append(process)

    def running(self) -> bool:
        """Whether a rank still runs. Notes which have ended, says what they have to say, and links the logs into the folder."""
        print(self.said.read(), end="", file=sys.stderr, flush=True)
        for rank, process in enumerate(self.processes):
            if rank not in self.codes and (code := process.poll()) is not None:
                self.codes[rank] = code
        if self.folder and (self.folder / "config.yaml").exists():
            (self.folder / "logs").mkdir(exist_ok=True)
            for rank, log in self.logs.items():
                if log.parent == self.status:
                    self.logs[rank] = link = self.folder / "logs" / log.name
                    link.unlink(missing_ok=True)
                    link.symlink_to(log)
        return len(self.codes) < len(self.processes)

    def failed(self) -> list[int]:
        """The ranks that ended with an error; to end by a signal that was passed on is none."""
        expected = (0, 128 + self.signal, -self.signal) if self.signal else (0,)
        return [rank for rank, code in self.codes.items() if code not in expected]

    def close(self) -> None:
        """Kill the ranks that still run, and put the logs where links to them are."""
        if self.running():
            for process in self.processes:
                process.kill()
                process.wait()
        for link in self.logs.values():
            if link.is_symlink():
                os.replace(shutil.copyfile(link, link.with_suffix(".copy")), link)
        self.said.close()

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: send the signal to every rank."""
        self.signal = number
        for process in self.processes:
            process.send_signal(number)

    def report(self, rank: int) -> str:
        """Which rank failed, after which step and how, and the end of its log, with its traceback if it raised."""
        code, step, log = self.codes[rank], self.status / f"rank{rank}.step", self.logs.get(rank)
        lines = log.read_text(errors="replace").splitlines()[-40:] if log else []  # rank 0 has printed it
        if code == PEER_FAILED and (failure := self.status / FAILURE).exists():  # of one that stands still
            return failure.read_text()
        if code == 2 and lines and lines[-1].startswith("error: "):  # wrong input, which is said in one line
            return lines[-1]
        after = f" after step {step.read_text().strip()}" if step.exists() and step.stat().st_size else ""
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        how += ", as a system does when memory runs out" if code == -signal.SIGKILL else ""
        more = [f"log: {log}"] if log and log.parent != self.status else []
        return "\n".join([f"rank {rank} failed{after}: {how}", *lines, *more])
