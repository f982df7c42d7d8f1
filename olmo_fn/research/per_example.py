"""The gradient of each example of a batch: which sequence pulls hardest."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad_and_value, vmap

from olmo_fn.core.chain import IGNORE, Batch, LossFunction, loss_tokens
from olmo_fn.core.gradients import Grads
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.pipe import split_batch
from olmo_fn.tree import Tree


class Examples(NamedTuple):
    """What each of B sequences adds to a batch, each (B,).

    ``loss``: summed over its ``tokens`` labels that count. ``grad_norm``: of the gradient of that sum, divided by the tokens
    of the whole batch, so that the gradients themselves add up to the batch's.
    """

    loss: Tensor
    tokens: Tensor
    grad_norm: Tensor


def per_example(loss: LossFunction, params: Tree, batch: Batch, chunk: int | None = None) -> Examples:
    """Loss and gradient norm of each sequence, by `torch.func.vmap` of the gradient (Goodfellow 2015, arXiv 1510.01799).

        gᵢ = ∇ (sum of losses of sequence i) / tokens of the batch,     Σᵢ gᵢ = gradient of the batch

    Holds ``chunk`` gradients at once, all B when not given; `per_example_loop` holds one.

    >>> def loss(params, batch):
    ...     return ((params["w"] - batch["labels"]) ** 2).sum(), {}
    >>> per_example(loss, {"w": torch.zeros(())}, {"labels": torch.tensor([[1, 1], [0, 5]])}).grad_norm
    tensor([1.0000, 2.5000])
    """
    total = loss_tokens(batch)

    def one(row: Batch) -> tuple[Tensor, Tensor]:
        alone = {name: value[None] for name, value in row.items()}
        grads, (value, _) = grad_and_value(loss, has_aux=True)(params, alone)
        return value, SINGLE.sharing.norm(grads) / total

    values, norms = vmap(one, chunk_size=chunk)({name: value for name, value in batch.items() if value.ndim})
    return Examples(values, _tokens(batch), norms)


def per_example_loop(grads: Grads, params: Tree, batch: Batch) -> Examples:
    """The same, one sequence after the other with any gradient function: the tape with rematerialisation, for large models.

    >>> from olmo_fn.core.pipe import grad, pipe
    >>> def loss(params, batch):
    ...     return ((params["w"] - batch["labels"]) ** 2).sum(), {}
    >>> grads = pipe(loss, grad("func"))
    >>> per_example_loop(grads, {"w": torch.zeros(())}, {"labels": torch.tensor([[1, 1], [0, 5]])}).grad_norm
    tensor([1.0000, 2.5000])
    """
    total = loss_tokens(batch)
    values, norms = [], []
    for row in split_batch(batch, len(batch["labels"])):
        found, metrics = grads(params, row)
        values.append(metrics["loss"] * total)
        norms.append(metrics["grad_norm"] if "grad_norm" in metrics else SINGLE.sharing.norm(found))
    return Examples(torch.stack(values), _tokens(batch), torch.stack(norms))


def outliers(values: Tensor, sigma: float = 6.0) -> list[int]:
    """Indices of the ``values`` (B,) far above the others, the largest first.

    Far: more than ``sigma`` robust deviations above the median, where a robust deviation is 1.4826 times the median distance
    from the median, which outliers cannot inflate (Iglewicz & Hoaglin 1993).

    >>> outliers(torch.tensor([1.0, 1.1, 9.0, 0.9, 1.0, 30.0]))
    [5, 2]
    """
    distance = values - values.quantile(0.5)
    deviation = 1.4826 * distance.abs().quantile(0.5)
    order = distance.argsort(descending=True).tolist()
    return [i for i in order if distance[i] > sigma * deviation]


def _tokens(batch: Batch) -> Tensor:
    return (batch["labels"] != IGNORE).flatten(1).sum(1)
