"""The best layouts of a number of accelerators: ``olmo-fn plan olmo2-32b --gpus 1024 --gpu h100``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal

import tyro

from olmo_fn.fields import PATH, Range
from olmo_fn.train.config import Config


@dataclass(frozen=True)
class Plan:
    """Search the layouts of a run on a number of accelerators, and print the best with the flags to type."""

    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")] = ""
    """A preset, or the config.yaml of a run."""
    gpus: Annotated[int, Range(0, 1 << 18)] = 0
    """How many accelerators there are."""
    gpu: Literal["a100", "h100", "h200", "b200", "mi300x"] = "h100"
    """Which; eight to a machine."""
    best: Annotated[int, Range(1, 100)] = 5
    """How many layouts to print."""
    batch_size: Annotated[int, Range(0, 1 << 24), tyro.conf.arg(name="batch-size")] = 0
    """Sequences a step; 0: the preset's."""
    sequence_length: Annotated[int, Range(0, 1 << 24), tyro.conf.arg(name="sequence-length")] = 0
    """Tokens a sequence; 0: the preset's."""
    skew: Annotated[float, Range(1, 1 << 16)] = 1.0
    """Where processes share experts, plan the one that has so many times the even number of tokens for its experts."""
    picture: Annotated[str, PATH] = ""
    """Draw the memory of the layouts here, a PNG; needs the extra plot."""
    published: bool = False
    """Only: what others have published of their speed, beside what the clock says of their programs, and of this one."""


def run(args: Plan, presets: Mapping[str, Config]) -> str:
    """The table, and where the picture is. ValueError for what cannot be planned."""
    from rich.console import Console
    from rich.progress import Progress

    from olmo_fn.planner import published, tables
    from olmo_fn.planner.picture import draw
    from olmo_fn.planner.search import search
    from olmo_fn.train.folder import read_config

    if args.published:
        return published.report()
    if not args.preset or not args.gpus:
        raise ValueError("what is to be planned? Type a preset and --gpus, as in: olmo-fn plan olmo2-7b --gpus 64")
    if args.preset not in presets and not Path(args.preset).exists():
        hint = f"; did you mean {close[0]}?" if (close := get_close_matches(args.preset, presets, 1)) else ""
        raise ValueError(f"{args.preset!r} is neither a preset nor a config.yaml{hint or '; olmo-fn train --help lists them'}")
    base = presets[args.preset] if args.preset in presets else read_config(Path(args.preset))
    r = base.recipe
    r = replace(r, batch_size=args.batch_size or r.batch_size, sequence_length=args.sequence_length or r.sequence_length)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("layouts", total=1.0)
        found = search(
            replace(base, gpu=args.gpu, gpus=args.gpus, skew=args.skew, recipe=replace(r, accumulate=1)),
            args.gpus,
            args.best,
            lambda words, part: progress.update(task, description=words, completed=part),
        )
    heading = f"{args.gpus:,} x {found[0].gpu.name}, {r.batch_size} sequences of {r.sequence_length:,}"
    picture = f"\n{draw(found, base, Path(args.picture))}" if args.picture else ""
    return f"{heading}\n{tables.ranking(found, base)}{picture}"
