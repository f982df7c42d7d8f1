"""Settings of blocks: each kind is a function of `olmo_fn.models.blocks`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.fields import Range
from olmo_fn.models.settings.attention import Attention
from olmo_fn.models.settings.feed_forward import SwiGLU
from olmo_fn.models.settings.moe import MoE

if TYPE_CHECKING:
    from olmo_fn.models.blocks import Part, Residuals
    from olmo_fn.models.config import Model
    from olmo_fn.nn.norm import Norm
    from olmo_fn.nn.sublayer import Sublayer

PLACES = 1 << 20
"""Where the numbers of third residuals begin, behind those of the first and second ones of all blocks."""
InPlace = tyro.conf.arg(name="")
"""The fields of a nested value are flags of their own, without its name before them: ``--model.n-heads``."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block: the mixer, then the feed-forward network, each with a norm on its output and a residual around both (OLMo 2)."""

    name: tyro.conf.Suppress[str] = "reordered"
    mixer: Annotated[Any, InPlace] = field(default_factory=Attention)
    """What mixes positions."""
    feed_forward: Annotated[Any, InPlace] = field(default_factory=SwiGLU)
    """What works on each position."""

    attention_factor: float = 1.0
    """What the mixer's output is multiplied by before it is added to the stream."""
    feed_forward_factor: float = 1.0
    """The same for the feed-forward network."""

    dropout: Annotated[float, Range(0, 1, below=True)] = 0.0
    """Share of the entries of both sublayers' outputs that are dropped while training."""

    def parts(self, model: Model, layer: int) -> tuple[Part, ...]:
        """The parts of block ``layer``: override `combine` for another kind of block."""
        mixer, feed_forward = self.mixer.build(model, layer), self.feed_forward.build(model, layer)
        return self.combine(mixer, feed_forward, self.norm_of(model, layer), self.residuals(layer))

    def norm_of(self, model: Model, layer: int) -> Norm:
        """The norm of block ``layer``."""
        return model.norm.build(model.norm_eps)

    def residuals(self, layer: int) -> Residuals:
        """How the two sublayers' outputs are added to the stream."""
        from olmo_fn.nn.residual import Residual

        factors = self.attention_factor, self.feed_forward_factor
        first, second = (Residual(factor, self.dropout, 2 * layer + i) for i, factor in enumerate(factors))
        return first, second

    def combine(self, mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals) -> tuple[Part, ...]:
        """How the two sublayers are put together: a function of `olmo_fn.models.blocks`, or your own."""
        from olmo_fn.models.blocks import reordered

        return reordered(mixer, feed_forward, norm, residuals)


@dataclass(frozen=True, kw_only=True)
class PreNorm(Block):
    """A block with the norms on the sublayers' inputs (Llama, Qwen)."""

    name: tyro.conf.Suppress[str] = "pre-norm"

    def combine(self, mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals) -> tuple[Part, ...]:
        """``x + f(norm(x))`` for each."""
        from olmo_fn.models.blocks import pre_norm

        return pre_norm(mixer, feed_forward, norm, residuals)


@dataclass(frozen=True, kw_only=True)
class PeriNorm(Block):
    """A block with norms on the sublayers' inputs and outputs (Gemma 2 and 3)."""

    name: tyro.conf.Suppress[str] = "peri-norm"

    def combine(self, mixer: Sublayer, feed_forward: Sublayer, norm: Norm, residuals: Residuals) -> tuple[Part, ...]:
        """``x + norm(f(norm(x)))`` for each."""
        from olmo_fn.models.blocks import peri_norm

        return peri_norm(mixer, feed_forward, norm, residuals)


@dataclass(frozen=True, kw_only=True)
class ScaledNorm(PreNorm):
    """Norms on the inputs, divided by the square root of the block's number from 1 on (layer-norm scaling, Sun et al. 2025)."""

    name: tyro.conf.Suppress[str] = "scaled-norm"

    def norm_of(self, model: Model, layer: int) -> Norm:
        """The norm of block ``layer``."""
        return super().norm_of(model, layer)._replace(factor=(layer + 1) ** -0.5)


@dataclass(frozen=True, kw_only=True)
class Normalized(Block):
    """A block that moves the stream along the unit sphere (nGPT); it has no norms with gains, and no factors."""

    name: tyro.conf.Suppress[str] = "normalized"

    def parts(self, model: Model, layer: int) -> tuple[Part, ...]:
        """The parts of block ``layer``."""
        from olmo_fn.models.blocks import normalized

        return normalized(self.mixer.build(model, layer), self.feed_forward.build(model, layer), model.d_model)


@dataclass(frozen=True, kw_only=True)
class Hybrid(Block):
    """A dense and a sparse feed-forward network side by side; the experts see the block's input (OLMo-core's moe_hybrid)."""

    name: tyro.conf.Suppress[str] = "hybrid"
    feed_forward: Annotated[Any, InPlace] = field(default_factory=MoE)
    """The sparse one, with experts."""
    dense: Annotated[Any, InPlace] = field(default_factory=SwiGLU)
    """The dense one."""
    norms: Literal["output", "input"] = "output"
    """Whether there is a norm on the output of each sublayer (OLMo 2), or on its input (Llama)."""

    def parts(self, model: Model, layer: int) -> tuple[Part, ...]:
        """The one part of block ``layer``."""
        from olmo_fn.models.blocks import hybrid, hybrid_pre_norm

        mixer, dense, experts = (one.build(model, layer) for one in (self.mixer, self.dense, self.feed_forward))
        first, second = self.residuals(layer)
        third = second._replace(place=PLACES + layer)
        make = hybrid if self.norms == "output" else hybrid_pre_norm
        return make(mixer, dense, experts, self.norm_of(model, layer), (first, second, third))

    def check(self) -> None:
        """ValueError, in one line, unless there is a dense network and one with experts."""
        sparse = self.feed_forward
        if not sparse.num_experts or self.dense.num_experts:
            raise ValueError(
                f"a hybrid block has experts (feed_forward, which is {sparse.name}) and a dense network (dense, which is "
                f"{self.dense.name}) beside them; choose --model.feed-forward.name moe, and another for dense"
            )
        if getattr(sparse, "dense_layers", 0):
            raise ValueError(
                f"--model.dense-layers is {sparse.dense_layers}, and every hybrid block has a dense network anyway; leave "
                "it at 0"
            )


BLOCKS: tuple[Any, ...] = (Block, PreNorm, PeriNorm, ScaledNorm, Normalized, Hybrid)
