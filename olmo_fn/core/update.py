"""The update of parameters: what an optimizer does to one, what holds for every one, and how many there are to a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.kernels import Function, Kernel

Scalars: TypeAlias = dict[str, Tensor]
Slots: TypeAlias = dict[str, Tensor]


class Leaf(NamedTuple):
    """An optimizer of one parameter: a pair of pure functions.

    ``init(param) -> slots``; ``update(param, grad, slots, scalars) -> (param, slots)``. ``elementwise`` updates may
    see the parameter flattened; all others see it whole. Slots are shaped like the parameter and lie where it lies, but for
    those named in ``unlike``, which are of any shape and on every rank. ``scalars`` are this leaf's own, on top of the step's;
    of those it sees the ones without a group, and its ``group``'s. ``point(param, slots)`` is where the gradient is taken, if
    not at the parameter.
    """

    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Tensor, Slots, Scalars], tuple[Tensor, Slots]]
    elementwise: bool = True
    scalars: Mapping[str, float] = {}
    group: str = ""
    point: Callable[[Tensor, Slots], Tensor] | None = None
    unlike: tuple[str, ...] = ()


class Task(NamedTuple):
    """The update of one parameter, ready to run."""

    leaf: Leaf
    update: Function  # as `guarded` gives it
    kernel: Kernel
    p: Tensor
    g: Tensor
    slots: Slots
    numbers: Tensor  # its scalars

    @property
    def run(self) -> Function:
        """``(p, g, slots, numbers) -> (new p, new slots)``, perhaps compiled."""
        return self.kernel(self.update)


def flattened(task: Task) -> tuple[Tensor, Slots]:
    """An elementwise update, of flat tensors, so that one compiled function serves all shapes, and parts of them."""
    p = task.p
    new_p, new = task.run(p.view(-1), task.g.reshape(-1), {k: v.view(-1) for k, v in task.slots.items()}, task.numbers)
    return new_p.view(p.shape), {k: v.view(p.shape) for k, v in new.items()}


def all_flattened(tasks: Sequence[Task]) -> list[tuple[Tensor, Slots]]:
    """Several that are alike, in one call."""
    if len(tasks) == 1:
        return [flattened(tasks[0])]
    flat = [(task.p.view(-1), task.g.reshape(-1), {k: v.view(-1) for k, v in task.slots.items()}) for task in tasks]
    found = tasks[0].kernel(_each(tasks[0].update))(*map(list, zip(*flat, strict=True)), tasks[0].numbers)
    shapes = [task.p.shape for task in tasks]
    return [(p.view(s), {k: v.view(s) for k, v in new.items()}) for s, (p, new) in zip(shapes, found, strict=True)]


@cache
def _each(update: Function) -> Function:
    """``update`` of every parameter of a list."""

    def each(ps: list[Tensor], gs: list[Tensor], slots: list[Slots], numbers: Tensor) -> list[tuple[Tensor, Slots]]:
        return [update(p, g, own, numbers) for p, g, own in zip(ps, gs, slots, strict=True)]

    return each


def together(paths: Iterable[str], kind: Callable[[str], Any], most: int) -> Iterator[list[str]]:
    """The paths by their ``kind``, up to ``most`` at a time: always a power of two, as each length is compiled anew.

    >>> list(together(["a", "B", "c", "d", "e"], str.isupper, 2))
    [['a', 'c'], ['d', 'e'], ['B']]
    """
    kinds: dict[Any, list[str]] = {}
    for path in paths:
        kinds.setdefault(kind(path), []).append(path)
    for alike in kinds.values():
        while alike:
            n = 1 << min(len(alike), most).bit_length() - 1
            yield alike[:n]
            del alike[:n]


def pack_scalars(leaf: Leaf, scalars: Scalars, dtype: torch.dtype) -> tuple[tuple[str, ...], Tensor]:
    """Names and values of what the update of ``leaf`` sees, in the dtype that a parameter of ``dtype`` is computed in.

    One vector and not in fp64, so that calling a compiled update costs little, and converts nothing for every few entries.
    """
    wide, device = torch.promote_types(dtype, torch.float32), scalars["skip"].device
    own = {k: torch.full((), v, dtype=wide, device=device) for k, v in leaf.scalars.items()}  # filled there: nothing waits
    found = {**of_group(scalars, leaf.group), **own}
    return tuple(found), torch.stack([value.to(wide) for value in found.values()])


def of_group(scalars: Scalars, group: str) -> Scalars:
    """The scalars without a group, and those of ``group``, without its name.

    >>> of_group({"skip": 0, "matrix/lr": 1, "default/lr": 2}, "matrix")
    {'skip': 0, 'lr': 1}
    """
    shared = {name: value for name, value in scalars.items() if "/" not in name}
    own = {name.removeprefix(f"{group}/"): value for name, value in scalars.items() if name.startswith(f"{group}/")}
    return {**shared, **{name: value for name, value in own.items() if "/" not in name}}


@cache
def guarded(update: Function, donate: bool, names: tuple[str, ...]) -> Function:
    """The update of a leaf with what holds for every one; its scalars are given as one vector.

    A factor that the gradient lacks is applied, a skipped step changes nothing, dtypes stay what they are, donation writes
    in place.
    """

    def guarded(p: Tensor, g: Tensor, slots: Slots, numbers: Tensor) -> tuple[Tensor, Slots]:
        scalars = dict(zip(names, numbers.unbind(), strict=True))
        scalars["skip"] = scalars["skip"] > 0
        if "grad_scale" in scalars:
            g = g.to(numbers.dtype) * scalars.pop("grad_scale")
        new_p, new_slots = update(p, g, slots, scalars)
        new_p = torch.where(scalars["skip"], p, new_p.to(p.dtype))
        new_slots = {k: torch.where(scalars["skip"], slots[k], v.to(slots[k].dtype)) for k, v in new_slots.items()}
        if not donate:
            return new_p, new_slots
        return p.copy_(new_p), {k: slots[k].copy_(v) for k, v in new_slots.items()}

    return guarded


def same_memory(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same numbers in the same places."""
    form = (x.shape, x.stride(), x.dtype, x.storage_offset()), (y.shape, y.stride(), y.dtype, y.storage_offset())
    return torch._C._is_alias_of(x, y) and form[0] == form[1]  # type: ignore[attr-defined]
