"""Freezing: parameters that take part in the loss and are not trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Execution, Gradients, with_wants
from olmo_fn.core.pipe import FREEZES, Transform
from olmo_fn.core.step import Leaf, Step
from olmo_fn.tree import Tree


def freeze(*patterns: str, parameters: Tree) -> Transform[Step, Step]:
    """Train all but the parameters whose path matches ``patterns``: those get no gradient and no slots, and keep their bits.

    The gradient norm is that of the trained ones. ``parameters`` are the model's specs, or any tree with its paths. Put it
    after the transforms that give every parameter a slot, such as `ema`. ValueError for a pattern that matches nothing,
    or when nothing is left to train.

    >>> freeze("embed", parameters={"embed": 0, "w": 0}).name
    'freeze(embed)'
    """
    _, trained = tree.partition(parameters, patterns)
    if not trained:
        raise ValueError(f"freeze: {', '.join(patterns)} freezes every parameter; leave some to train")
    return _training(tree.flatten(trained).__contains__, f"freeze({', '.join(patterns)})")


def train_only(*patterns: str, parameters: Tree) -> Transform[Step, Step]:
    """Freeze all but the parameters whose path matches ``patterns``; see `freeze`.

    >>> train_only("lora.*", parameters={"lora": {"a": 0}, "w": 0}).name
    'train_only(lora.*)'
    """
    trained = tree.partition(parameters, patterns)[0]
    return _training(tree.flatten(trained).__contains__, f"train_only({', '.join(patterns)})")


def _training(trains: Callable[[str], bool], name: str) -> Transform[Step, Step]:
    def apply(inner: Step) -> Step:
        def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
            return inner.grads.fn(params, batch, with_wants(execution, trains))

        def leaf(path: str) -> Leaf:
            return inner.leaf(path) if trains(path) else FROZEN

        return replace(inner, grads=replace(inner.grads, fn=gradients), leaf=leaf)

    return Transform(name, Step, Step, apply, frozenset({FREEZES}))


FROZEN = Leaf(init=lambda p: {}, update=lambda p, g, slots, scalars: (p, slots))
