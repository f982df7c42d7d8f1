"""A transform of one's own: gradient centralisation."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Execution, Grads, Metrics
from olmo_fn.core.pipe import Transform
from olmo_fn.tree import Tree, matches


def centralize(patterns: tuple[str, ...] = ("blocks.*",)) -> Transform:
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
        def gradients(params: Tree, batch: Batch, execution: Execution) -> tuple[Tree, Metrics]:
            grads, metrics = inner(params, batch, execution)
            layout = execution.layout  # this process may have a part of each gradient only

            def centered(path: str, g: Tensor) -> Tensor:
                if g.ndim != 2 or not matches(path, patterns):
                    return g
                whole = layout.whole(path, g)
                return layout.own(path, whole - whole.mean(0, keepdim=True))

            return tree.map_with_path(centered, grads), metrics

        return replace(inner, fn=gradients)

    return Transform("centralize()", Grads, Grads, apply)
