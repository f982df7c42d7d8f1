"""Settings of the norm of a model's stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

if TYPE_CHECKING:
    from olmo_fn.nn.norm import Norm


@dataclass(frozen=True, kw_only=True)
class NormSettings:
    """What a norm's settings must have: ``build``, which gives an `olmo_fn.nn.norm.Norm`."""

    name: tyro.conf.Suppress[str] = ""

    def build(self, eps: float) -> Norm:
        """The norm."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


@dataclass(frozen=True, kw_only=True)
class RMSNorm(NormSettings):
    """Root-mean-square norm (Zhang & Sennrich 2019)."""

    name: tyro.conf.Suppress[Literal["rms"]] = "rms"
    zero_centred: bool = False
    """The gain is what is added to one (Gemma), so that weight decay draws it to one."""

    def build(self, eps: float) -> Norm:
        """The norm."""
        from olmo_fn.nn.norm import Norm

        return Norm(eps, zero_centred=self.zero_centred)


@dataclass(frozen=True, kw_only=True)
class LayerNorm(NormSettings):
    """Layer norm (Ba et al. 2016)."""

    name: tyro.conf.Suppress[Literal["layer"]] = "layer"
    bias: bool = True
    """It has a bias beside its gain."""

    def build(self, eps: float) -> Norm:
        """The norm."""
        from olmo_fn.nn.norm import Norm

        return Norm(eps, "layer", bias=self.bias)


NORMS: tuple[Any, ...] = (RMSNorm, LayerNorm)
