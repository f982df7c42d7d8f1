"""A mesh axis as one rank sees it: what a stage needs to know to talk to the others. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

CPMethod: TypeAlias = Literal["gather", "ulysses", "ring"]
"""How attention sees other ranks' keys and values: all gathered; heads instead of positions exchanged; or passed on."""

ReduceDtype: TypeAlias = Literal["float32", "bfloat16"]
"""In what gradients are summed over ranks: at least fp32, or bf16, which is half as many bytes and other numbers."""


@dataclass(frozen=True)
class Axis:
    """``size`` ranks, of which this one is number ``index``. Hashable, and a constant under ``torch.compile``.

    ``group`` is the registered name of the process group, which the collectives take; empty where the size is 1.
    ``coalesces``: its backend, NCCL, takes several collectives as one. ``overlapped``: products next to its collectives begin
    with what has arrived (`olmo_fn.nn.async_tp`).
    ``channels``, which only ``pp`` has, are names of groups of two for sends to the neighbours: number ``i`` for what index
    ``i`` sends to the next one, ``size + i`` for what it sends to the one before; empty where this rank is no end.
    """

    name: str = ""
    size: int = 1
    index: int = 0
    group: str = ""
    channels: tuple[str, ...] = ()
    coalesces: bool = False
    overlapped: bool = False


@dataclass(frozen=True)
class Axes:
    """Every axis of a rank: those of the mesh, and those flattened from them (`olmo_fn.mesh.mesh.FLATTENED`); and how
    attention uses ``cp``.
    """

    pp: Axis = Axis()
    dp_replicate: Axis = Axis()
    dp_shard: Axis = Axis()
    cp: Axis = Axis()
    tp: Axis = Axis()
    fsdp: Axis = Axis()
    ep: Axis = Axis()
    edp: Axis = Axis()
    dp_outer: Axis = Axis()
    data: Axis = Axis()
    tokens: Axis = Axis()
    world: Axis = Axis()
    cp_method: CPMethod = "gather"


NAMES = tuple(field.name for field in fields(Axes) if isinstance(field.default, Axis))
"""The names of all axes."""

SINGLE_DEVICE = Axes()
"""One process: every axis has size 1, and every collective over it is the identity."""


def chunk(length: int, index: int, size: int) -> tuple[int, int]:
    """Offset and length of chunk ``index`` of ``size``: all as long as the first, but the last, which may be empty.

    >>> [chunk(5, i, 4) for i in range(4)]
    [(0, 2), (2, 2), (4, 1), (5, 0)]
    """
    width = -(-length // size)
    start = min(index * width, length)
    return start, min(width, length - start)
