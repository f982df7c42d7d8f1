"""A picture of the loads of a run's experts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from olmo_fn.picture import figure
from olmo_fn.train.loads import PREFIX
from olmo_fn.train.observers.jsonl import read_metrics

MOST = 8  # layers in the picture


def plot_loads(folder: Path) -> Path | None:
    """Draw ``experts.png`` out of ``metrics.jsonl``: the load of every expert over the steps, of up to eight layers, and above
    them the largest one. None without matplotlib (extra ``plot``), or without experts.
    """
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "load_excess" in line]
    drawn = [line for line in lines if any(name.startswith(PREFIX) for name in line)]
    if len(drawn) < 2:
        return None
    layers = sorted((name for name in drawn[0] if name.startswith(PREFIX)), key=lambda name: int(name.removeprefix(PREFIX)))
    layers = layers[:: -(-len(layers) // MOST)]
    try:
        page, axes = figure(8, 2 + 1.2 * len(layers), len(layers) + 1, sharex=True, height_ratios=(1.5, *[1] * len(layers)))
    except ValueError:
        return None
    axes[0].plot([line["step"] for line in lines], [1 + line["load_excess"] for line in lines], linewidth=1)
    axes[0].axhline(1, color="gray", linewidth=0.8)
    axes[0].set_ylabel("largest\nover even")
    axes[0].set_title(f"{folder.name}: loads of experts")
    axes[0].grid(alpha=0.3)
    steps = edges([line["step"] for line in drawn])
    for ax, layer in zip(axes[1:], layers, strict=True):
        image = _image(drawn, layer)
        mesh = ax.pcolormesh(steps, range(len(image) + 1), image, vmin=0, vmax=2, cmap="RdBu_r", rasterized=True)
        ax.set_ylabel(f"layer {layer.removeprefix(PREFIX)}")
        ax.set_yticks([])
    axes[-1].set_xlabel("step")
    page.colorbar(mesh, ax=list(axes[1:]), label="times the even load", extend="max", shrink=min(1.0, 4 / len(layers)))
    output = folder / "experts.png"
    page.savefig(output, dpi=150)
    return output


def edges(steps: Sequence[float]) -> list[float]:
    """Where the columns of a picture begin and end, each around its step.

    >>> edges([10.0, 20.0, 40.0])
    [5.0, 15.0, 30.0, 50.0]
    """
    between = [(a + b) / 2 for a, b in pairwise(steps)]
    return [steps[0] - (between[0] - steps[0]), *between, steps[-1] + (steps[-1] - between[-1])]


def _image(lines: Sequence[Mapping[str, Any]], layer: str) -> list[list[float]]:
    """A row an expert, a column a step: loads over the even one."""
    E = len(lines[0][layer])
    return [[E * line[layer][e] for line in lines] for e in range(E)]
