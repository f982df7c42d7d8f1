"""Where parameters live and how they come into use, as the engines and the step see it; this one is a single process.

`olmo_fn.parallel.sharded.Sharded` is the other one. Every method here is the identity, or nearly, and every method there
must be invisible in the numbers: that is law 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.kernels.huge_pages import to_large
from olmo_fn.tree import Tree

if TYPE_CHECKING:
    from olmo_fn.core.chain import Batch, Chain, Metrics, Sweep


class Weights(Protocol):
    """Parameters of a segment on their way into use."""

    def ready(self) -> dict[str, Tree]:
        """Path -> subtree of tensors to compute with; waits for them."""

    def free(self) -> None:
        """Not needed until `again`."""

    def again(self) -> None:
        """Begin to bring the same tensors back."""


@dataclass(frozen=True)
class Here:
    """Weights that are simply there."""

    tensors: dict[str, Tree]

    def ready(self) -> dict[str, Tree]:
        """The tensors."""
        return self.tensors

    def free(self) -> None:
        """Nothing."""

    def again(self) -> None:
        """Nothing."""


class Single:
    """One process: everything is here, and whole."""

    shares: int = 1
    """Sequences of a batch must be a multiple of this."""

    def chain(self, chain: Chain) -> Chain:
        """The chain as this rank computes it."""
        return chain

    def part(self, batch: Batch) -> Batch:
        """This rank's part of a batch."""
        return batch

    def sweep(self, alone: Sweep) -> Sweep:
        """How a rank goes through its part of a chain, given how a process ``alone`` does (`olmo_fn.core.tape.ALONE`)."""
        return alone

    def fetch(self, params: Tree, paths: Iterable[str], dtype: torch.dtype, stored: Collection[str] = ()) -> Weights:
        """Begin to bring the subtrees at ``paths`` into use, matrices in ``dtype``, those of ``stored`` as they are stored."""
        return Here({path: compute_copies(tree.at(params, path), None if path in stored else dtype) for path in paths})

    def reduce(self, grads: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        """Begin to bring gradients of a segment, by path, back to where their parameters live; call the result to end."""
        return lambda: grads

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is left to do once all gradients are there."""
        return grads

    def total(self, sums: Metrics) -> Metrics:
        """Sums over the tokens of this rank become sums over all tokens."""
        return sums

    def norm(self, grads: Tree) -> Tensor:
        """√ of the sum of squares of all entries, 0-d.

        >>> SINGLE.norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5.)
        """
        norms = [torch.linalg.vector_norm(wide(part)) for _, g in tree.items(grads) for part in narrow_parts(g)]
        return torch.linalg.vector_norm(torch.stack(norms))

    def adopt(self, params: Tree) -> Tree:
        """Parameters as the state holds them."""
        return tree.map(torch.Tensor.contiguous, params)

    def place(self, path: str, part: Tensor) -> Tensor:
        """This rank's part of something shaped like a parameter, as the state holds it."""
        return part

    def enter(self, leaves: Tree) -> Tree:
        """The state's leaves as a step works on them: this rank's parts, plain tensors."""
        return leaves

    def leave(self, leaves: Tree, like: Tree) -> Tree:
        """The inverse of `enter`."""
        return leaves

    def rounds(self, paths: Iterable[str]) -> Iterable[tuple[str, ...]]:
        """Parameters whose updates need them whole, a round for each time that `deal` gives a rank one of them."""
        return ((path,) for path in paths)

    def deal(self, parts: Mapping[str, Sequence[Tensor]]) -> tuple[str, list[Tensor]] | None:
        """Of the parameters of a round, each with tensors of its shape, the one that this rank updates; if any, whole."""
        ((path, tensors),) = parts.items()
        return path, list(tensors)

    def collect(
        self, mine: Sequence[Tensor] | None, like: Mapping[str, Sequence[tuple[Tensor, bool]]]
    ) -> dict[str, list[Tensor]]:
        """The inverse of `deal`: this rank's parts of what all have updated.

        ``like`` has of each parameter the tensors as they were, and whether they have its shape; others are whole on all ranks.
        """
        assert mine is not None
        return {path: list(mine) for path in like}

    def whole(self, path: str, part: Tensor) -> Tensor:
        """A tensor shaped like a parameter, of which this rank has ``part``, whole."""
        return part

    def own(self, path: str, whole: Tensor) -> Tensor:
        """The inverse of `whole`: this rank's part."""
        return whole


SINGLE: Any = Single()


def compute_copy(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Matrices in the compute dtype; vectors (the gains of norms) stay in fp32. A no-op when nothing changes, or for None."""
    return p if dtype is None or p.ndim < 2 else to_large(p, dtype)


def compute_copies(subtree: Tree, dtype: torch.dtype | None) -> Tree:
    """`compute_copy` of every leaf."""
    return tree.map(lambda p: compute_copy(p, dtype), subtree)


def wide(g: Tensor) -> Tensor:
    """A gradient in at least fp32."""
    return g if g.dtype == torch.float64 else g.float()


def narrow_parts(g: Tensor) -> tuple[Tensor, ...]:
    """``g``, or if it is to become wide for a sum, parts of it that do so without leaving the cache."""
    return (g,) if g.dtype in (torch.float32, torch.float64) else g.reshape(-1).split(1 << 20)
