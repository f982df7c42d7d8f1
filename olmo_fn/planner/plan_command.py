"""The best layouts of a number of accelerators: ``olmo-fn plan olmo2-32b --gpus 1024 --gpu h100``."""

from __future__ import annotations

import sys
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
    """The table, and where the picture is."""
    from olmo_fn.planner import tables
    from olmo_fn.planner.search import search

    if args.gpus < 1:
        raise ValueError(f"--gpus {args.gpus}: at least 1 is needed")
    if args.preset in presets:
        cfg = presets[args.preset]
    elif Path(args.preset).exists():
        from olmo_fn.train.folder import read_config

        cfg = read_config(Path(args.preset))
    else:
        raise ValueError(f"{args.preset!r} is neither a preset nor a config.yaml; there are {', '.join(presets)}")
    r = cfg.recipe
    r = replace(r, batch_size=args.batch_size or r.batch_size, sequence_length=args.sequence_length or r.sequence_length)
    cfg = replace(cfg, gpu=args.gpu, gpus=args.gpus, recipe=replace(r, accumulate=1))
    found = search(cfg, args.gpus, args.best, _progress)
    text = f"{args.gpus:,} x {found[0].gpu.name}, {r.batch_size} sequences of {r.sequence_length:,}\n{tables.ranking(found)}"
    if args.picture:
        from olmo_fn.planner.picture import draw

        text += f"\n{draw(found, Path(args.picture))}"
    return text


def _progress(words: str, part: float) -> None:
    """One line that is written over, on a terminal only."""
    if sys.stderr.isatty():
        bar = f"[{'#' * round(30 * part):<30}] {words}" if part < 1 else ""
        print(f"\r\033[K{bar}", end="", file=sys.stderr, flush=True)
