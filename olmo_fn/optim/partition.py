"""Several optimizers in one step, each for the parameters that a path pattern or their declared axes choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

from olmo_fn import tree
from olmo_fn.core.chain import Grads, Metrics
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Leaf, Scalars, State, Step
from olmo_fn.spec import Spec
from olmo_fn.tree import Tree

BATCH_AXES = ("layers", "experts")
"""Leading axes over which parameters are stacked: a batch, not a side of a matrix."""


def is_matrix(axes: tuple[str, ...]) -> bool:
    """Whether a parameter is a matrix between activations, or a batch of them: not a table of the vocabulary, not a vector.

    >>> is_matrix(("experts", "embed", "mlp")), is_matrix(("vocab", "embed")), is_matrix(("layers", "embed"))
    (True, False, False)
    """
    inner = list(axes)
    while inner and inner[0] in BATCH_AXES:
        inner.pop(0)
    return len(inner) == 2 and not {"vocab", *BATCH_AXES} & set(inner)


KINDS: dict[str, Callable[[tuple[str, ...]], bool]] = {
    "matrix": is_matrix,
    "embedding": lambda axes: "vocab" in axes,
    "vector": lambda axes: len([axis for axis in axes if axis not in BATCH_AXES]) == 1,
}


def partition(groups: Mapping[str | tuple[str, ...], Transform], parameters: Tree) -> Transform:
    """One optimizer a group, with its own learning rate, schedule and weight decay; each parameter is in exactly one.

    A group is chosen by one or several of: a kind, ``matrix`` (two dims, or batches of that along axes ``layers`` and
    ``experts``), ``embedding`` (has a ``vocab`` axis: the embedding and the head), ``vector`` (norms, biases); an axis,
    ``axis:mlp``; a pattern of paths, ``head.*``. The group ``default`` takes what is left. ``parameters`` are the model's
    specs; without kinds and axes, any tree with its paths will do.

    ValueError, which names them, for parameters in no group or in two, and for a choice that chooses nothing. The slot
    ``partition`` holds the counts by group; the metrics gain ``lr/<group>`` of each, and ``lr`` is that of the last one.

    >>> from olmo_fn.models import transformer
    >>> from olmo_fn.models.config import Model
    >>> from olmo_fn.optim.adamw import adamw
    >>> from olmo_fn.optim.muon import muon
    >>> specs = transformer.specs(Model(8, 1, 2, 16))
    >>> partition({"matrix": muon(1e-3), "embed": adamw(1e-2), "default": adamw(1e-3)}, specs).name
    'partition(matrix: muon(...), embed: adamw(...), default: adamw(...))'
    >>> partition({"matrix": muon(1e-3), "vector": adamw(1e-3)}, specs)
    Traceback (most recent call last):
    ValueError: partition: no group takes embed, head.w_out; add a group, such as "default", which takes what is left
    """
    names = {(key if isinstance(key, str) else " ".join(key)).replace(".", ":"): key for key in groups}
    transforms = {name: groups[key] for name, key in names.items()}
    of = assign({name: (key,) if isinstance(key, str) else key for name, key in names.items()}, parameters)
    for name, transform in transforms.items():
        if transform.takes is not Grads or transform.gives is not Step:
            raise ValueError(f"partition: group {name!r} is {transform.name}, which is no optimizer")

    def apply(grads: Grads) -> Step:
        steps: dict[str, Step] = {name: transform(grads) for name, transform in transforms.items()}

        def leaf(path: str) -> Leaf:
            if path not in of:
                raise ValueError(f"partition: {path} is not among the parameters that it was made for")
            inner = steps[of[path]].leaf(path)
            return inner._replace(group=f"{of[path]}/{inner.group}".rstrip("/"))

        def init_control() -> Tree:
            return {"partition": {name: step.init_control() for name, step in steps.items()}}

        def control(state: State, metrics: Metrics) -> tuple[Tree, Scalars, Metrics]:
            slots: Tree = {}
            scalars: Scalars = {}
            rates: Metrics = {}
            for name, step in steps.items():
                own = state._replace(slots={**state.slots, **state.slots["partition"][name]})
                slots[name], found, report = step.control(own, metrics)
                scalars |= {"skip": found["skip"], **{f"{name}/{k}": v for k, v in found.items()}}
                rates |= {f"lr/{name}": report["lr"]}
            return {"partition": slots}, scalars, {**report, **rates}

        return Step(grads, init_control, control, leaf)

    return Transform(f"partition({', '.join(f'{k}: {t.name}' for k, t in transforms.items())})", Grads, Step, apply)


def assign(groups: Mapping[str, tuple[str, ...]], parameters: Tree) -> dict[str, str]:
    """The group of every path.

    >>> assign({"norms": ("*norm",), "rest": ("default",)}, {"w": 0, "q_norm": 0})
    {'q_norm': 'norms', 'w': 'rest'}
    """
    leaves = tree.flatten(parameters)
    of: dict[str, str] = {}
    for name, choices in groups.items():
        for choice in choices:
            chosen = [path for path in leaves if choice != "default" and _chooses(choice, path, leaves[path])]
            if not chosen and choice != "default":
                raise ValueError(f"partition: {choice!r} chooses no parameter; there are {_some(leaves)}")
            for path in chosen:
                if of.setdefault(path, name) != name:
                    raise ValueError(
                        f"partition: {path} is taken by two groups, {of[path]!r} and {name!r}; make one of them narrower"
                    )
    left = [path for path in leaves if path not in of]
    rest = [name for name, choices in groups.items() if "default" in choices]
    if left and not rest:
        raise ValueError(f'partition: no group takes {_some(left)}; add a group, such as "default", which takes what is left')
    return {**of, **dict.fromkeys(left, *rest[:1])}


def _chooses(choice: str, path: str, leaf: Any) -> bool:
    if choice not in KINDS and not choice.startswith("axis:"):
        return fnmatchcase(path, choice)
    if not isinstance(leaf, Spec):
        raise ValueError(f"partition: {choice!r} needs the declared axes; give it the model's specs, not its parameters")
    return KINDS[choice](leaf.axes) if choice in KINDS else choice.removeprefix("axis:") in leaf.axes


def _some(paths: Any, most: int = 8) -> str:
    paths = list(paths)
    return ", ".join(paths[:most]) + (f", … ({len(paths)} in all)" if len(paths) > most else "")
