"""Beside other programs: whether waiting threads spin, decided anew while the run goes on.

A step has several hundred parallel regions, and at the end of each the threads that are ready wait for the others. Alone they
should spin for some microseconds, which is quicker than to sleep and be woken. Beside a busy program the thread that is waited
for has lost its processor to it, and gets another only if the waiting one gives up its own: there they should sleep at once.

GNU's OpenMP, which torch uses on a CPU, reads its settings when it is loaded (`olmo_fn.train.environment`), but spins only
while it has no more threads than there are processors. So one more thread that has joined a parallel region, and sleeps, turns
spinning off, and on again when it ends. How work is divided stays the same, and so does every bit of a result.
"""

from __future__ import annotations

import resource
import threading

import torch

MANY, FEW = 150.0, 50.0
"""How often in a second of its time a processor is taken away from this process: more often than the first beside a busy
program (200 to 700 were seen), less often than the second alone (10 to 40)."""
SHORT, LONG = 0.5, 10.0
"""Seconds of processors' time over which that is counted: until spinning ends, and until it begins again."""


class Neighbours:
    """Call it after each step on a CPU: it looks at how often others took this process's processors, and acts."""

    def __init__(self) -> None:
        self.used, self.switches = _used()
        self.asleep: threading.Event | None = None

    @property
    def spinning(self) -> bool:
        """Whether waiting threads spin."""
        return self.asleep is None

    def __call__(self) -> None:
        used, switches = _used()
        seconds = used - self.used
        if seconds < (SHORT if self.spinning else LONG):
            return
        rate = (switches - self.switches) / seconds
        self.used, self.switches = used, switches
        if self.spinning and rate > MANY:
            self.asleep = threading.Event()
            threading.Thread(target=_one_more, args=(self.asleep,), daemon=True, name="neighbours").start()
        elif not self.spinning and rate < FEW:
            self.close()

    def close(self) -> None:
        """Let waiting threads spin again."""
        if self.asleep is not None:
            self.asleep.set()
            self.asleep = None


def _used() -> tuple[float, int]:
    """Seconds of processors' time that this process has used, and how often one was taken away from it."""
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_utime + found.ru_stime, found.ru_nivcsw


def _one_more(end: threading.Event) -> None:
    torch.ones(1 << 17).mul_(2)  # large enough for a parallel region
    end.wait()
