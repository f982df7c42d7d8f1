"""Trackio: a tracker on this machine (``trackio show``), or a Hugging Face Space. A resumed run goes on in the same run."""

from __future__ import annotations

from dataclasses import dataclass

from olmo_fn.train.events import Observer, RunInfo
from olmo_fn.train.observers.shared import Switch, Tracker, require, run_id


@dataclass(frozen=True)
class Trackio:
    """Trackio (extra trackio)."""

    on: Switch = False
    """Record the run with Trackio, in TRACKIO_DIR of this machine; --observe.trackio turns it on."""
    project: str = "olmo-fn"
    """Project of the run."""
    name: str | None = None
    """Name of the run, to which some digits are added, because Trackio resumes by name; that of its folder when not given."""
    space: str | None = None
    """Hugging Face Space to send it to, such as user/name."""

    def build(self, run: RunInfo) -> Observer:
        """Begin the run, or go on with it."""
        trackio = require("trackio", "trackio")
        name = f"{self.name or run.name}-{run_id(run.folder / 'trackio.id')[:6]}"
        trackio.init(self.project, name, space_id=self.space, config=dict(run.config), resume="allow", embed=False)

        def log(numbers: dict[str, float], vectors: dict[str, list[float]], step: int) -> None:
            trackio.log({**numbers, **{name: trackio.Histogram(x) for name, x in vectors.items()}}, step=step)

        return Tracker(log, lambda ended: trackio.finish())
