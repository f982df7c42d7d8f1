"""Weights & Biases. A resumed run goes on in the same W&B run, whose id is in ``FOLDER/wandb.id``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from olmo_fn.train.events import Observer, RunInfo
from olmo_fn.train.observers.shared import Switch, Tracker, require, run_id


@dataclass(frozen=True)
class WandB:
    """Weights & Biases (extra wandb)."""

    on: Switch = False
    """Send the run to Weights & Biases; --observe.wandb turns it on."""
    project: str = "olmo-fn"
    """Project of the run."""
    entity: str | None = None
    """User or team; your default one when not given."""
    name: str | None = None
    """Name of the run; that of its folder when not given."""
    group: str | None = None
    """Group of the run."""
    tags: tuple[str, ...] = ()
    """Tags of the run."""
    mode: Literal["online", "offline"] | None = None
    """offline only writes files, for `wandb sync` later; WANDB_MODE, or online, when not given."""

    def build(self, run: RunInfo) -> Observer:
        """Begin the W&B run, or go on with it."""
        wandb = require("wandb", "wandb")
        where = {"project": self.project, "entity": self.entity, "group": self.group, "tags": self.tags, "mode": self.mode}
        identity = {"id": run_id(run.folder / "wandb.id"), "name": self.name or run.name, "resume": "allow"}
        begun = wandb.init(dir=run.folder, **where, **identity)
        begun.config.update(dict(run.config), allow_val_change=True)  # a resumed run may be given more steps

        def log(numbers: dict[str, float], vectors: dict[str, list[float]], step: int) -> None:
            if step >= begun.step:  # W&B takes steps in order: what is repeated after a crash it has already
                begun.log({**numbers, **{name: wandb.Histogram(x) for name, x in vectors.items()}}, step=step)

        return Tracker(log, lambda ended: begun.finish(exit_code=0 if ended else 1))
