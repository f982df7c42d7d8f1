"""Other ways to clip than by the global norm (`olmo_fn.core.pipe.clip`): by value, and by groups of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metrics
from olmo_fn.core.gradients import Execution, Gradients, Grads
from olmo_fn.core.pipe import CLIPS, Transform
from olmo_fn.tree import Tree


def clip_value(largest: float) -> Transform[Grads, Grads]:
    """Bring every entry of the gradient into [-largest, largest].

    An infinite entry stays: it must not look like a large one, so that the step is skipped. The norm that is reported
    is the one after this.
    """
    if not largest > 0:
        raise ValueError(f"clip_value({largest}): the largest value must be positive")

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            found = inner.fn(params, batch, execution).finished(execution)
            clipped = tree.map(lambda g: g.copy_(torch.where(g.isinf(), g, g.clamp(-largest, largest))), found.tree)
            return found._replace(tree=clipped)

        return replace(inner, fn=gradients)

    return Transform(f"clip_value({largest})", Grads, Grads, apply, frozenset({CLIPS}))


def clip_groups(max_norms: Mapping[str, float], parameters: Tree) -> Transform[Grads, Grads]:
    """Clip groups of parameters each by its own norm; ``max_norms`` is from a pattern of paths to the largest norm.

    Parameters that match no pattern are in the group ``default``. ``parameters``: the model's specs, or any tree with
    its paths. ValueError with the names for a pattern that matches nothing, a parameter that matches two, and for parameters
    that match none if there is no ``default``. The metrics gain ``grad_norm`` and ``grad_norm/<group>``, all from before.

    >>> clip_groups({"embed": 0.1, "default": 1.0}, {"embed": 0, "w": 0}).name
    'clip_groups(embed: 0.1, default: 1.0)'
    """
    group_of = _groups(max_norms, parameters)
    members = {group: [path for path, of in group_of.items() if of == group] for group in max_norms}

    def apply(inner: Grads) -> Grads:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            grads, metrics, signals = inner.fn(params, batch, execution).finished(execution)
            flat = tree.flatten(grads)
            norms: Metrics = {}
            for group, max_norm in max_norms.items():
                part = {path: flat[path] for path in members[group] if path in flat}
                if part:
                    norms[f"grad_norm/{group}"] = execution.layout.sharing.norm(part)
                    scale = (max_norm / norms[f"grad_norm/{group}"]).clamp(max=1.0)
                    tree.map(lambda g, scale=scale: g.mul_(scale), part)
            whole = torch.linalg.vector_norm(torch.stack(list(norms.values())))
            return Gradients(grads, {**metrics, **norms, "grad_norm": whole}, signals)

        return replace(inner, fn=gradients)

    words = ", ".join(f"{k}: {v}" for k, v in max_norms.items())
    return Transform(f"clip_groups({words})", Grads, Grads, apply, frozenset({CLIPS}))


def _groups(patterns: Mapping[str, float], parameters: Tree) -> dict[str, str]:
    group_of: dict[str, str] = {}
    for pattern in patterns:
        if pattern != "default":
            for path in tree.flatten(tree.partition(parameters, [pattern])[0]):
                if path in group_of:
                    raise ValueError(f"clip_groups: {path} is in two groups, {group_of[path]!r} and {pattern!r}; narrow one")
                group_of[path] = pattern
    left = [path for path in tree.flatten(parameters) if path not in group_of]
    if left and "default" not in patterns:
        raise ValueError(f'clip_groups: no group has {", ".join(left[:6])}; add "default", which takes what is left')
    return {**group_of, **dict.fromkeys(left, "default")}
