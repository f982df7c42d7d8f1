"""Is the gradient the derivative? Every parameter against finite differences, under every engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Chain, LossFunction
from olmo_fn.core.gradients import Engine
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.research.sharpness import mean_loss
from olmo_fn.tree import Tree


class Checked(NamedTuple):
    """One parameter along one direction: what the differences say, what the gradient says.

    ``error``: their difference over the norm of the parameter's gradient.
    """

    engine: str
    path: str
    difference: float
    gradient: float
    error: float


def check_gradients(
    loss: LossFunction, params: Tree, batch: Batch, *, directions: int = 2, tolerance: float = 1e-6, seed: int = 0
) -> list[Checked]:
    """Compare the gradient of each parameter with differences of the loss, in fp64; ValueError names those that are wrong.

    Along random unit vectors v of one parameter, with engine func and, for a `Chain`, engine tape:

        ⟨∇f, v⟩  =  (8 (f(hv) - f(-hv)) - (f(2hv) - f(-2hv))) / 12h  +  O(h⁴)        (Abramowitz & Stegun 25.3.21)

    within ``tolerance`` times the norm of the parameter's gradient. Four losses a parameter and direction: for small models.
    The loss must keep fp64 when it gets it.

    >>> def loss(params, batch):
    ...     return ((params["w"].sin() - batch["labels"]) ** 2).sum(), {}
    >>> found = check_gradients(loss, {"w": torch.tensor([0.3, 0.8])}, {"labels": torch.tensor([1, 0])})
    >>> max(c.error for c in found) < 1e-10
    True
    """
    params = tree.map(Tensor.double, params)
    f = mean_loss(loss, batch)
    engines: tuple[Engine, ...] = ("func", "tape") if isinstance(loss, Chain) else ("func",)
    grads = {engine: pipe(loss, grad(engine, dtype=torch.float64))(params, batch)[0] for engine in engines}
    generator = torch.Generator().manual_seed(seed)
    found: list[Checked] = []
    for path, p in tree.items(params):
        for _ in range(directions):
            v = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
            v = v / v.norm()
            difference = slope(lambda t, path=path, p=p, v=v: float(f(tree.replace(params, path, p + t * v))))  # type: ignore[misc]
            for engine in engines:
                g = tree.at(grads[engine], path)
                along = float((g * v).sum())
                error = abs(along - difference) / max(float(g.norm()), abs(difference), 1e-12)
                found.append(Checked(engine, path, difference, along, error))
    wrong: dict[str, list[Checked]] = {}
    for c in found:
        if not c.error <= tolerance:
            wrong.setdefault(c.path, []).append(c)
    if wrong:
        said = "; ".join(f"{path} ({_describe(checks)})" for path, checks in wrong.items())
        raise ValueError(f"the gradient is not the derivative of the loss for {said}")
    return found


def slope(f: Callable[[float], float], h: float = 1e-3) -> float:
    """The derivative of ``f`` at 0 by central differences of fourth order.

    >>> round(slope(lambda t: (1 + t) ** 3), 9)
    3.0
    """
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def _describe(checks: list[Checked]) -> str:
    engines = list(dict.fromkeys(c.engine for c in checks))
    worst = max(checks, key=lambda c: c.error)
    name = f"engine{'s' if len(engines) > 1 else ''} {', '.join(engines)}"
    return f"{name}: {worst.gradient:.6g}, differences say {worst.difference:.6g}"
