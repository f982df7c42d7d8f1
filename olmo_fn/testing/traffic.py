"""What goes over the wire, and what lives in memory, counted in a running step."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_fn.mesh.axis import NAMES, Axes, Axis

_c10d = torch.ops._c10d_functional


class Moved(NamedTuple):
    """``calls``: collectives of a kind; ``whole``: bytes of what they are about, the gathered, summed or exchanged tensors; and
    ``sent``: bytes that a rank must at least send for that.
    """

    calls: int = 0
    whole: int = 0
    sent: int = 0


class Traffic(TorchDispatchMode):
    """Counts the collectives that this rank takes part in: ``moved[kind, axis]``, for each kind and name of an axis.

    Least bytes sent by each of n ranks, for a whole tensor of S bytes (Thakur et al. 2005, section 4): ``all_gather`` and
    ``reduce_scatter`` S (n - 1) / n, ``all_reduce`` 2 S (n - 1) / n; ``all_to_all``, which ring shifts are too, what goes to
    others. Small ones (0-d or a few numbers) count as well. Axes over the same ranks share a group: it goes by the name of the
    first of them in `olmo_fn.mesh.axis.Axes`. For eager steps: what a compiled stage does inside cannot be seen.

        with Traffic(connection.axes) as traffic:
            state, metrics = step(state, batch)
        traffic.moved["all_gather", "dp_shard"].calls
    """

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        named: list[Axis] = [getattr(axes, name) for name in NAMES]
        self.axes = {axis.group: axis for axis in reversed(named)}
        self.moved: dict[tuple[str, str], Moved] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in COLLECTIVES:
            kind, measure = COLLECTIVES[func]
            axis = self.axes[args[-1]]
            old = self.moved.get((kind, axis.name), Moved())
            whole, sent = measure(out, axis, *args)
            self.moved[kind, axis.name] = Moved(old.calls + 1, old.whole + whole, old.sent + sent)
        return out


def _all_to_all(out: Tensor, axis: Axis, x: Tensor, received: list[int], sent: list[int], group: str) -> tuple[int, int]:
    return x.nbytes, x.nbytes * (sum(sent) - sent[axis.index]) // max(1, sum(sent))


COLLECTIVES: dict[Any, tuple[str, Callable[..., tuple[int, int]]]] = {
    _c10d.all_reduce.default: ("all_reduce", lambda out, axis, x, *_: (x.nbytes, 2 * x.nbytes * (axis.size - 1) // axis.size)),
    _c10d.all_gather_into_tensor_out.default: ("all_gather", lambda out, axis, x, *_: (out.nbytes, x.nbytes * (axis.size - 1))),
    _c10d.reduce_scatter_tensor.default: ("reduce_scatter", lambda out, axis, x, *_: (x.nbytes, out.nbytes * (axis.size - 1))),
    _c10d.all_to_all_single.default: ("all_to_all", _all_to_all),
}


class Wait(NamedTuple):
    """A collective: its kind, the name of its axis, the function that began it, and how many products of matrices the rank did
    before it waited for the result.
    """

    kind: str
    axis: str
    begun_in: str
    products: int


class Waits(TorchDispatchMode):
    """What a rank computes while a collective is under way: ``found``, a `Wait` for each, in the order of the waits.

    Those with 0 products are waited for at once: nothing hides how long they take. ``begun_in`` names the innermost function of
    this package that is no collective itself, such as ``linear._linear_vjp``.
    """

    def __init__(self, axes: Axes) -> None:
        super().__init__()
        self.axes = {axis.group: axis.name for axis in reversed([getattr(axes, name) for name in NAMES])}
        self.found: list[Wait] = []
        self.products = 0
        self.under_way: dict[int, tuple[Tensor, Wait]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in COLLECTIVES:
            begun = Wait(COLLECTIVES[func][0], self.axes[args[-1]], _caller(), self.products)
            self.under_way[out.untyped_storage()._cdata] = out, begun
        elif func is _c10d.wait_tensor.default and args[0].untyped_storage()._cdata in self.under_way:
            _, begun = self.under_way.pop(args[0].untyped_storage()._cdata)
            self.found.append(begun._replace(products=self.products - begun.products))
        self.products += func._overloadpacket in PRODUCTS
        return out


PRODUCTS = (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm, torch.ops.aten.addmm_, torch.ops.aten.baddbmm)
BELOW = ("olmo_fn.mesh.collectives", "olmo_fn.parallel.buckets", __name__)


def _caller() -> str:
    frame: FrameType | None = sys._getframe(1)
    while frame and not (str(name := frame.f_globals.get("__name__")).startswith("olmo_fn.") and name not in BELOW):
        frame = frame.f_back
    return "" if frame is None else f"{frame.f_globals['__name__'].split('.')[-1]}.{frame.f_code.co_name}"


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
