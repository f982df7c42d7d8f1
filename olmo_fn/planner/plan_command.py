"""The best layouts of a number of accelerators: ``olmo-fn plan olmo2-32b --gpus 1024 --gpu h100``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from olmo_fn.train.config import Config


@dataclass(frozen=True)
class Plan:
    """Search the layouts of a run on a number of accelerators, and print the best with the flags to type."""

    preset: tyro.conf.Positional[str]
    """A preset, or the config.yaml of a run."""
    gpus: int
    """How many accelerators there are."""
    gpu: Literal["a100", "h100", "h200", "b200", "mi300x"] = "h100"
    """Which; eight to a machine."""
    best: int = 5
    """How many layouts to print."""
    batch_size: Annotated[int, tyro.conf.arg(name="batch-size")] = 0
    """Sequences a step; 0: the preset's."""
    sequence_length: Annotated[int, tyro.conf.arg(name="sequence-length")] = 0
    """Tokens a sequence; 0: the preset's."""
    picture: str = ""
    """Draw the memory of the layouts here, a PNG; needs the extra plot."""


def run(args: Plan, presets: Mapping[str, Config]) -> str:
    """The table, and where the picture is. ValueError for what cannot be planned."""
    from rich.console import Console
    from rich.progress import Progress

    from olmo_fn.planner import tables
    from olmo_fn.planner.picture import draw
    from olmo_fn.planner.search import search
    from olmo_fn.train.folder import read_config

    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: at least 1 is needed")
    if args.preset not in presets and not Path(args.preset).exists():
        raise ValueError(f"{args.preset!r} is neither a preset nor a config.yaml; there are {', '.join(presets)}")
    base = presets[args.preset] if args.preset in presets else read_config(Path(args.preset))
    r = base.recipe
    r = replace(r, batch_size=args.batch_size or r.batch_size, sequence_length=args.sequence_length or r.sequence_length)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("layouts", total=1.0)
        found = search(
            replace(base, gpu=args.gpu, gpus=args.gpus, recipe=replace(r, accumulate=1)),
            args.gpus,
            args.best,
            lambda words, part: progress.update(task, description=words, completed=part),
        )
    heading = f"{args.gpus:,} x {found[0].gpu.name}, {r.batch_size} sequences of {r.sequence_length:,}"
    picture = f"\n{draw(found, base, Path(args.picture))}" if args.picture else ""
    return f"{heading}\n{tables.ranking(found, base)}{picture}"
