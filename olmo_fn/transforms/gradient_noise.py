"""Noise on the gradients (Neelakantan et al. 2015): a transform whose numbers depend on the step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Execution, Gradients, Grads
from olmo_fn.core.pipe import NOISES, Transform
from olmo_fn.core.random import normal
from olmo_fn.tree import Tree


def gradient_noise(std: float | Callable[[Tensor], Tensor], seed: int | Tensor = 0) -> Transform[Grads, Grads]:
    """Add to every entry of the gradient a normal number of deviation ``std``, a number or a function of the step (from 1).

        g = g + std(step) · n          with n a function of (seed, step, path, entry) alone: `olmo_fn.core.random.normal`

    The paper's deviations are ``lambda step: (eta / step**0.55) ** 0.5``. It goes after ``accumulate``, and before ``clip``.
    Several seeds at once: build the pipe inside the function that is vmapped, with ``seed`` a tensor.

    >>> gradient_noise(0.01).name
    'gradient_noise(0.01, seed=0)'
    """

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            found = inner.fn(params, batch, execution).finished(execution)
            placement, step = execution.layout.placement, execution.step
            step = torch.tensor(0) if step is None else step
            size = std(step + 1) if callable(std) else std

            def noisy(path: str, g: Tensor) -> Tensor:
                return g + (size * normal(seed, step, path, placement.entries(path, g))).to(g.dtype)

            return found._replace(tree=tree.map_with_path(noisy, found.tree))

        return replace(inner, fn=gradients)

    name = f"gradient_noise({'...' if callable(std) else std}, seed={seed if isinstance(seed, int) else '...'})"
    return Transform(name, Grads, Grads, apply, frozenset({NOISES}))
