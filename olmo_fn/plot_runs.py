"""Several runs in one picture: ``olmo-fn plot runs runs/dense runs/experts -o runs.png``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from olmo_fn.picture import figure
from olmo_fn.plot import THOUSANDS, Words, centred_mean, save
from olmo_fn.train.observers.jsonl import read_evaluations, read_metrics


@dataclass(frozen=True)
class PlotRuns:
    """Draw the cross entropies of several runs, smoothed, and their held-out ones, in one picture."""

    runs: Words = ()
    """Folders of runs."""
    over: Literal["tokens", "steps", "flops"] = "tokens"
    """What is along the picture: tokens, steps, or the floating-point operations of training."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("runs.png")
    """Where the picture goes."""


def draw_runs(args: PlotRuns) -> Path:
    """The command ``plot runs``: the picture's path. ValueError for no run, or one without steps."""
    if not args.runs:
        raise ValueError("name the folders of runs, such as runs/a runs/b")
    page, axes = figure(8, 5)
    for i, run in enumerate(map(Path, args.runs)):
        lines = read_metrics(run / "metrics.jsonl", "loss", "tokens")
        if not lines:
            raise ValueError(f"{run} has no step in metrics.jsonl, which a run writes")
        unit = unit_of(run, args.over)
        at = {line["step"]: unit * line["step" if args.over == "steps" else "tokens"] for line in lines}
        losses = [line.get("ce", line["loss"]) for line in lines]
        wide, color = max(2, len(lines) // 50), f"C{i % 10}"
        heldout = {at[one["step"]]: one["loss"] for one in read_evaluations(run / "metrics.jsonl") if one["step"] in at}
        last = f", held-out {list(heldout.values())[-1]:.3f}" if heldout else ""
        axes.plot([*at.values()], centred_mean(losses, wide), color=color, linewidth=1.2, label=f"{run.name}{last}")
        axes.plot([*heldout], [*heldout.values()], "o", color=color, markersize=5)
        first = losses[min(wide, len(losses) - 1)]
        axes.set_ylim(top=max(first, axes.get_ylim()[1] if i else first))
    axes.set_xlabel({"tokens": "tokens", "steps": "step", "flops": "FLOPs of training"}[args.over])
    axes.set_ylabel("cross entropy (nats a token)")
    if args.over != "flops":
        axes.xaxis.set_major_formatter(THOUSANDS)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    save(page, args.output)
    return args.output


def unit_of(run: Path, over: str) -> float:
    """What a step, or a token, counts along the picture."""
    if over != "flops":
        return 1.0
    from olmo_fn.models.count import flops_per_token  # these need torch, and the help does not
    from olmo_fn.train.folder import read_config

    cfg = read_config(run)
    return flops_per_token(cfg.model, cfg.recipe.sequence_length)
