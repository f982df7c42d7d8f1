"""Layouts as bars of memory by purpose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from olmo_fn.picture import figure
from olmo_fn.planner.estimate import RESERVED, Estimate
from olmo_fn.planner.fit import GIB
from olmo_fn.planner.memory import PURPOSES
from olmo_fn.planner.plan_input import flags
from olmo_fn.train.config import Config


def draw(found: Sequence[Estimate], base: Config, path: Path) -> Path:
    """Draw the largest moment of every layout into a PNG, with the flags beside ``base``. ValueError without matplotlib."""
    page, axes = figure(11, 1.2 + 0.6 * len(found))
    left, rows = [0.0] * len(found), range(len(found))
    for purpose in PURPOSES:
        sizes = [one.largest.memory[purpose] / GIB for one in found]
        if any(sizes):
            axes.barh(rows, sizes, left=left, label=purpose)
        left = [a + b for a, b in zip(left, sizes, strict=True)]
    gpu = found[0].gpu
    axes.axvline(
        (gpu.memory - RESERVED) / GIB,
        color="black",
        linestyle="--",
        label=f"{gpu.name}, less {RESERVED / GIB:.1f} GiB for the system",
    )
    words = [flags(one.plan.cfg, base).replace("--mesh.", "").replace("--recipe.", "") for one in found]
    speeds = [f"{one.clock.tokens:,.0f} tokens/s a device" for one in found]
    axes.set_yticks(rows, [f"{text}\n{speed}" for text, speed in zip(words, speeds, strict=True)])
    axes.invert_yaxis()
    axes.set_xlabel("GiB a rank at the largest moment of a step")
    axes.legend(fontsize=7, ncols=5, loc="lower center", bbox_to_anchor=(0.4, 1.0))
    page.savefig(path, dpi=120)
    return path
