"""A transform of one's own: gradient centralisation."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Execution, Gradients, Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.tree import Tree, matches


def centralize(patterns: tuple[str, ...] = ("blocks.*",)) -> Transform[Grads, Grads]:
    """Subtract from each matrix's gradient its mean over the inputs (Yong et al. 2020, arXiv 2004.01461, eq. 1).

        g = g - mean(g, dim 0)          for g (inputs, outputs) whose path matches one of ``patterns``

    A projection: doing it twice is doing it once. Linear: before or after `accumulate` is the same.

    >>> import torch
    >>> from olmo_fn.core.pipe import grad, pipe
    >>> def loss(params, batch):
    ...     return (params["blocks"]["w"] * batch["labels"]).sum(), {}
    >>> centered = pipe(loss, grad("func"), centralize())
    >>> grads, _ = centered({"blocks": {"w": torch.zeros(2, 1)}}, {"labels": torch.tensor([[1], [5]])})
    >>> grads["blocks"]["w"].tolist()
    [[-1.0], [1.0]]
    """

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            found = inner.fn(params, batch, execution).finished(execution)
            placement = execution.layout.placement  # this process may have a part of each gradient only

            def centered(path: str, g: Tensor) -> Tensor:
                if g.ndim != 2 or not matches(path, patterns):
                    return g
                full = placement.full_tensor(path, g)
                return placement.local_shard(path, full - full.mean(0, keepdim=True))

            return found._replace(tree=tree.map_with_path(centered, found.tree))

        return replace(inner, fn=gradients)

    return Transform("centralize()", Grads, Grads, apply)
