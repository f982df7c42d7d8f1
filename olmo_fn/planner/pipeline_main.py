"""``python -m olmo_fn.planner.pipeline_main 1f1b --ranks 4 --microbatches 8``: a pipeline schedule, drawn and counted."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from olmo_fn.parallel.pipeline.schedule import Kind, schedule
from olmo_fn.planner.pipeline_picture import draw, summary, text
from olmo_fn.planner.pipeline_simulate import Costs, simulate


@dataclass(frozen=True)
class Show:
    """Draw a pipeline schedule; say how long its ranks wait and how many micro-batches they keep."""

    kind: tyro.conf.Positional[Kind]
    """The schedule."""
    ranks: int = 4
    """Ranks of the pipeline."""
    microbatches: int = 8
    """Micro-batches of a step."""
    chunks: Annotated[int | None, tyro.conf.arg(metavar="INT")] = None
    """Chunks of the model on each rank; 2 for interleaved and 1 for others when not given."""
    output: Path | None = None
    """Write a picture here, as PNG."""
    costs: Costs = field(default_factory=Costs)
    """How long things take."""


def show(args: Show) -> None:
    """Print the schedule, and write the picture if one is asked for."""
    chunks = args.chunks if args.chunks is not None else 2 if args.kind == "interleaved" else 1
    timeline = simulate(schedule(args.kind, args.ranks, args.microbatches, chunks), args.costs)
    print(text(timeline, shutil.get_terminal_size((120, 24)).columns))
    print()
    print(summary(timeline))
    if args.output is not None:
        per_rank = f", {chunks} chunks a rank" if chunks > 1 else ""
        draw(timeline, args.output, f"{args.kind}: {args.ranks} ranks, {args.microbatches} micro-batches{per_rank}")
        print(f"\n{args.output}")


def main(argv: list[str] | None = None) -> int:
    """0; 2 for what cannot be done, told in one line."""
    args = tyro.cli(Show, prog="python -m olmo_fn.planner.pipeline_main", args=argv)
    try:
        show(args)
    except BrokenPipeError:  # whoever read the text has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
