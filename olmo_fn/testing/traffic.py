"""What goes over the wire, and what lives in memory, counted in a running step."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import fields
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_fn.parallel.axis import Axes

_c10d = torch.ops._c10d_functional


class Moved(NamedTuple):
    """``count`` collectives of a kind; ``whole``: bytes of what each is about, the gathered, summed or exchanged tensor; and
    ``sent``: bytes that a rank must at least send for that.
    """

    count: int = 0
    whole: int = 0
    sent: int = 0


class Traffic(TorchDispatchMode):
    """Counts the collectives that this rank takes part in: ``moved[kind, axis]``, a kind being a name of a functional collective.

    Least bytes sent by each of n ranks, for a whole tensor of S bytes (Thakur et al. 2005, section 4): ``all_gather`` and
    ``reduce_scatter`` S (n - 1) / n, ``all_reduce`` 2 S (n - 1) / n; ``all_to_all``, which ring shifts are too, what goes to
    others. Small ones (0-d or a few numbers) count as well. Axes over the same ranks share a group: it is called by the first of
    them in `olmo_fn.parallel.axis.Axes`. For eager steps: what a compiled stage does inside cannot be seen.

        with Traffic(connection.axes) as traffic:
            state, metrics = step(state, batch)
        traffic.moved["all_gather", "dp_shard"].count
    """

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        named = [getattr(axes, field.name) for field in fields(Axes)]
        self.names = {axis.group: axis.name for axis in reversed(named) if axis.size > 1}
        self.moved: dict[tuple[str, str], Moved] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        count = COLLECTIVES.get(func)
        if count is not None:
            kind, whole, sent = count(out, *args)
            key = kind, self.names[args[-1]]
            old = self.moved.get(key, Moved())
            self.moved[key] = Moved(old.count + 1, old.whole + whole, old.sent + sent)
        return out


def _all_reduce(out: Tensor, x: Tensor, op: str, group: str) -> tuple[str, int, int]:
    size = torch.distributed.distributed_c10d._resolve_process_group(group).size()
    return "all_reduce", x.nbytes, 2 * x.nbytes * (size - 1) // size


def _all_gather(out: Tensor, x: Tensor, size: int, group: str) -> tuple[str, int, int]:
    return "all_gather", out.nbytes, x.nbytes * (size - 1)


def _reduce_scatter(out: Tensor, x: Tensor, op: str, size: int, group: str) -> tuple[str, int, int]:
    return "reduce_scatter", x.nbytes, out.nbytes * (size - 1)


def _all_to_all(out: Tensor, x: Tensor, received: list[int], sent: list[int], group: str) -> tuple[str, int, int]:
    mine = torch.distributed.get_rank(torch.distributed.distributed_c10d._resolve_process_group(group))
    row = x.element_size() * prod(x.shape[1:])
    return "all_to_all", x.nbytes, row * (sum(sent) - sent[mine])


COLLECTIVES: dict[Any, Callable[..., tuple[str, int, int]]] = {
    _c10d.all_reduce.default: _all_reduce,
    _c10d.all_gather_into_tensor.default: _all_gather,
    _c10d.reduce_scatter_tensor.default: _reduce_scatter,
    _c10d.all_to_all_single.default: _all_to_all,
}


class Live(TorchDispatchMode):
    """Bytes of the tensors made under it that are still there; storages that were given back count nothing.

    >>> with Live() as live:
    ...     a, b = torch.zeros(4), torch.ones(8)
    ...     del a
    ...     live.bytes()
    32
    """

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        old = {id(x.untyped_storage()) for x in args if isinstance(x, Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in old:  # not a view of what was there before
                self.storages.add(x.untyped_storage())
        return out

    def bytes(self) -> int:
        """How many there are now."""
        return sum(storage.nbytes() for storage in self.storages)
