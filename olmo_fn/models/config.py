"""What a model is: frozen settings, and the functions that make one. Imports no torch.

A model is blocks over its depth; a block has a mixer (of positions) and a feed-forward network. Each is a dataclass of settings
with a ``name`` and a ``build``, and somebody else's are as good as these.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal

import tyro

from olmo_fn.fields import POSITIVE, Range
from olmo_fn.models.settings.attention import Attention
from olmo_fn.models.settings.block import Block, Hybrid, InPlace, Normalized, PeriNorm, PreNorm, ScaledNorm
from olmo_fn.models.settings.feed_forward import GELU, GeGLU, ScaledSwiGLU, SwiGLU
from olmo_fn.models.settings.gated_delta import GatedDelta
from olmo_fn.models.settings.moe import MoE
from olmo_fn.models.settings.norm import LayerNorm, NormSettings, RMSNorm
from olmo_fn.models.settings.sublayer import WIDTH, FeedForwardSettings, MixerSettings, check_positive

__all__ = [
    "GELU",
    "Attention",
    "Block",
    "FeedForwardSettings",
    "GatedDelta",
    "GeGLU",
    "Head",
    "Hybrid",
    "LayerNorm",
    "MixerSettings",
    "MoE",
    "Model",
    "MultiToken",
    "NormSettings",
    "Normalized",
    "PeriNorm",
    "PreNorm",
    "RMSNorm",
    "ScaledNorm",
    "ScaledSwiGLU",
    "SwiGLU",
    "dense",
    "modified",
]

InitMethod = Literal["normal", "llama", "llama_depth", "normalized", "fan_in"]


@dataclass(frozen=True, kw_only=True)
class Head:
    """From the last block's output to logits."""

    norm: bool = True
    """The model's norm comes first."""
    bias: bool = False
    """A bias for each token."""
    scales: bool = False
    """A learned scale for each token's logit (nGPT)."""
    cap: Annotated[float | None, POSITIVE] = None
    """Logits are c tanh(logit / c) (Gemma 2)."""


@dataclass(frozen=True, kw_only=True)
class MultiToken:
    """Modules that predict further tokens than the next while training (DeepSeek-V3); decoding leaves them out."""

    depth: Annotated[int, Range(0, 64)] = 0
    """How many further tokens."""
    weight: Annotated[float, POSITIVE] = 0.3
    """Weight in the loss of the mean of their cross entropies."""


@dataclass(frozen=True)
class Model:
    """A decoder-only language model: an embedding, blocks, a norm and a head."""

    d_model: Annotated[int, WIDTH]
    """Width of the residual stream."""
    n_layers: Annotated[int, Range(1, 1024)]
    """Number of blocks."""
    vocab_size: Annotated[int, Range(1, 1 << 31)] = 100_352
    """Rows of the embedding and of the head; the default is dolma2's 100,278 rounded up to a multiple of 128."""
    block: Annotated[Any, InPlace] = field(default_factory=Block)
    """What every layer is."""
    pattern: tyro.conf.Suppress[tuple[Block, ...]] = ()
    """Blocks that are repeated over the depth instead; only in Python and YAML."""
    norm: Any = field(default_factory=RMSNorm)
    """The norm of the stream."""
    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    embed_scale: Annotated[float | None, POSITIVE] = None
    """Multiply embeddings by this (Gemma: sqrt(d_model))."""
    embed_norm: bool = False
    """A norm behind the embedding."""
    head: Head = Head()
    """From the last block's output to logits."""
    multi_token: MultiToken = MultiToken()
    """Further tokens that are predicted beside the next one."""
    tie_embeddings: bool = False
    """Use the embedding as the head's matrix."""
    init_method: InitMethod = "normal"
    """How the standard deviations of the initial weights depend on width and depth."""
    init_std: float = 0.02
    """Standard deviation of the initial weights where the method has one."""

    @property
    def layers(self) -> tuple[Any, ...]:
        """The settings of each block."""
        pattern = self.pattern or (self.block,)
        return tuple(pattern[i % len(pattern)] for i in range(self.n_layers))

    @property
    def drops(self) -> bool:
        """Whether training wants to know the numbers of sequences, by which entries are dropped."""
        return any(getattr(block, "dropout", 0) or block.feed_forward.drops for block in self.pattern or (self.block,))

    @property
    def balance_rate(self) -> float:
        """How far biases of experts move in a step (`olmo_fn.transforms.balance`); 0 without any."""
        return max(block.feed_forward.balance_rate for block in self.pattern or (self.block,))

    @property
    def num_experts(self) -> int:
        """The most experts of a layer; 0 of a dense model."""
        return max(block.feed_forward.num_experts for block in self.pattern or (self.block,))

    def deviations(self, layer: int) -> tuple[float, float]:
        """Standard deviations of the initial matrices of a block: of those that read the stream, and of those that add to it.

        OLMo-core's table of init methods. ``fan_in``'s for the latter is up to the sublayer.
        """
        if self.init_method in ("llama", "llama_depth"):
            depth = 2 * self.n_layers if self.init_method == "llama" else 2 * (layer + 1)
            return self.init_std, self.init_std / depth**0.5
        if self.init_method == "normalized":
            return self.d_model**-0.5, self.d_model**-0.5 / (2 * self.n_layers) ** 0.5
        return (self.d_model**-0.5,) * 2 if self.init_method == "fan_in" else (self.init_std,) * 2

    def check(self) -> None:
        """Raise ValueError, in one line with the fix, if the numbers do not fit together."""
        check_positive(self, "d_model", "n_layers", "vocab_size")
        for block in self.pattern or (self.block,):
            block.mixer.check(self)
            block.feed_forward.check(self)
            if isinstance(block, Hybrid):
                block.dense.check(self)
                block.check()

    def check_mesh(self, tp: int, cp: int, cp_method: str, ep: int = 1) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share the blocks."""
        if ep > 1 and not self.num_experts:
            raise ValueError(f"--mesh.ep is {ep}, and the model has no experts; leave --mesh.ep at 1")
        for block in self.pattern or (self.block,):
            block.feed_forward.check_experts(ep)
            block.mixer.check_mesh(self, tp, cp, cp_method)
            block.feed_forward.check_mesh(self, tp, cp, cp_method)
            if isinstance(block, Hybrid):
                block.dense.check_mesh(self, tp, cp, cp_method)


def dense(d_model: int, n_layers: int, n_heads: int, hidden_size: int, **changes: Any) -> Model:
    """A dense OLMo 2: the same block in every layer. ``changes`` are fields of the model, of its attention or feed-forward.

    >>> dense(64, 2, 4, 96, n_kv_heads=2, vocab_size=100).block.mixer.kv_heads
    2
    """
    return modified(Model(d_model, n_layers), n_heads=n_heads, hidden_size=hidden_size, **changes)


def modified(model: Model, **changes: Any) -> Model:
    """The model with other values of fields, its own or those of its block's mixer and feed-forward network.

    >>> modified(dense(64, 2, 4, 96), n_kv_heads=2, norm_eps=1e-5).block.mixer.n_kv_heads
    2
    """

    def take(settings: Any) -> Any:
        mine = {f.name: changes.pop(f.name) for f in fields(settings) if f.name in changes and f.name != "name"}
        return replace(settings, **mine)

    model = take(model)
    parts = {
        name: take(getattr(model.block, name)) for name in ("mixer", "feed_forward", "dense") if hasattr(model.block, name)
    }
    if changes:
        raise ValueError(f"the model has no {', '.join(changes)}")
    return replace(model, block=replace(model.block, **parts))
