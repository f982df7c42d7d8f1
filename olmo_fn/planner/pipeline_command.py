"""``olmo-fn pipeline 1f1b --ranks 4 --microbatches 8``: a pipeline schedule, drawn and counted. Imports no torch."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from olmo_fn.fields import Range
from olmo_fn.parallel.pipeline.schedule import Kind, schedule
from olmo_fn.planner.pipeline_picture import draw, summary, text
from olmo_fn.planner.pipeline_simulate import Costs, simulate

MOST = 20_000  # pieces of work, forward ones alone


@dataclass(frozen=True)
class Show:
    """Draw a pipeline schedule; say how long its ranks wait and how many micro-batches they keep."""

    kind: tyro.conf.Positional[Kind]
    """The schedule."""
    ranks: Annotated[int, Range(1, 4096)] = 4
    """Ranks of the pipeline."""
    microbatches: Annotated[int, Range(1, 1 << 16)] = 8
    """Micro-batches of a step."""
    chunks: Annotated[int | None, Range(1, 4096), tyro.conf.arg(metavar="INT")] = None
    """Chunks of the model on each rank; 2 for interleaved and 1 for others when not given."""
    output: Path | None = None
    """Write a picture here, as PNG."""
    costs: Costs = field(default_factory=Costs)
    """How long things take."""


def run(args: Show) -> str:
    """The schedule and its summary; writes the picture if one is asked for. ValueError for what cannot be."""
    chunks = args.chunks if args.chunks is not None else 2 if args.kind == "interleaved" else 1
    if (size := args.ranks * args.microbatches * chunks) > MOST:
        raise ValueError(
            f"--ranks {args.ranks} x --microbatches {args.microbatches} x {chunks} chunks are {size:,} pieces of work; "
            f"draw at most {MOST:,}"
        )
    timeline = simulate(schedule(args.kind, args.ranks, args.microbatches, chunks), args.costs)
    words = f"{text(timeline, shutil.get_terminal_size((120, 24)).columns)}\n\n{summary(timeline)}"
    if args.output is None:
        return words
    per_rank = f", {chunks} chunks a rank" if chunks > 1 else ""
    draw(timeline, args.output, f"{args.kind}: {args.ranks} ranks, {args.microbatches} micro-batches{per_rank}")
    return f"{words}\n\n{args.output}"
