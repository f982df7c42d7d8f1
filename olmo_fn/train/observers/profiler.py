"""torch.profiler over a few steps: a Chrome trace, and a table of the operations that took longest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmo_fn.train.events import Event, Observer, RunInfo, Started, Stepped
from olmo_fn.train.observers.shared import Switch


@dataclass(frozen=True)
class Profiler:
    """torch.profiler on the first rank."""

    on: Switch = False
    """Profile some steps into FOLDER/profile; --observe.profiler turns it on."""
    first: int = 10
    """First step to profile, counted from where this process starts or goes on; its very first compiles."""
    steps: int = 3
    """Number of steps to profile."""
    stacks: bool = False
    """Record where in the source each operation comes from (slower)."""

    def build(self, run: RunInfo) -> Observer:
        """An observer that waits for the step before the first."""
        if self.first < 1 or self.steps < 1:
            raise ValueError("--observe.profiler.first and --observe.profiler.steps must be at least 1")
        return ProfilerObserver(self, run.folder / "profile")


class ProfilerObserver(Observer):
    """Profiles all that happens between the event of the step before the first and the event of the last."""

    def __init__(self, settings: Profiler, folder: Path) -> None:
        self.settings, self.folder = settings, folder
        self.before = -1
        self.profile: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.before = event.step + self.settings.first - 1
        if isinstance(event, Stepped) and self.profile and event.step == self.before + self.settings.steps:
            self._write(event.step)
        if isinstance(event, (Started, Stepped)) and event.step == self.before:
            from torch.profiler import profile

            self.profile = profile(record_shapes=True, with_stack=self.settings.stacks)
            self.profile.start()

    def close(self) -> None:
        """Stop; a profile that the end of the run cut short is not written."""
        if self.profile:
            self.profile.stop()

    def _write(self, last: int) -> None:
        profile, self.profile = self.profile, None
        profile.stop()
        self.folder.mkdir(parents=True, exist_ok=True)
        trace = self.folder / f"steps{self.before + 1}-{last}.json"
        profile.export_chrome_trace(str(trace))
        averages = profile.key_averages()
        where = "device" if any(row.self_device_time_total for row in averages) else "cpu"
        trace.with_suffix(".txt").write_text(averages.table(sort_by=f"self_{where}_time_total", row_limit=40) + "\n")
        print(f"profile of steps {self.before + 1} to {last}: {trace} (open it in ui.perfetto.dev), and a table beside it")
