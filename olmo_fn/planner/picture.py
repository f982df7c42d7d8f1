"""Layouts as bars of memory by purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olmo_fn.planner.estimate import RESERVED, Estimate
from olmo_fn.planner.job import flags
from olmo_fn.planner.memory import PURPOSES


def draw(found: Sequence[Estimate], path: Path) -> Path:
    """Draw the largest moment of every layout into a PNG. ValueError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("--picture needs matplotlib: pip install 'olmo-fn[plot]'") from None
    figure = Figure(figsize=(11, 1.2 + 0.6 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = [0.0] * len(found)
    rows = range(len(found))
    for purpose in PURPOSES:
        sizes = [one.largest.memory[purpose] / 2**30 for one in found]
        axes.barh(rows, sizes, left=left, label=purpose)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    gpu = found[0].gpu
    axes.axvline((gpu.memory - RESERVED) / 2**30, color="black", linestyle="--", label="there is")
    words = [flags(one.job).replace("--mesh.", "").replace("--recipe.", "") for one in found]
    axes.set_yticks(
        rows, [f"{text}\n{one.clock.tokens:,.0f} tokens/s a device" for text, one in zip(words, found, strict=True)]
    )
    axes.invert_yaxis()
    axes.set_xlabel(f"GiB a rank at its largest moment, {gpu.name}")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    figure.savefig(path, dpi=120)
    return path
