"""A mesh axis as one rank sees it: what a stage needs to know to talk to the others. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """``size`` ranks, of which this one is number ``index``. Hashable, and a constant under ``torch.compile``.

    ``group`` is the registered name of the process group, which the collectives take; empty where the size is 1.
    """

    name: str = ""
    size: int = 1
    index: int = 0
    group: str = ""


@dataclass(frozen=True)
class Axes:
    """Every axis of a rank: the five of the mesh, and those flattened from them (`olmo_fn.parallel.mesh.FLATTENED`)."""

    pp: Axis = Axis()
    dp_replicate: Axis = Axis()
    dp_shard: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    fsdp: Axis = Axis()
    data: Axis = Axis()
    tokens: Axis = Axis()
    world: Axis = Axis()


ALONE = Axes()
"""One process: every axis has size 1, and every collective over it is the identity."""
