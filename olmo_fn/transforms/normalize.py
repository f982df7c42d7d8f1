"""Matrices whose rows have length 1 after every update, as nGPT trains them (Loshchilov et al. 2024, section 2.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.pipe import AVERAGES, Transform
from olmo_fn.core.step import Leaf, Scalars, Slots, Step
from olmo_fn.kernels import Function
from olmo_fn.tree import Tree


def dims_of(specs: Tree, axis: str = "embed", patterns: Sequence[str] = ("*",)) -> dict[str, int]:
    """The dim named ``axis`` of every matrix that has one, by path; only of paths that match ``patterns``.

    >>> from olmo_fn.spec import Init, Spec
    >>> ones = Init("ones")
    >>> dims_of({"w": Spec((4, 8), ("embed", "mlp"), ones), "out": Spec((8, 4), ("mlp", "embed"), ones)})
    {'w': 0, 'out': 1}
    """
    chosen = tree.flatten(tree.partition(specs, patterns)[0])
    return {path: s.axes.index(axis) for path, s in chosen.items() if len(s.axes) > 1 and axis in s.axes}


def unit(x: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """``x`` with all vectors along ``dim`` of length 1; zeros stay.

    >>> unit(torch.tensor([[3.0, 4.0]]), dim=1)
    tensor([[0.6000, 0.8000]])
    """
    return x / torch.linalg.vector_norm(x, dim=dim, keepdim=True).clamp(min=eps)


def unit_params(params: Tree, dims: Mapping[str, int]) -> Tree:
    """The parameters with the matrices in ``dims`` normalised: where training with `normalize` starts."""
    return tree.map_with_path(lambda path, p: unit(p, dims[path]) if path in dims else p, params)


def normalize(dims: Mapping[str, int]) -> Transform[Step, Step]:
    """After every update, bring the vectors along ``dims[path]`` of those parameters back to length 1.

    ``normalize(dims_of(specs))`` is nGPT's and OLMo-core's rule: every matrix along the model's width.
    """

    def apply(inner: Step) -> Step:
        def leaf(path: str) -> Leaf:
            plain = inner.leaf(path)
            if path not in dims:
                return plain
            return plain._replace(update=_normalized(plain.update, dims[path]), elementwise=False)

        return replace(inner, leaf=leaf)

    return Transform(f"normalize({len(dims)} parameters)", Step, Step, apply, not_after=NOT_YET_UNIT)


NOT_YET_UNIT = {AVERAGES: "would leave its average of weights that are not yet normalised"}
"""What normalisation must not follow."""


@cache
def _normalized(update: Function, dim: int) -> Function:
    def normalized(p: Tensor, g: Tensor, slots: Slots, scalars: Scalars) -> tuple[Tensor, Slots]:
        new_p, new = update(p, g, slots, scalars)
        return unit(new_p, dim), new

    return normalized
