"""Where things are: what the engines and the step ask about the ranks, a few values that each answer one question.

    placement   where the parts of each parameter lie, at rest
    weights     how they come into use, and how gradients return
    owners      who updates what has to be whole
    sharing     which rows of a batch are this rank's, and sums over all ranks
    sweep       in which order a rank goes through a chain

Here they are for a single process, where everything is here and whole; `olmo_fn.parallel` has them for many. Whatever is put in
their place must be invisible in the numbers: that is law 2.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE, Batch, Metric, Metrics, wide
from olmo_fn.kernels.float8 import Quantise
from olmo_fn.kernels.huge_pages import to_large
from olmo_fn.mesh.axis import SINGLE_DEVICE, Axes, CPMethod
from olmo_fn.spec import Box
from olmo_fn.tree import Tree

EXACT = Quantise()
"""Nothing is quantised."""


class Weights(Protocol):
    """Parameters of a segment on their way into use."""

    def ready(self) -> dict[str, Any]:
        """Path -> subtree of tensors to compute with; waits until they have arrived."""

    def free(self) -> None:
        """Give back the memory of what was gathered; it is not needed until `refetch`."""

    def refetch(self) -> None:
        """Begin to bring the same tensors back."""


@dataclass(frozen=True)
class Local:
    """Weights that need no fetching."""

    tensors: dict[str, Any]

    def ready(self) -> dict[str, Any]:
        """The tensors."""
        return self.tensors

    def free(self) -> None:
        """Does nothing: the parameters stay."""

    def refetch(self) -> None:
        """Does nothing: the parameters are still there."""


Reduction: TypeAlias = Callable[[], "dict[str, Tensor] | Reduction"]
"""Gradients on their way home. Call it to wait for the collective that is under way: it gives the gradients by path or, where
another collective has then begun that needs the first one's result, the reduction that waits for that."""


def arrive(reduction: Reduction) -> dict[str, Tensor]:
    """The gradients, once all collectives on their way are done.

    >>> arrive(lambda: lambda: {"w": torch.ones(1)})
    {'w': tensor([1.])}
    """
    found = reduction()
    while not isinstance(found, dict):
        found = found()
    return found


class Placement:
    """Where the parts of each parameter lie. On one process: each is a whole plain tensor.

    In the state a leaf is a *stored* tensor (on many ranks a DTensor); inside a step it is this rank's *local shard*, a plain
    tensor. Whatever is shaped like a parameter (moments, averages) lies as the parameter does.
    """

    def shard(self, params: Tree) -> Tree:
        """Stored parameters from whole ones, equal on all ranks, or from stored ones."""
        return tree.map(Tensor.contiguous, params)

    def store(self, path: str, local: Tensor) -> Tensor:
        """The stored tensor whose local shard this is, shaped like the parameter at ``path``."""
        return local

    def to_local(self, stored: Tree) -> Tree:
        """Local shards of stored leaves; other leaves as they are."""
        return stored

    def to_stored(self, local: Tree, like: Tree) -> Tree:
        """The inverse of `to_local`, given the leaves before it."""
        return local

    def entries(self, path: str, local: Tensor) -> Tensor:
        """The number of each entry of a local shard in the whole parameter, row after row: an int64 tensor shaped like it."""
        return Box.whole(local.shape).entries(local.shape, local.device)

    def full_tensor(self, path: str, local: Tensor) -> Tensor:
        """The whole tensor, on every rank; of a meta tensor, a meta tensor."""
        return local

    def local_shard(self, path: str, full: Tensor) -> Tensor:
        """This rank's part of a whole tensor shaped like the parameter."""
        return full


class WeightsInUse:
    """How weights come into use, and how their gradients return. On one process: matrices are cast."""

    @property
    def ahead(self) -> int:
        """How many segments' weights are on their way while one computes."""
        return 1

    def fetch(
        self,
        params: Tree,
        paths: Iterable[str],
        dtype: torch.dtype,
        uncast: Collection[str] = (),
        quantise: Quantise = EXACT,
    ) -> Weights:
        """Begin to bring the subtrees at ``paths`` into use, matrices in ``dtype``; those of ``uncast`` may stay as stored, and
        those that are to be are quantised.
        """
        subtrees = {path: tree.at(params, path) for path in paths}
        return Local(
            {path: compute_copies(part, None if path in uncast else dtype, quantise, path) for path, part in subtrees.items()}
        )

    def reduce(self, grads: dict[str, Tensor]) -> Reduction:
        """Begin to bring gradients of a segment, by path, back to where their parameters lie."""
        return lambda: grads

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sum what is left to sum once all gradients are there."""
        return grads


class Owners:
    """Who updates parameters whose optimizer sees them whole. On one process: it does, one after the other."""

    def update(self, paths: Iterable[str], task: Callable[[str], Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        """Do the updates of ``paths``; yields each path with this rank's part of the new parameter and slots.

        ``task(path)`` is an `olmo_fn.core.update.Task`, made when its turn comes.
        """
        for path in paths:
            one = task(path)
            yield path, *one.run(one.p, one.g, one.slots, one.numbers)


@dataclass(frozen=True)
class Sharing:
    """How a batch is shared. On one process: all of it is here, and sums are over everything."""

    axes: Axes = SINGLE_DEVICE
    cp_method: CPMethod = "gather"

    @property
    def multiple(self) -> int:
        """The number of sequences in a batch must be a multiple of this."""
        return 1

    def rows(self, size: int, parts: int = 1) -> list[slice]:
        """This rank's rows of a batch of ``size`` sequences that is computed in ``parts``, a slice for each part."""
        return [slice(0, size)]

    def count_tokens(self, batch: Batch) -> Tensor:
        """The labels that count in a batch, on whatever ranks its rows are. 0-d."""
        return (batch["labels"] != IGNORE).sum()

    def with_tokens(self, batch: Batch) -> Batch:
        """The batch with its ``loss_tokens``."""
        if "loss_tokens" in batch or "labels" not in batch:
            return batch
        return {**batch, "loss_tokens": self.count_tokens(batch)}

    def local_batch(self, batch: Batch) -> Batch:
        """This rank's rows of a batch, as a step is given it."""
        return batch

    def as_given(self, batch: Batch) -> Batch:
        """What a step wants to be given of a whole batch."""
        return batch

    def total(self, sums: Metrics, declared: Mapping[str, Metric]) -> Metrics:
        """Sums (or maxima, as declared) over the tokens of this rank become those over all tokens."""
        return sums

    def norm(self, grads: Tree) -> Tensor:
        """√ of the sum of squares of all entries, 0-d.

        >>> SINGLE.sharing.norm({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])})
        tensor(5.)
        """
        leaves = [g for _, g in tree.items(grads)]
        if one_launch(leaves):
            return torch.linalg.vector_norm(norms(leaves))
        parts = [torch.linalg.vector_norm(wide(part)) for g in leaves for part in narrow_parts(g)]
        return torch.linalg.vector_norm(torch.stack(parts))


class Sweep(NamedTuple):
    """The ways of one rank through its part of a chain.

    ``gradients(chain, remat, params, batch, execution)``: forward and backward; gradients of the mean loss by path, as
    `Placement` lays them, and the sums of this rank's tokens. ``sums(chain, params, batch, execution)``: forward only, for
    these sums.
    """

    gradients: Callable[..., tuple[dict[str, Tensor], Metrics]]
    sums: Callable[..., Metrics]


@dataclass(frozen=True)
class Layout:
    """One value a question; see this module's text. ``sweep`` None: segment after segment, as `olmo_fn.core.tape` does it."""

    placement: Any = field(default_factory=Placement)
    weights: Any = field(default_factory=WeightsInUse)
    owners: Any = field(default_factory=Owners)
    sharing: Any = field(default_factory=Sharing)
    sweep: Sweep | None = None


SINGLE = Layout()


def compute_copy(p: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Matrices in the compute dtype; vectors (the gains of norms) stay in fp32. A no-op when nothing changes, or for None."""
    return p if dtype is None or p.ndim < 2 else to_large(p, dtype)


def compute_copies(subtree: Tree, dtype: torch.dtype | None, quantise: Quantise = EXACT, prefix: str = "") -> Tree:
    """`compute_copy` of every leaf, or a quantised one."""
    if not quantise.forms:
        wide = [p for _, p in tree.items(subtree) if dtype and p.ndim >= 2 and p.dtype != dtype]
        if len(wide) < 2 or not all(is_cuda_constant(p) for p in wide):
            return tree.map(lambda p: compute_copy(p, dtype), subtree)
        copies = [torch.empty_like(p, dtype=dtype) for p in wide]
        torch._foreach_copy_(copies, wide)  # one launch for all
        narrow = dict(zip(map(id, wide), copies, strict=True))
        return tree.map(lambda p: narrow.get(id(p), p), subtree)
    return tree.map_with_path(lambda path, p: quantise(path, p) or compute_copy(p, dtype), subtree, prefix=prefix)


def is_cuda_constant(p: Tensor) -> bool:
    """Whether a tensor is on a GPU, and nothing derives by it."""
    return p.device.type == "cuda" and not p.requires_grad and not torch._C._are_functorch_transforms_active()


def narrow_parts(g: Tensor) -> tuple[Tensor, ...]:
    """``g``, or if it is to become wide for a sum, parts of it that do so without leaving the cache."""
    return (g,) if g.dtype in (torch.float32, torch.float64) else g.reshape(-1).split(1 << 20)


def one_launch(leaves: Sequence[Tensor]) -> bool:
    """Whether `norms` is the way to norms: on a GPU, where a launch for every tensor takes longer than reading it."""
    return leaves[0].device.type == "cuda" and not torch._C._are_functorch_transforms_active()


def norms(leaves: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, those of one dtype in one launch, as a vector in at least fp32. In no order that matters.

    >>> norms([torch.tensor([3.0, 4.0]), torch.tensor([2.0])])
    tensor([5., 2.])
    """
    of: dict[torch.dtype, list[Tensor]] = {}
    for x in leaves:
        of.setdefault(x.dtype, []).append(x)
    wides = (torch._foreach_norm(xs, 2, dtype=torch.promote_types(dtype, torch.float32)) for dtype, xs in of.items())
    return torch.stack([norm for found in wides for norm in found])
