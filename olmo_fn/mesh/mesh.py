"""The mesh on paper: its degrees, and which ranks stand on which axis. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The degrees whose product is the world, outermost first: ranks that are neighbours on ``tp`` are neighbours in number, and so
on one machine."""

FINEST = ("pp", "dp_replicate", "dp_outer", "ep", "cp", "tp")
"""What the axes are made of: ``ep`` is the inner part of ``dp_shard``, whose ranks share the experts, ``dp_outer`` the rest."""

FLATTENED: dict[str, tuple[str, ...]] = {
    "dp_shard": ("dp_outer", "ep"),
    "edp": ("dp_outer", "cp"),
    "fsdp": ("dp_outer", "ep", "cp"),
    "data": ("dp_replicate", "dp_outer", "ep"),
    "tokens": ("dp_replicate", "dp_outer", "ep", "cp"),
    "world": FINEST,
}
"""Axes made of several: ``fsdp``, which parameters at rest are sharded over, and ``edp``, what of it is left to experts, which
are sharded over ``ep`` already; ``data``, the ranks with different sequences; ``tokens``, the ranks with different tokens,
which gradients are summed over; ``world``."""


def members(axis: str) -> tuple[str, ...]:
    """What an axis is made of, of `FINEST`: itself, if it is one of them.

    >>> members("fsdp"), members("tp")
    (('dp_outer', 'ep', 'cp'), ('tp',))
    """
    return FLATTENED.get(axis, (axis,))


@dataclass(frozen=True)
class Mesh:
    """Degrees of parallelism, outermost first; their product is the number of processes. ``ep`` of the ``dp_shard`` ranks share
    the experts, each with its own tokens, and divides it.

    >>> mesh = Mesh(dp_shard=2, tp=2)
    >>> mesh.size, mesh.coordinates(2)
    (4, {'pp': 0, 'dp_replicate': 0, 'dp_shard': 1, 'cp': 0, 'tp': 0})
    >>> mesh.ranks(("dp_shard",), 3), mesh.ranks(("tp",), 3)
    ((1, 3), (2, 3))
    """

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        for axis in (*AXES, "ep"):
            if getattr(self, axis) < 1:
                raise ValueError(f"{flag(axis)} is {getattr(self, axis)}; it must be at least 1")
        if self.dp_shard % self.ep:
            fits = ", ".join(str(d) for d in range(1, self.dp_shard + 1) if self.dp_shard % d == 0)
            raise ValueError(
                f"{flag('ep')} {self.ep} does not divide {flag('dp_shard')} {self.dp_shard}, of whose ranks it is; "
                f"choose {fits}"
            )

    @property
    def dp_outer(self) -> int:
        """Ranks of ``dp_shard`` that have the same experts."""
        return self.dp_shard // self.ep

    @property
    def size(self) -> int:
        """The number of processes."""
        return prod(getattr(self, axis) for axis in AXES)

    @property
    def degrees(self) -> dict[str, int]:
        """The degrees by name, outermost first, of which the product is the size; and ``ep`` behind them, if it is not 1."""
        return {axis: getattr(self, axis) for axis in AXES} | ({"ep": self.ep} if self.ep > 1 else {})

    def degree(self, axis: str) -> int:
        """Ranks on an axis, a flattened one perhaps.

        >>> Mesh(dp_shard=4, cp=2).degree("fsdp")
        8
        """
        return prod(getattr(self, name) for name in members(axis))

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where ``rank`` stands on each axis."""
        assert 0 <= rank < self.size, f"rank {rank} of {self.size}"
        found: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, found[axis] = divmod(rank, getattr(self, axis))
        return {axis: found[axis] for axis in AXES}

    def rank(self, coordinates: dict[str, int]) -> int:
        """The rank at these coordinates, the inverse of `coordinates`; an axis left out counts as 0.

        >>> Mesh(pp=2, tp=4).rank({"pp": 1, "tp": 2})
        6
        """
        found = 0
        for axis in AXES:
            found = found * getattr(self, axis) + coordinates.get(axis, 0)
        return found

    def ranks(self, axes: tuple[str, ...], rank: int) -> tuple[int, ...]:
        """The ranks that agree with ``rank`` on every axis but ``axes``, row-major over these in the order of `FINEST`."""
        free = {name for axis in axes for name in members(axis)}
        lines, width = [0], self.size
        for axis in FINEST:
            n = getattr(self, axis)
            width //= n
            here = rank // width % n
            lines = [line + i * width for line in lines for i in (range(n) if axis in free else [here])]
        return tuple(lines)


def solve(
    processes: int,
    *,
    pp: int = 1,
    dp_replicate: int | None = None,
    dp_shard: int | None = None,
    cp: int = 1,
    tp: int = 1,
    ep: int = 1,
) -> Mesh:
    """The mesh of ``processes`` ranks with these degrees; the data-parallel degree that is left out takes what is left.

    ``dp_shard`` is derived; where it is given, ``dp_replicate`` is. ValueError, with the arithmetic, if it cannot be.

    >>> solve(16, tp=2)
    Mesh(pp=1, dp_replicate=1, dp_shard=8, cp=1, tp=2, ep=1)
    >>> solve(16, dp_shard=4, tp=2).dp_replicate
    2
    >>> solve(8, pp=2, tp=3)
    Traceback (most recent call last):
    ValueError: --mesh.pp 2 x --mesh.tp 3 = 6 does not divide the 8 processes; choose degrees whose product is 1, 2, 4, 8, ...
    """
    given = {"pp": pp, "dp_replicate": dp_replicate, "dp_shard": dp_shard, "cp": cp, "tp": tp}
    degrees = {axis: 1 if degree is None else degree for axis, degree in given.items()}
    Mesh(**degrees)  # refuses a degree below 1
    product = prod(degrees.values())
    sizes = {axis: degree for axis, degree in degrees.items() if degree > 1}
    shown = " x ".join(f"{flag(axis)} {degree}" for axis, degree in sizes.items())
    shown = f"{shown} = {product}" if len(sizes) > 1 else shown or "every degree 1"
    if processes % product:
        fits = ", ".join(str(d) for d in range(1, processes + 1) if processes % d == 0)
        raise ValueError(
            f"{shown} does not divide the {processes} processes; choose degrees whose product is {fits}, "
            f"or start {product} processes or a multiple"
        )
    if dp_shard is None:
        degrees["dp_shard"] = processes // product
    elif dp_replicate is None:
        degrees["dp_replicate"] = processes // product
    elif product != processes:
        raise ValueError(
            f"{shown}, but there are {processes} processes; start {product}, or leave out --mesh.dp-shard, "
            f"which would be {dp_shard * processes // product}"
        )
    return Mesh(**degrees, ep=ep)


def describe(mesh: Mesh) -> str:
    """The degrees above 1, in words.

    >>> describe(Mesh(dp_shard=4, tp=2))
    'dp_shard 4, tp 2'
    """
    return ", ".join(f"{axis} {degree}" for axis, degree in mesh.degrees.items() if degree > 1) or "1 process"


def flag(axis: str) -> str:
    """The command-line flag of an axis.

    >>> flag("dp_shard")
    '--mesh.dp-shard'
    """
    return f"--mesh.{axis.replace('_', '-')}"
