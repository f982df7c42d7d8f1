"""Python's garbage collector: its pauses become short, and are counted and timed.

*When* it collects this leaves alone: on GPUs and in large jobs that is after the same steps in every process, by
`olmo_fn.train.machine.collect`. It freezes, after the first step, all objects that exist by then (modules, compiled graphs,
weights): later collections do not look at them, and are too short to matter.
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import Any

from olmo_fn.train.events import Event, Observer, RunInfo, Stepped
from olmo_fn.train.observers.shared import Switch


@dataclass(frozen=True)
class GarbageCollection:
    """Python's garbage collector on the first rank."""

    on: Switch = False
    """Shorten and time the pauses of Python's garbage collector; --observe.gc turns it on."""
    freeze: bool = True
    """After the first step leave out whatever exists by then."""
    slow: float = 0.1
    """Say so when a step has pauses of more than this many seconds."""

    def build(self, run: RunInfo) -> Observer:
        """Begin to time collections."""
        return GarbageCollectionObserver(self)


class GarbageCollectionObserver(Observer):
    """Times every collection after the first step, and says at the end how many there were."""

    def __init__(self, settings: GarbageCollection) -> None:
        self.settings, self.steps, self.count, self.seconds = settings, 0, 0, 0.0
        self.began = self.in_step = 0.0
        gc.callbacks.append(self._time)

    def __call__(self, event: Event) -> None:
        if isinstance(event, Stepped):
            if self.steps == 0 and self.settings.freeze:
                gc.collect()
                gc.freeze()
            elif self.in_step > self.settings.slow:
                print(f"garbage collection: pauses of {self.in_step:.2f} s in step {event.step}")
            self.steps, self.in_step = self.steps + 1, 0.0

    def close(self) -> None:
        """Say how many collections there were, and let them look at everything again."""
        gc.callbacks.remove(self._time)
        if self.settings.freeze:
            gc.unfreeze()
        print(f"garbage collection: {self.count} pauses in {max(0, self.steps - 1)} steps, {1e3 * self.seconds:.1f} ms in all")

    def _time(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self.began = time.perf_counter()
        elif self.steps:
            pause = time.perf_counter() - self.began
            self.count, self.seconds, self.in_step = self.count + 1, self.seconds + pause, self.in_step + pause
