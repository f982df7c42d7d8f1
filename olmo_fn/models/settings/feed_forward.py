"""Settings of feed-forward networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import tyro

from olmo_fn.models.settings.sublayer import WIDTH, FeedForwardSettings, check_positive

if TYPE_CHECKING:
    from olmo_fn.models.config import Model
    from olmo_fn.nn.sublayer import Sublayer

Activation: TypeAlias = Literal["silu", "gelu-tanh", "gelu"]


@dataclass(frozen=True, kw_only=True)
class Gated(FeedForwardSettings):
    """A gated feed-forward network (Shazeer 2020)."""

    hidden_size: Annotated[int, WIDTH] = 8192
    """Width of the feed-forward network."""
    feed_forward_bias: bool = False
    """Biases in its three matrices."""

    activation: ClassVar[Activation] = "silu"
    scales: ClassVar[bool] = False

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.feed_forward import GatedForm, gated_sublayer

        std, up, down = _feed_forward_deviations(self.hidden_size, model, layer)
        form = GatedForm(
            d_model=model.d_model,
            hidden=self.hidden_size,
            std=std,
            std_up=up,
            std_down=down,
            activation=self.activation,
            bias=self.feed_forward_bias,
            scales=self.scales,
        )
        return gated_sublayer(form)

    def check(self, model: Model) -> None:
        """ValueError, in one line, if the numbers do not fit together."""
        check_positive(self, "hidden_size")


def _feed_forward_deviations(hidden_size: int, model: Model, layer: int) -> tuple[float, float, float]:
    """Of the gate, of what goes up, and of what goes down."""
    std, residual = model.deviations(layer)
    up = residual if model.init_method in ("llama", "llama_depth") else std
    return std, up, hidden_size**-0.5 if model.init_method == "fan_in" else residual


@dataclass(frozen=True, kw_only=True)
class SwiGLU(Gated):
    """A gated feed-forward network (Shazeer 2020)."""

    name: tyro.conf.Suppress[Literal["swiglu"]] = "swiglu"


@dataclass(frozen=True, kw_only=True)
class GeGLU(Gated):
    """The same with GELU, by its approximation with tanh (Gemma)."""

    name: tyro.conf.Suppress[Literal["geglu"]] = "geglu"
    activation: ClassVar[Activation] = "gelu-tanh"


@dataclass(frozen=True, kw_only=True)
class ScaledSwiGLU(Gated):
    """SwiGLU with learned scales of its hidden features (nGPT)."""

    name: tyro.conf.Suppress[Literal["scaled-swiglu"]] = "scaled-swiglu"
    scales: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class GELU(FeedForwardSettings):
    """A feed-forward network without a gate (GPT-2)."""

    name: tyro.conf.Suppress[Literal["gelu"]] = "gelu"
    hidden_size: Annotated[int, WIDTH] = 8192
    """Width of the feed-forward network."""
    activation: Activation = "gelu-tanh"
    """What is between the two matrices."""
    feed_forward_bias: bool = False
    """Biases in both matrices."""

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.feed_forward import plain_sublayer

        std, _, down = _feed_forward_deviations(self.hidden_size, model, layer)
        sizes = model.d_model, self.hidden_size
        return plain_sublayer(*sizes, activation=self.activation, bias=self.feed_forward_bias, std=std, std_down=down)

    def check(self, model: Model) -> None:
        """ValueError, in one line, if the numbers do not fit together."""
        check_positive(self, "hidden_size")


FEED_FORWARDS: tuple[Any, ...] = (SwiGLU, GeGLU, ScaledSwiGLU, GELU)
