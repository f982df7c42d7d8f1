"""Muon (Jordan et al. 2024): momentum, orthogonalised. Matrices are (..., in, out), all dims before them are a batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from olmo_fn.core.gradients import Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Scalars, Slots, Step
from olmo_fn.optim.base import Decay, Rule, check_betas, optimizer
from olmo_fn.optim.schedules import Schedule


class NewtonSchulz(NamedTuple):
    """Coefficients (a, b, c) of each iteration, and whether its sums are rounded with their products or after them.

    In bf16 that rounding moves a step by some percent of its largest entry, so to agree with another program is to round as
    it does.
    """

    coefficients: tuple[tuple[float, float, float], ...]
    fused: bool = True


JORDAN = NewtonSchulz(((3.4445, -4.7750, 2.0315),) * 5)
"""The same five times: Jordan's, and those of ``torch.optim.Muon``. Singular values end between 0.7 and 1.2."""
DION = NewtonSchulz(
    (
        (4.0848, -6.8946, 2.9270),
        (3.9505, -6.3029, 2.6377),
        (3.7418, -5.5913, 2.3037),
        (2.8769, -3.1427, 1.2046),
        (2.8366, -3.0525, 1.2012),
    ),
    fused=False,
)
"""Others at each iteration: those of the dion package, and so OLMo-core's. Singular values end closer to 1."""

Scale = Literal["rms", "spectral", "original", "none"]
SCALES: dict[str, Callable[[int, int], float]] = {
    "rms": lambda n_in, n_out: 0.2 * max(n_in, n_out) ** 0.5,
    "spectral": lambda n_in, n_out: (n_out / n_in) ** 0.5,
    "original": lambda n_in, n_out: max(1.0, n_out / n_in) ** 0.5,
    "none": lambda n_in, n_out: 1.0,
}


def muon(
    lr: Schedule | float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: Decay | float = 0.1,
    iteration: NewtonSchulz = DION,
    scale: Scale = "rms",
    dtype: torch.dtype = torch.bfloat16,
    moments: torch.dtype | None = None,
) -> Transform[Grads, Step]:
    """Each matrix moves by its momentum with all singular values set to about 1.

        m = μ m + g          u = orthogonalize(g + μ m if nesterov else m)
        p = p - lr · weight_decay · p - lr · scale · u

    ``scale`` by the matrix's width: ``rms``, 0.2 √max(in, out), gives steps as large as AdamW's, so that its learning rate
    can be kept (Liu et al. 2025, eq. 4); ``spectral``, √(out / in) (Yang et al. 2023); ``original``, √max(1, out / in),
    Jordan's; ``none``. ``iteration`` is DION or JORDAN, in ``dtype``. OLMo-core's is ``muon(lr, nesterov=False)``.

    For matrices only: `olmo_fn.optim.partition` gives embeddings, head, norms and biases to another optimizer. Slot
    ``muon_momentum``.
    """
    check_betas("muon", momentum)
    factor = scale_of("muon", scale)

    def init(path: str, p: Tensor) -> Slots:
        check_matrix("muon", path, p)
        return {"muon_momentum": torch.zeros_like(p, dtype=moments)}

    def update(p: Tensor, g: Tensor, slots: Slots, s: Scalars) -> tuple[Tensor, Slots]:
        m = momentum * slots["muon_momentum"] + g
        u = orthogonalize(g + momentum * m if nesterov else m, iteration, dtype)
        return s["lr"] * factor(*p.shape[-2:]) * u, {"muon_momentum": m}

    return optimizer("muon", Rule(init, update, elementwise=False), lr, weight_decay)


def orthogonalize(m: Tensor, iteration: NewtonSchulz = DION, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """About U Vᵀ of each matrix m = U S Vᵀ (..., in, out), by quintic Newton-Schulz iterations, one a triple (a, b, c).

        x = m / ‖m‖          x = a x + (b x xᵀ + c (x xᵀ)²) x

    The iterations are in ``dtype``, the result in m's.

    >>> orthogonalize(torch.diag(torch.tensor([3.0, 1.0])), dtype=torch.float32).diagonal().round(decimals=1)
    tensor([1., 1.])
    """
    tall = m.shape[-2] > m.shape[-1]
    x = (m.mT if tall else m).to(dtype)  # so that x xᵀ is the smaller product
    x = (x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)).reshape(-1, *x.shape[-2:])
    for a, b, c in iteration.coefficients:
        gram = x @ x.mT
        if iteration.fused:
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        else:
            x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).reshape(m.shape).to(m.dtype)


def scale_of(name: str, scale: str) -> Callable[[int, int], float]:
    """The factor of the learning rate as a function of (in, out)."""
    if scale not in SCALES:
        raise ValueError(f"{name}(scale={scale!r}): there are {', '.join(SCALES)}")
    return SCALES[scale]


def check_matrix(name: str, path: str, p: Tensor) -> None:
    """ValueError if the parameter is not a matrix or a batch of them."""
    if p.ndim < 2:
        raise ValueError(
            f"{name} takes matrices, and {path} has shape {tuple(p.shape)}; give it to another optimizer with "
            f"partition({{'matrix': {name}(...), 'default': adamw(...)}}, specs)"
        )
