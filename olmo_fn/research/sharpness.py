"""Sharpness: the largest eigenvalue of the loss's Hessian, by Lanczos with Hessian-vector products."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.func import grad, jvp

from olmo_fn import tree
from olmo_fn.core.chain import Batch, LossFunction, loss_tokens
from olmo_fn.tree import Tree


class Eigen(NamedTuple):
    """An eigenvalue and its unit vector, shaped like the parameters; some eigenvalue lies within ``residual`` of ``value``.

    ``products``: Hessian-vector products that it took.
    """

    value: float
    residual: float
    vector: Tree
    products: int


def mean_loss(loss: LossFunction, batch: Batch) -> Callable[[Tree], Tensor]:
    """The loss a token of ``batch`` as a function of the parameters alone, which is what training descends."""
    return lambda params: loss(params, batch)[0] / loss_tokens(batch)


def hessian_product(f: Callable[[Tree], Tensor], params: Tree) -> Callable[[Tree], Tree]:
    """``v -> ∇²f(params) v``, the derivative of the gradient along v (Pearlmutter 1994), for the price of about two gradients.

    >>> product = hessian_product(lambda p: (p["w"] ** 3).sum(), {"w": torch.tensor([1.0, 2.0])})
    >>> product({"w": torch.tensor([1.0, 1.0])})
    {'w': tensor([ 6., 12.])}
    """
    return lambda v: jvp(grad(f), (params,), (v,))[1]


def sharpness(
    loss: LossFunction,
    params: Tree,
    batch: Batch,
    *,
    tolerance: float = 1e-3,
    most: int = 100,
    start: Tree | None = None,
) -> Eigen:
    """The largest eigenvalue of the Hessian of the mean loss of ``batch``.

    Gradient descent with learning rate η is stable up to a sharpness of 2 / η, and deep networks train at that edge
    (Cohen et al. 2021, arXiv 2103.00065). ``start``: a vector to begin with, such as the last call's; random when not given.

    >>> def loss(params, batch):
    ...     return (params["w"] ** 2 * batch["labels"]).sum(), {}
    >>> found = sharpness(loss, {"w": torch.ones(3)}, {"labels": torch.tensor([1, 9, 2])})
    >>> round(found.value, 3)  # 2 · 9 / 3 labels
    6.0
    """
    return top_eigenvalue(hessian_product(mean_loss(loss, batch), params), start or _random(params), tolerance, most)


def top_eigenvalue(product: Callable[[Tree], Tree], start: Tree, tolerance: float = 1e-3, most: int = 100) -> Eigen:
    """The largest eigenvalue of the symmetric linear map ``product`` (Lanczos 1950, fully reorthogonalised).

    Stops when the residual is at most ``tolerance`` times the value, or after ``most`` products. Keeps one vector as large
    as the parameters a product. ``start`` must not be orthogonal to the eigenvector; a random one never is.

    >>> matrix = torch.diag(torch.tensor([-9.0, 1.0, 3.0]))
    >>> round(top_eigenvalue(lambda v: {"x": matrix @ v["x"]}, {"x": torch.ones(3)}).value, 4)
    3.0
    """
    shapes = tree.map(lambda p: p.shape, start)
    q = _flat(start)
    basis = (q / q.norm())[None]  # (k, N)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    while True:
        w = _flat(product(_unflat(basis[-1], shapes)))
        alphas.append(w @ basis[-1])
        for _ in range(2):  # once leaves a part as large as rounding, which grows
            w = w - basis.T @ (basis @ w)
        beta = w.norm()
        off = torch.stack(betas).double() if betas else torch.zeros(0, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(torch.diag(torch.stack(alphas).double()) + torch.diag(off, 1) + torch.diag(off, -1))
        residual = float(beta * vectors[-1, -1].abs())
        if residual <= tolerance * abs(float(values[-1])) or len(alphas) == min(most, len(q)):
            vector = vectors[:, -1].to(basis) @ basis
            return Eigen(float(values[-1]), residual, _unflat(vector / vector.norm(), shapes), len(alphas))
        betas.append(beta)
        basis = torch.cat((basis, (w / beta)[None]))


def _random(params: Tree) -> Tree:
    generator = torch.Generator().manual_seed(0)
    return tree.map(lambda p: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device), params)


def _flat(v: Tree) -> Tensor:
    return torch.cat([x.reshape(-1) for _, x in tree.items(v)])


def _unflat(v: Tensor, shapes: Tree) -> Tree:
    sizes = [shape.numel() for _, shape in tree.items(shapes)]
    parts = iter(v.split(sizes))
    return tree.map(lambda shape: next(parts).view(shape), shapes)
