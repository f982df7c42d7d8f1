"""What routers report, as people read it: how even the loads of experts are, and a picture of them over a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from olmo_fn.picture import figure
from olmo_fn.train.observers.jsonl import read_metrics

PREFIX = "load/"
MOST = 8  # layers in the picture


def with_loads(values: dict[str, Any], every_layer: bool) -> dict[str, Any]:
    """A step's metrics with those of its routers, if it has any; ``every_layer``: the loads of all experts too.

    - ``load_excess``: the largest load of an expert in any layer, less the even one and over it; 0 is even
    - ``router_entropy``: of a token's scores, in nats, the mean over tokens and layers; log(experts) is undecided
    - ``dropped``: the share of choices that no expert had room for
    - ``load/3``: the share of the choices of layer 3 that went to each expert

    >>> with_loads({"loss": 2.0, "load/0": [6.0, 2.0], "routed": 4.0, "router_entropy": 2.0, "dropped": 2.0}, True)
    {'loss': 2.0, 'load_excess': 0.5, 'router_entropy': 0.5, 'dropped': 0.25, 'load/0': [0.75, 0.25]}
    """
    loads = {name: load for name, load in values.items() if name.startswith(PREFIX)}
    if not loads:
        return values
    own = {*loads, "routed", "router_entropy", "dropped"}
    found = {name: value for name, value in values.items() if name not in own}
    found["load_excess"] = round(max(max(load) * len(load) / sum(load) for load in loads.values()) - 1, 4)
    found["router_entropy"] = values["router_entropy"] / values["routed"]
    found["dropped"] = values["dropped"] / sum(map(sum, loads.values()))
    shares = {name: [round(n / sum(load), 5) for n in load] for name, load in loads.items()} if every_layer else {}
    return found | shares


def plot_loads(folder: Path) -> Path | None:
    """Draw ``experts.png`` out of ``metrics.jsonl``: the load of every expert over the steps, of up to eight layers, and above
    them the largest one. None without matplotlib (extra ``plot``), or without experts.
    """
    lines = read_metrics(folder / "metrics.jsonl", "load_excess")
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
