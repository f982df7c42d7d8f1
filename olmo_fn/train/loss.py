"""The loss's settings. Imports no torch: ``build`` does, when it is called."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Suppress

from olmo_fn.fields import Range

if TYPE_CHECKING:
    from olmo_fn.models.config import Model


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What is minimised. A user's own file may add one: a subclass with a ``name``, fields and ``build``."""

    name: Suppress[str] = ""
    """By which ``--loss.name`` chooses it."""

    def build(self, model: Model) -> Any:
        """The loss of a model, as `olmo_fn.core.pipe.pipe` takes it: ``(params, batch) -> (sum of losses, metrics)``."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(LossSettings):
    """Cross entropy of the next token."""

    name: Suppress[Literal["cross-entropy"]] = "cross-entropy"
    z_loss: Annotated[float, tyro.conf.arg(aliases=["--recipe.z-loss"])] = 1e-5
    """Weight of the squared log-partition in the loss."""

    sources: Annotated[int, Range(0, 1 << 16)] = 0
    """Report the loss of each of so many sources of --data.mix, which are all that it has, as loss/NAME; 0: of none."""

    def build(self, model: Model) -> Any:
        from olmo_fn.models import transformer

        return transformer.loss(model, z_loss=self.z_loss, sources=self.sources)


LOSSES = (CrossEntropy,)
