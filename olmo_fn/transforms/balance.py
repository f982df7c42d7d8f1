"""Experts kept evenly loaded without a loss: a bias of each expert's score moves a little in every step."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Execution, Gradients, with_wants
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Leaf, Scalars, Slots, Step
from olmo_fn.tree import Tree

BIAS = "moe.router_bias"
"""The end of the path of every such bias; its block's loads are the metric ``load/<number of the block>``."""


def balance_experts(rate: float) -> Transform[Step, Step]:
    """Move routers' biases towards even loads: ``bias += rate · sign(mean(loads) - loads)`` (Wang et al. 2024, algorithm 1).

    ``loads`` (E,) are the tokens of the whole batch that went to each expert, before any are dropped. A step that is skipped
    moves no bias. Biases are parameters: they are saved, averaged and exported as all others, but no gradient, no norm and no
    decay sees them. Put it behind the optimizer; models have biases with ``MoE(balance_rate=…)``.
    """
    if not rate > 0:
        raise ValueError(f"balance_experts({rate}): the rate must be positive; leave it out to move no bias")

    def apply(inner: Step) -> Step:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            biases = {path: p for path, p in tree.items(params) if path.endswith(BIAS)}
            found = inner.grads.fn(params, batch, with_wants(execution, lambda path: path not in biases))
            metrics, flat = found.metrics, tree.flatten(found.tree)
            if "grad_norm" not in metrics:
                norm = execution.layout.sharing.norm(found.tree)
                metrics = {**metrics, "grad_norm": norm if found.signals.scale is None else norm * found.signals.scale}
            for path, p in biases.items():
                load = metrics[f"load/{path.split('.')[1]}"]
                flat[path] = (load - load.mean()).to(p.dtype)
            every = tree.unflatten((path, flat[path]) for path, _ in tree.items(params) if path in flat)
            return found._replace(tree=every, metrics=metrics)

        def leaf(path: str) -> Leaf:
            return Leaf(lambda p: {}, move, scalars={"rate": rate}) if path.endswith(BIAS) else inner.leaf(path)

        return replace(inner, grads=replace(inner.grads, fn=gradients), leaf=leaf)

    return Transform(f"balance_experts({rate})", Step, Step, apply)


def move(bias: Tensor, imbalance: Tensor, slots: Slots, scalars: Scalars) -> tuple[Tensor, Slots]:
    """A step against the sign of what is too much: factors of the gradient, such as clipping's, change nothing."""
    return bias - scalars["rate"] * torch.sign(imbalance), slots
