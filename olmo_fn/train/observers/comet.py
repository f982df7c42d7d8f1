"""Comet. A resumed run goes on in the same experiment, whose key is in ``FOLDER/comet.id``."""

from __future__ import annotations

import os
from dataclasses import dataclass

from olmo_fn.train.events import Observer, RunInfo
from olmo_fn.train.observers.shared import Switch, Tracker, require, run_id

AUTOMATIC = ("log_code", "log_graph", "log_git_metadata", "log_git_patch", "log_env_details", "parse_args")
"""What Comet would send by itself, such as all packages of the machine, and is told not to."""


@dataclass(frozen=True)
class Comet:
    """Comet (extra comet)."""

    on: Switch = False
    """Send the run to Comet; --observe.comet turns it on."""
    project: str = "olmo-fn"
    """Project of the experiment."""
    workspace: str | None = None
    """Workspace of the project; your default one when not given."""
    name: str | None = None
    """Name of the experiment; that of the run's folder when not given."""
    tags: tuple[str, ...] = ()
    """Tags of the experiment."""
    offline: bool = False
    """Send nothing; when the run ends write an archive into FOLDER/comet, for `comet upload`."""

    def build(self, run: RunInfo) -> Observer:
        """Begin the experiment, or go on with it. ValueError without an API key, unless it is offline."""
        os.environ.setdefault("COMET_DISABLE_AUTO_LOGGING", "1")  # its import would hook into torch
        comet = require("comet_ml", "comet")
        if not self.offline and not comet.get_config("comet.api_key"):
            raise ValueError("--observe.comet: there is no API key; set COMET_API_KEY, or add --observe.comet.offline")
        settings = comet.ExperimentConfig(
            name=self.name or run.name,
            tags=list(self.tags),
            offline_directory=str(run.folder / "comet"),
            display_summary_level=0,
            auto_output_logging=False,
            **dict.fromkeys(AUTOMATIC, False),
        )
        identity = {"experiment_key": run_id(run.folder / "comet.id"), "mode": "get_or_create", "online": not self.offline}
        begun = comet.start(workspace=self.workspace, project_name=self.project, experiment_config=settings, **identity)
        begun.log_parameters(dict(run.config))

        def log(numbers: dict[str, float], vectors: dict[str, list[float]], step: int) -> None:
            begun.log_metrics(numbers, step=step)
            for name, vector in vectors.items():
                begun.log_histogram_3d(vector, name=name, step=step)

        return Tracker(log, lambda ended: begun.end())
