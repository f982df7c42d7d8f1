"""Rules: which mesh axis each logical axis of a parameter is sharded over, at rest and in use; and the plan they make.

A plan is pure data, made without devices: it is what initialisation, checkpoints, gathering and the dry run read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from olmo_fn import tree
from olmo_fn.mesh.axis import CPMethod, chunk
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.spec import Box, Spec
from olmo_fn.tree import Tree

TENSOR = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, for parameters at rest (``store``) and in use.

    FSDP is that the two differ: an axis stored over ``fsdp`` is gathered for use. ``keep_gathered``: from the forward sweep
    to the backward one (ZeRO-2) instead of gathering twice (ZeRO-3). Logical axes that are not named stay whole.
    """

    store: Mapping[str, str] = field(default_factory=lambda: {"embed": "fsdp", **TENSOR})
    use: Mapping[str, str] = field(default_factory=lambda: dict(TENSOR))
    keep_gathered: bool = False
    cp_method: CPMethod = "gather"


DEFAULT = Rules()


class Placed(NamedTuple):
    """One parameter on a mesh: its whole shape, and the dim of it that each mesh axis shards, or None."""

    shape: tuple[int, ...]
    fsdp: int | None
    tp: int | None

    def box(self, fsdp: tuple[int, int], tp: tuple[int, int]) -> Box:
        """Offset and shape of the part at ``(index, size)`` of the two axes. Chunks are ceil-sized, the last smaller.

        >>> Placed((5, 4), 0, 1).box(fsdp=(1, 2), tp=(0, 2))
        Box(offset=(3, 0), shape=(2, 2))
        """
        offset, shape = [0] * len(self.shape), list(self.shape)
        for dim, (index, size) in ((self.fsdp, fsdp), (self.tp, tp)):
            if dim is not None:
                offset[dim], shape[dim] = chunk(self.shape[dim], index, size)
        return Box(tuple(offset), tuple(shape))


def plan(specs: Tree, rules: Rules, mesh: Mesh) -> dict[str, Placed]:
    """How each parameter lies on the mesh; ValueError, with its name, where the rules make no sense for it.

    >>> from olmo_fn.spec import Init
    >>> plan({"w": Spec((8, 6), ("embed", "heads"), Init("ones"))}, DEFAULT, Mesh(dp_shard=2, tp=2))
    {'w': Placed(shape=(8, 6), fsdp=0, tp=1)}
    """
    known = {axis for _, spec in tree.items(specs) for axis in spec.axes}
    for table in (rules.store, rules.use):
        for logical, axis in table.items():
            if axis not in ("fsdp", "tp"):
                raise ValueError(f"a rule shards {logical!r} over {axis!r}; parameters are sharded over 'fsdp' or 'tp'")
            if logical not in known and logical not in DEFAULT.store:
                raise ValueError(f"a rule names the logical axis {logical!r}; the parameters have {', '.join(sorted(known))}")
    for logical in known & {*TENSOR}:
        if mesh.tp > 1 and rules.use.get(logical) != "tp":
            raise ValueError(
                f"--mesh.tp is {mesh.tp}, but the rules do not use {logical!r} over 'tp', so that each of its ranks would add "
                f"the same; store and use {logical!r} over 'tp', or leave --mesh.tp at 1"
            )
    return {path: _place(path, spec, rules, mesh) for path, spec in tree.items(specs)}


def _place(path: str, spec: Spec, rules: Rules, mesh: Mesh) -> Placed:
    found: dict[str, int] = {}
    for dim, logical in enumerate(spec.axes):
        stored, used = rules.store.get(logical), rules.use.get(logical)
        if used not in (None, stored):
            raise ValueError(f"{path}: {logical!r} is used over {used!r}, but stored over {stored!r}; store it as it is used")
        if stored == "tp" and used != "tp":
            raise ValueError(f"{path}: {logical!r} is stored over 'tp' and not used so; only 'fsdp' is gathered for use")
        if stored is None:
            continue
        if stored in found:
            first = spec.axes[found[stored]]
            raise ValueError(
                f"{path}: both {first!r} and {logical!r} are stored over {stored!r}; give one of them another axis"
            )
        found[stored] = dim
    return Placed(spec.shape, found.get("fsdp"), found.get("tp"))


def table(placed: Mapping[str, Placed], mesh: Mesh) -> str:
    """The plan in words: a line for each kind of parameter, alike blocks together."""
    lines: dict[tuple[str, Placed], int] = {}
    for path, place in placed.items():
        name = ".".join("*" if part.isdecimal() else part for part in path.split("."))
        lines[name, place] = lines.get((name, place), 0) + 1
    rows = [("parameter", "whole", "on a rank", "sharded")]
    for (name, place), many in lines.items():
        _, local = place.box((0, mesh.degree("fsdp")), (0, mesh.tp))
        over = [f"dim {dim} over {axis}" for axis, dim in (("fsdp", place.fsdp), ("tp", place.tp)) if dim is not None]
        times = f"{name}  x {many}" if many > 1 else name
        rows.append((times, " x ".join(map(str, place.shape)), " x ".join(map(str, local)), ", ".join(over) or "whole"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows)
