"""A sublayer: what a block is made of (a mixer over positions, a feed-forward network), as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn.core.chain import NOTHING, Aux, Metric
from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.collectives import gather_replicated, take_part
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.nn.context import Context

Result: TypeAlias = "Tensor | tuple[Tensor, Aux]"


class Names(NamedTuple):
    """What a parameter is called in other programs' files, relative to its block; matrices are (out, in) there.

    Of matrices that are stacked here (E, in, out) Hugging Face has one tensor each, whose name has its number for ``{}``. The
    offsets are what is added to theirs to get ours: 1 for a gain that is kept around 0 there, and around 1 here. ``shape``: of
    OLMo-core's, where it has the same entries in another number of dims, and ``huggingface_shape`` of theirs. ``turned``:
    OLMo-core too has matrices (out, in).
    """

    huggingface: str
    olmo_core: str
    huggingface_offset: float = 0.0
    olmo_core_offset: float = 0.0
    shape: tuple[int, ...] = ()
    turned: bool = True
    huggingface_shape: tuple[int, ...] = ()


def no_cache(rows: int, capacity: int, dtype: torch.dtype, device: torch.device | str) -> Tree:
    """The cache of a sublayer that looks at one position at a time: nothing."""
    return {}


@dataclass(frozen=True)
class Sublayer:
    """Parameters, and the functions that use them: everything that training, decoding, counting and planning must know.

    - ``name``: of its parameters' subtree in a block; its norm in the block is ``<name>_norm``.
    - ``specs``: its parameters.
    - ``apply(p, x, ctx)``: training. x (B, T, D) to a tensor of that shape, or to that and an `Aux`.
    - ``extend(p, x, ctx, cache)``: decoding. x (B, T, D) of T new columns, from ``ctx.start`` on; gives the result and the
      cache with these columns in it. Not given: ``apply``, for a sublayer that looks at one position at a time.
    - ``cache(rows, capacity, dtype, device)``: an empty cache, a tree of tensors.
    - ``remembers``: for how many columns it holds all of them, and so can go back to any; 0 for a state that is overwritten.
    - ``flops(T)``: FLOPs of a forward pass over one sequence of T tokens: 2 for each entry of a matrix and token, and so on.
    - ``tables``: what it wants to know of the positions, by a key: functions of the positions (R,) or (B, R), each computed
      once for all sublayers that ask by the same key; ``ctx.tables[key]`` has the value.
    - ``divided``: which of the axes ``tp`` and ``cp`` its ``apply`` is written for. Over ``tp`` others are computed whole on
      each rank; over ``cp`` they are refused by name.
    - ``metrics``: those that its `Aux` reports. Scalars are added up over the layers; of vectors each layer has its own.
    - ``names``: what its parameters are called in other programs' files.
    - ``idle``: entries of its parameters that a token does not meet: those of the experts that it is not sent to.
    """

    name: str
    specs: Tree
    apply: Callable[[Tree, Tensor, Context], Result]
    flops: Callable[[int], int]
    extend: Callable[[Tree, Tensor, Context, Tree], tuple[Tensor, Tree]] | None = None
    cache: Callable[[int, int, torch.dtype, torch.device | str], Tree] = no_cache
    remembers: float = 0
    tables: Mapping[Any, Callable[[Tensor], Any]] = field(default_factory=dict)
    divided: tuple[str, ...] = ()
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    names: Mapping[str, Names] = field(default_factory=dict)
    idle: int = 0

    def on(self, tp: Axis) -> Callable[[Tree, Tensor, Context], Result]:
        """``apply``; on ranks of ``tp``, if it is not written for them, whole on each."""
        return self.apply if tp.size == 1 or "tp" in self.divided else self._whole

    def _whole(self, p: Tree, x: Tensor, ctx: Context) -> Result:
        axes = ctx.backend.axes
        alone = replace(ctx, backend=replace(ctx.backend, axes=replace(axes, tp=Axis())))
        y, aux = with_aux(self.apply(p, gather_replicated(x, 1, axes.tp), alone))
        return take_part(y, 1, axes.tp), aux

    def decode(self, p: Tree, x: Tensor, ctx: Context, cache: Tree) -> tuple[Tensor, Tree]:
        """``extend``, or ``apply`` for a sublayer without one."""
        return (with_aux(self.apply(p, x, ctx))[0], cache) if self.extend is None else self.extend(p, x, ctx, cache)


def with_aux(result: Result) -> tuple[Tensor, Aux]:
    """What a sublayer gives, with an `Aux` in any case."""
    return result if isinstance(result, tuple) else (result, NOTHING)
