"""Placement: over which mesh axes each parameter is sharded, at rest and in use, by rules for its logical axes.

It is pure data, made without devices: what initialisation, checkpoints, gathering and the dry run read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

from olmo_fn import tree
from olmo_fn.mesh.axis import CPMethod, ReduceDtype, chunk
from olmo_fn.mesh.mesh import AXES, FLATTENED, Mesh, members
from olmo_fn.spec import Box, Spec
from olmo_fn.tree import Tree

TENSOR = {"heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp"}
EXPERTS = {"experts": "ep"}
TOKENS = members("tokens")
"""The axes whose ranks have different tokens."""


@dataclass(frozen=True)
class Rules:
    """Logical axis -> mesh axis, for parameters at rest (``store``) and in use.

    FSDP is that the two differ: an axis stored over ``fsdp`` is gathered for use. ``keep_gathered``: from the forward sweep
    to the backward one (ZeRO-2) instead of gathering twice (ZeRO-3). Logical axes that are not named stay whole.

    A logical axis may be stored and used over ``ep`` (or ``dp_shard``, or ``cp``) itself: its parts stay on ranks that have
    different tokens, and the sublayer brings tokens and parts together (experts). What else of the parameter is stored over
    ``fsdp`` is then stored over the rest of it, if there is any.
    """

    store: Mapping[str, str] = field(default_factory=lambda: {"embed": "fsdp", **TENSOR, **EXPERTS})
    use: Mapping[str, str] = field(default_factory=lambda: {**TENSOR, **EXPERTS})
    keep_gathered: bool = False
    cp_method: CPMethod = "gather"
    prefetch: int = 1
    """Segments whose weights are on their way while one computes."""
    exchanged: tuple[str, ...] = ()
    """Paths of tables that stay where they lie while they are used, though they are stored over ``fsdp``: the rows that are
    looked up go from rank to rank (`olmo_fn.nn.embedding`), and the table does not."""
    reduce_dtype: ReduceDtype = "float32"
    async_tp: bool = False
    """Over ``tp``, products take in and give away their parts while they compute (`olmo_fn.nn.async_tp`); on NVLink only."""


DEFAULT = Rules()


class Placed(NamedTuple):
    """One parameter on a mesh: its whole shape, and the dim that each mesh axis shards, at rest and of these in use.

    >>> Placed((5, 4), (("fsdp", 0), ("tp", 1)), ("tp",)).gathered
    ('fsdp',)
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[str, int], ...] = ()
    used: tuple[str, ...] = ()

    def dim(self, axis: str) -> int | None:
        """The dim that ``axis`` shards at rest, or None."""
        return dict(self.dims).get(axis)

    @property
    def gathered(self) -> tuple[str, ...]:
        """The axes over which it is gathered for use, and its gradient is scattered."""
        return tuple(axis for axis, _ in self.dims if axis not in self.used)

    @property
    def summed(self) -> tuple[str, ...]:
        """The axes, of `TOKENS`, over which its gradient is summed: those with different tokens, less those that shard it.

        >>> Placed((8,), (("fsdp", 0),)).summed, Placed((8,), (("ep", 0),), ("ep",)).summed
        (('dp_replicate',), ('dp_replicate', 'dp_outer', 'cp'))
        """
        sharding = {name for axis, _ in self.dims for name in members(axis)}
        return tuple(axis for axis in TOKENS if axis not in sharding)

    @property
    def at_rest(self) -> tuple[str, ...]:
        """The dims of the device mesh on which it lies: the axes of a pipeline stage."""
        over = {axis for axis, _ in self.dims}
        if over & {"ep", "edp"}:
            return ("dp_replicate", "ep", "edp", "tp")
        return AXES[1:] if over & {"dp_shard", "cp"} else ("dp_replicate", "fsdp", "tp")

    def box(self, where: Mapping[str, tuple[int, int]]) -> Box:
        """Offset and shape of the part at ``(index, size)`` of each axis. Chunks are ceil-sized, the last smaller.

        >>> Placed((5, 4), (("fsdp", 0), ("tp", 1))).box({"fsdp": (1, 2), "tp": (0, 2)})
        Box(offset=(3, 0), shape=(2, 2))
        """
        offset, shape = [0] * len(self.shape), list(self.shape)
        for axis, dim in self.dims:
            offset[dim], shape[dim] = chunk(self.shape[dim], *where[axis])
        return Box(tuple(offset), tuple(shape))

    def copies(self, mesh: Mesh) -> int:
        """How many ranks of a pipeline stage have the same part."""
        return prod(mesh.degree(axis) for axis in AXES[1:]) // prod(mesh.degree(axis) for axis, _ in self.dims)


def placements(specs: Tree, rules: Rules, mesh: Mesh) -> dict[str, Placed]:
    """How each parameter lies on the mesh; ValueError, with its name, where the rules make no sense for it.

    >>> from olmo_fn.spec import Init
    >>> placements({"w": Spec((8, 6), ("embed", "heads"), Init("ones"))}, DEFAULT, Mesh(dp_shard=2, tp=2))
    {'w': Placed(shape=(8, 6), dims=(('fsdp', 0), ('tp', 1)), used=('tp',))}
    """
    known = {axis for _, spec in tree.items(specs) for axis in spec.axes}
    allowed = ("fsdp", "tp", "ep", "dp_shard", "cp")
    for table in (rules.store, rules.use):
        for logical, axis in table.items():
            if axis not in allowed:
                raise ValueError(f"a rule shards {logical!r} over {axis!r}; parameters are sharded over {', '.join(allowed)}")
            if logical not in known and logical not in DEFAULT.store:
                raise ValueError(f"a rule names the logical axis {logical!r}; the parameters have {', '.join(sorted(known))}")
    for logical in known & {*TENSOR}:
        if mesh.tp > 1 and rules.use.get(logical) != "tp":
            raise ValueError(
                f"--mesh.tp is {mesh.tp}, but the rules do not use {logical!r} over 'tp', so that each of its ranks would add "
                f"the same; store and use {logical!r} over 'tp', or leave --mesh.tp at 1"
            )
    store, use = ({k: v for k, v in t.items() if v != "ep" or mesh.ep > 1} for t in (rules.store, rules.use))
    found = {path: _placed(path, spec, store, use) for path, spec in tree.items(specs)}
    for path in rules.exchanged:
        if path not in found or found[path].dim("fsdp") != 1:
            raise ValueError(f"a rule exchanges the rows of {path!r}, which is no table with columns stored over 'fsdp'")
    return found


def _placed(path: str, spec: Spec, store: Mapping[str, str], uses: Mapping[str, str]) -> Placed:
    used = tuple(dict.fromkeys(uses[logical] for logical in spec.axes if logical in uses))
    dims: dict[str, int] = {}
    for dim, logical in enumerate(spec.axes):
        stored, use = store.get(logical), uses.get(logical)
        if use not in (None, stored):
            raise ValueError(f"{path}: {logical!r} is used over {use!r}, but stored over {stored!r}; store it as it is used")
        if stored == "tp" and use != "tp":
            raise ValueError(f"{path}: {logical!r} is stored over 'tp' and not used so; only 'fsdp' is gathered for use")
        if stored is None:
            continue
        if stored == "fsdp" and use is None:  # the rest of it, where a part of it shards the parameter in use
            taken = {name for axis in used for name in members(axis)}
            left = tuple(axis for axis in members("fsdp") if axis not in taken)
            if not left:
                continue
            stored = next((name for name, parts in FLATTENED.items() if parts == left), left[0])
        for axis, other in dims.items():
            if {*members(axis)} & {*members(stored)}:
                over = repr(stored) if axis == stored else f"{axis!r}, which shares ranks with {stored!r}"
                raise ValueError(
                    f"{path}: both {spec.axes[other]!r} and {logical!r} are stored over {over}; give one of them another axis"
                )
        dims[stored] = dim
    placed = Placed(spec.shape, tuple(sorted(dims.items(), key=lambda item: item[0] == "tp")), used)
    if len(placed.gathered) > 1:
        first, second = placed.gathered[:2]
        raise ValueError(f"{path}: it is stored over {first!r} and {second!r} and used over neither; leave one of them out")
    return placed


def rows_are_less(vocab_size: int, d_model: int, tokens: int, ranks: int, gathers: int = 2, item: int = 2) -> bool:
    """Whether to exchange rows takes fewer bytes than to gather a table of ``ranks`` parts, of numbers of ``item`` bytes.

    The table is gathered ``gathers`` times, and its gradient scattered in fp32: V D (gathers item + 4). Of each of the
    ``tokens`` that a rank has meanwhile a row goes each way, and an id of 4 bytes to all: tokens (2 D item + 4 ranks).

    >>> rows_are_less(100352, 4096, tokens=8192, ranks=8), rows_are_less(512, 64, tokens=8192, ranks=8)
    (True, False)
    """
    return tokens * (2 * d_model * item + 4 * ranks) < vocab_size * d_model * (gathers * item + 4)


def table(placed: Mapping[str, Placed], mesh: Mesh) -> str:
    """The placements in words: a line for each kind of parameter, alike blocks together."""
    lines: dict[tuple[str, Placed], int] = {}
    for path, place in placed.items():
        name = ".".join("*" if part.isdecimal() else part for part in path.split("."))
        lines[name, place] = lines.get((name, place), 0) + 1
    rows = [("parameter", "whole", "on a rank", "sharded")]
    for (name, place), count in lines.items():
        _, local = place.box({axis: (0, mesh.degree(axis)) for axis, _ in place.dims})
        over = [f"dim {dim} over {axis}" for axis, dim in place.dims]
        times = f"{name}  x {count}" if count > 1 else name
        rows.append((times, " x ".join(map(str, place.shape)), " x ".join(map(str, local)), ", ".join(over) or "whole"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join("  ".join([*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]]) for row in rows)
