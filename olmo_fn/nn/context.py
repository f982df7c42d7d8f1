"""What the stages of a model share while they work on one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from olmo_fn.core.chain import Backend
from olmo_fn.kernels.packing import Packing
from olmo_fn.nn.linear import Weight, linear


@dataclass(frozen=True)
class Context:
    """The batch as one rank sees it, and how to compute.

    ``input_ids``, ``labels`` (B, R) of this rank's R positions (all of them, unless ``cp`` shares the sequence); ``positions``
    (R,) or, with documents, (B, R): they begin anew in each. ``documents`` (B, T): the first position of each position's
    document, of the whole sequence, or None; ``packing``: the same for kernels that take lengths. ``rows`` (B,), ``columns``
    (R,): numbers of the run's sequences and of this rank's positions in them, by which entries are dropped. ``ahead``: for
    multi-token prediction, ids and labels further on. ``tables``: what sublayers prepared from the positions, by their keys.

    Decoding: ``start`` columns are in the caches already, and ``padding`` (B,) of a row's first columns are no tokens.
    """

    backend: Backend
    input_ids: Tensor
    labels: Tensor | None
    positions: Tensor
    documents: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None
    ahead: tuple[Any, ...] = ()
    sources: Tensor | None = None
    tables: Mapping[Any, Any] = field(default_factory=dict)
    start: int = 0
    padding: Tensor | None = None
    packing: Packing | None = None

    def column_linear(self, x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
        """Products with matrices that have some columns on each rank of ``tp``: `linear` with a gather before it."""
        return linear(self.backend, x, weights, gather=self.backend.axes.tp)

    def row_linear(self, x: Tensor, weight: Weight) -> Tensor:
        """A product with a matrix that has some rows on each rank of ``tp``: `linear` with a scatter behind it."""
        return linear(self.backend, x, [weight], scatter=self.backend.axes.tp)[0]

    def linear(self, x: Tensor, *weights: Weight) -> tuple[Tensor, ...]:
        """Products with whole matrices: for sublayers that are whole on the ranks of ``tp``."""
        return linear(self.backend, x, weights)

    def fuse(self, fn: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
        """``fn(*constants, *tensors)`` as a function of the tensors, compiled into one kernel where steps are compiled.

        ``fn`` is elementwise (sums over the last dim included) and a function at the top of a module, so that it is compiled
        once. Autograd goes through it.
        """
        return self.backend.fuse(fn, *constants)
