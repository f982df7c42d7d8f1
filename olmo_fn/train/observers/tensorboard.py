"""TensorBoard: event files in the folder of the run, for ``tensorboard --logdir runs``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import partial
from typing import Any

from olmo_fn.train.events import Evaluated, Event, Observer, RunInfo, Started, Stepped
from olmo_fn.train.observers.shared import Switch, recorded, require


@dataclass(frozen=True)
class TensorBoard:
    """TensorBoard (extra tensorboard)."""

    on: Switch = False
    """Write event files into FOLDER/tensorboard; --observe.tensorboard turns it on."""
    flush_seconds: int = 30
    """Most seconds until a value is in the file."""

    def build(self, run: RunInfo) -> Observer:
        """Import the writer; its file begins with the run."""
        require("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        config = f"```json\n{json.dumps(run.config, indent=2, default=str)}\n```"
        return TensorBoardObserver(partial(SummaryWriter, run.folder / "tensorboard", flush_secs=self.flush_seconds), config)


class TensorBoardObserver(Observer):
    """Writes numbers as scalars and vectors as histograms. When an interrupted run goes on, its later steps are hidden."""

    def __init__(self, open_writer: Any, config: str) -> None:
        self.open_writer, self.config = open_writer, config
        self.writer: Any = None

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            self.writer = self.open_writer(purge_step=event.step + 1 if event.step else None)
            self.writer.add_text("config", self.config, event.step)
        elif isinstance(event, (Stepped, Evaluated)):
            import numpy as np

            numbers, vectors = recorded(event)
            for name, number in numbers.items():
                self.writer.add_scalar(name, number, event.step)
            for name, vector in vectors.items():
                self.writer.add_histogram(name, np.asarray(vector), event.step)

    def close(self) -> None:
        if self.writer:
            self.writer.close()
