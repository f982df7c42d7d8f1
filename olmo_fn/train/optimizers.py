"""The optimizers' settings, one frozen dataclass each. Imports no torch: ``build`` does, when it is called.

A new one, here or in a user's own file (``--use my_parts.py``), is a subclass of `OptimizerSettings` with a ``name``, its own
fields and ``build``; each field's docstring is the help of its flag.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Suppress

from olmo_fn.fields import AT_LEAST_ONE, DECAY, POSITIVE, Range

if TYPE_CHECKING:
    import torch

    from olmo_fn.core.pipe import Transform
    from olmo_fn.optim.base import Decay
    from olmo_fn.optim.schedules import Schedule
    from olmo_fn.tree import Tree

Betas = Annotated[tuple[float, float], DECAY]
Scale = Literal["rms", "spectral", "original", "none"]


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """What every optimizer has."""

    name: Suppress[str] = ""
    """By which ``--optim.name`` chooses it."""
    lr: Annotated[float, POSITIVE] = 4e-4
    """Peak learning rate."""
    weight_decay: float = 0.1
    """Decoupled weight decay, multiplied by the learning rate."""
    no_decay: tuple[str, ...] = ("embed", "*norm", "*bias")
    """Patterns of the parameters without weight decay; just embed is OLMo-core's rule."""
    cautious: bool = False
    """Decay only the entries that the step moves towards zero as well."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        """The optimizer. ``lr`` is the learning rate as a function of the step, ``parameters`` the specs of all parameters, and
        ``dtype`` the compute dtype."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    @property
    def decay(self) -> Decay:
        """Its weight decay."""
        from olmo_fn.optim.base import Decay

        return Decay(self.weight_decay, self.no_decay, self.cautious)


@dataclass(frozen=True, kw_only=True)
class WithMoments(OptimizerSettings):
    """An optimizer that keeps moments as large as the parameters."""

    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype in which moments and momentum are kept."""

    @property
    def shared(self) -> dict[str, Any]:
        """The arguments that such optimizers have in common."""
        import torch

        return {"weight_decay": self.decay, "moments": getattr(torch, self.moments)}


@dataclass(frozen=True, kw_only=True)
class AdamW(WithMoments):
    """Adam with decoupled weight decay."""

    name: Suppress[Literal["adamw"]] = "adamw"
    betas: Betas = (0.9, 0.95)
    """Decay of the first and of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    first_step_bias: bool = False
    """Correct the bias as if each step were the first, as OLMo 2 32B was trained (step_increment_bugfix=False)."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import adamw
        from olmo_fn.transforms import first_step_bias

        found = adamw(lr, self.betas, self.eps, **self.shared)
        return first_step_bias(found) if self.first_step_bias else found


@dataclass(frozen=True, kw_only=True)
class Lion(WithMoments):
    """The sign of an interpolated momentum; its learning rate is about a tenth of AdamW's."""

    name: Suppress[Literal["lion"]] = "lion"
    betas: Betas = (0.9, 0.99)
    """Of the momentum: its part in the step, and its decay."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import lion

        return lion(lr, self.betas, **self.shared)


@dataclass(frozen=True, kw_only=True)
class SGD(WithMoments):
    """Stochastic gradient descent."""

    name: Suppress[Literal["sgd"]] = "sgd"
    momentum: Annotated[float, DECAY] = 0.0
    """Momentum; 0 keeps none."""
    nesterov: bool = False
    """Look ahead by the momentum."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import sgd

        if self.nesterov and not self.momentum:
            raise ValueError("--optim.nesterov needs a momentum in sgd; add --optim.momentum 0.9")
        return sgd(lr, self.momentum, self.nesterov, **self.shared)


@dataclass(frozen=True, kw_only=True)
class Adafactor(OptimizerSettings):
    """Adam's second moment from its row and column means, without a first; the rate is relative to a parameter's size."""

    name: Suppress[Literal["adafactor"]] = "adafactor"
    decay_rate: float = 0.8
    """The second moment of step t is averaged with weight t to the minus this."""
    clip: Annotated[float, POSITIVE] = 1.0
    """Largest root mean square of a step, before the rate."""
    min_rms: float = 1e-3
    """Parameters count as at least this large."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import adafactor

        return adafactor(lr, self.decay_rate, self.clip, min_rms=self.min_rms, weight_decay=self.decay)


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(WithMoments):
    """Schedule-Free AdamW: an average of the iterates instead of a decaying rate; give it a constant schedule."""

    name: Suppress[Literal["schedule-free"]] = "schedule-free"
    betas: Betas = (0.9, 0.95)
    """The average's part in the point of the gradient, and the decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim.schedule_free import schedule_free_adamw

        return schedule_free_adamw(lr, self.betas, self.eps, **self.shared)


@dataclass(frozen=True, kw_only=True)
class ForMatrices(WithMoments):
    """An optimizer of the matrices, with AdamW beside it for the embedding, the head, norms and biases."""

    adamw_lr: Annotated[float | None, POSITIVE] = None
    """Peak learning rate of the AdamW for what is no matrix; the same when not given."""
    eps: float = 1e-8
    """Added to the root of the second moment, in AdamW."""

    def beside(self, matrix: Transform, lr: Schedule, betas: tuple[float, float], parameters: Tree) -> Transform:
        """``matrix`` for the matrices, AdamW for the rest."""
        from olmo_fn.optim import adamw, partition

        times = (self.adamw_lr or self.lr) / self.lr
        rest = adamw(lambda step: times * lr(step), betas, self.eps, **self.shared)
        return partition({"matrix": matrix, "default": rest}, parameters)


@dataclass(frozen=True, kw_only=True)
class Orthogonalised(ForMatrices):
    """Momentum, orthogonalised."""

    momentum: Annotated[float, DECAY] = 0.95
    """Momentum."""
    nesterov: bool = True
    """Look ahead by the momentum; OLMo-core does not."""
    scale: Scale = "rms"
    """By a matrix's width: rms keeps AdamW's learning rates, spectral is √(out / in), original Jordan's."""
    betas: Betas = (0.9, 0.95)
    """Decay of the moments of AdamW."""


@dataclass(frozen=True, kw_only=True)
class Muon(Orthogonalised):
    """Momentum, orthogonalised."""

    name: Suppress[Literal["muon"]] = "muon"

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import muon

        matrix = muon(lr, self.momentum, self.nesterov, scale=self.scale, dtype=dtype, **self.shared)
        return self.beside(matrix, lr, self.betas, parameters)


@dataclass(frozen=True, kw_only=True)
class NorMuon(Orthogonalised):
    """Muon with a learning rate of its own for every output neuron."""

    name: Suppress[Literal["normuon"]] = "normuon"
    beta2: Annotated[float, DECAY] = 0.95
    """Decay of the neurons' mean squares."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import normuon

        matrix = normuon(lr, self.momentum, self.beta2, self.nesterov, scale=self.scale, dtype=dtype, **self.shared)
        return self.beside(matrix, lr, self.betas, parameters)


@dataclass(frozen=True, kw_only=True)
class Dion(ForMatrices):
    """Orthonormal steps of low rank."""

    name: Suppress[Literal["dion"]] = "dion"
    momentum: Annotated[float, DECAY] = 0.95
    """Momentum."""
    rank: Annotated[float, Range(0, 1, above=True)] = 1.0
    """Rank of the steps, as a fraction of a matrix's smaller side."""
    betas: Betas = (0.9, 0.95)
    """Decay of the moments of AdamW."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import dion

        return self.beside(dion(lr, self.momentum, self.rank, **self.shared), lr, self.betas, parameters)


@dataclass(frozen=True, kw_only=True)
class SOAP(ForMatrices):
    """Adam in the eigenbasis of Shampoo's preconditioner."""

    name: Suppress[Literal["soap"]] = "soap"
    betas: Annotated[tuple[float, float] | None, DECAY] = None
    """Decay of the moments, of SOAP and of AdamW; 0.95 0.95 and 0.9 0.95 when not given."""
    shampoo_beta: Annotated[float, DECAY] = 0.95
    """Decay of the preconditioner."""
    every: Annotated[int, AT_LEAST_ONE] = 10
    """Steps between new eigenbases."""
    max_dim: int = 8192
    """A longer side of a matrix keeps its own basis."""

    def build(self, lr: Schedule, parameters: Tree, dtype: torch.dtype) -> Transform:
        from olmo_fn.optim import soap

        own = self.betas or (0.95, 0.95)
        matrix = soap(lr, own, self.shampoo_beta, self.eps, self.every, self.max_dim, **self.shared)
        return self.beside(matrix, lr, self.betas or (0.9, 0.95), parameters)


OPTIMIZERS = (AdamW, Lion, SGD, Adafactor, ScheduleFree, Muon, NorMuon, Dion, SOAP)
