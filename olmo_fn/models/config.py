"""What a model is: frozen settings, and the sizes of the OLMo 2 and OLMo 3 families. Imports no torch.

A model is blocks over its depth; a block has a mixer (of positions) and a feed-forward network. Each is a dataclass of settings
with a ``name`` and a ``build``, and somebody else's are as good as these.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from math import isqrt
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from olmo_fn.fields import SIGNED, Range

if TYPE_CHECKING:
    from olmo_fn.models.blocks import Part
    from olmo_fn.nn.sublayer import Sublayer

InitMethod = Literal["normal", "llama", "llama_depth", "normalized", "fan_in"]
WIDTH = Range(1, 1 << 24)
InPlace = tyro.conf.arg(name="")
"""The fields of a nested value are flags of their own, without its name before them: ``--model.n-heads``."""


@dataclass(frozen=True, kw_only=True)
class MixerSettings:
    """What a mixer's settings must have: a ``name``, and ``build``. Derive your own from it."""

    name: tyro.conf.Suppress[str] = ""

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        raise NotImplementedError(f"{type(self).__name__} has no build")

    def check(self, model: Model) -> None:
        """ValueError, in one line with the fix, if the numbers do not fit together."""

    def check_mesh(self, model: Model, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share it."""


@dataclass(frozen=True, kw_only=True)
class FeedForwardSettings(MixerSettings):
    """What the settings of a feed-forward network must have: the same as a mixer's."""


@dataclass(frozen=True, kw_only=True)
class Attention(MixerSettings):
    """Grouped-query attention with QK-norm over all heads, rotary positions and sliding windows, as in OLMo 2 and 3."""

    name: tyro.conf.Suppress[Literal["attention"]] = "attention"
    n_heads: Annotated[int, WIDTH] = 16
    """Query heads."""
    n_kv_heads: Annotated[int | None, WIDTH] = None
    """Key and value heads (grouped-query attention); as many as query heads when not given."""
    head_dim: Annotated[int | None, WIDTH] = None
    """Width of a head; d_model / n_heads when not given."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    window_pattern: Annotated[tuple[int, ...], SIGNED] = ()
    """Sliding windows of the layers, repeated over the depth: tokens that a position sees, itself included; -1 sees all."""
    first_layer_full: bool = False
    """Give the first layer full attention and start the pattern at the second."""
    last_layer_full: bool = True
    """Give the last layer full attention."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    def width(self, d_model: int) -> int:
        """Width of a head."""
        return self.head_dim if self.head_dim is not None else d_model // self.n_heads

    def window(self, layer: int, n_layers: int) -> int | None:
        """The sliding window of a layer, or None where it sees everything before it.

        >>> [Attention(window_pattern=(4096, 4096, 4096, -1)).window(i, 5) for i in range(5)]
        [4096, 4096, 4096, None, None]
        """
        forced = (self.first_layer_full and layer == 0) or (self.last_layer_full and layer == n_layers - 1)
        if not self.window_pattern or forced:
            return None
        size = self.window_pattern[(layer - self.first_layer_full) % len(self.window_pattern)]
        return None if size == -1 else size

    def attend(self) -> Any:
        """What computes softmax attention: override it to bring another (`olmo_fn.kernels.attention_cp.AttendVJP`)."""
        from olmo_fn.kernels.attention_tiles import attend_vjp

        return attend_vjp

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.attention import attention_sublayer

        std, residual = model.deviations(layer)
        k = self.width(model.d_model)
        std_out = (self.n_heads * k) ** -0.5 if model.init_method == "fan_in" else residual
        return attention_sublayer(
            model.d_model,
            self.n_heads,
            self.kv_heads,
            k,
            window=self.window(layer, model.n_layers),
            theta=self.rope_theta,
            eps=model.norm_eps,
            std=std,
            std_out=std_out,
            attend=self.attend(),
        )

    def check(self, model: Model) -> None:
        """ValueError, in one line with the fix, if the numbers do not fit together."""
        _positive(self, "n_heads", "n_kv_heads", "head_dim")
        if not self.rope_theta > 0:
            raise ValueError(f"--model.rope-theta is {self.rope_theta}; it must be positive")
        if self.head_dim is None and model.d_model % self.n_heads:
            raise ValueError(
                f"--model.n-heads {self.n_heads} does not divide --model.d-model {model.d_model}; "
                f"choose one of {divisors(model.d_model)}, or give --model.head-dim"
            )
        if self.width(model.d_model) % 2:
            raise ValueError(
                f"the head width is {self.width(model.d_model)}; rotary positions need an even one (--model.head-dim)"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"--model.n-kv-heads {self.kv_heads} does not divide --model.n-heads {self.n_heads}; "
                f"choose one of {divisors(self.n_heads)}"
            )
        for size in self.window_pattern:
            if size != -1 and size < 1:
                raise ValueError(f"--model.window-pattern has {size}; use sizes of at least 1, or -1 for full attention")

    def check_mesh(self, model: Model, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share the heads."""
        heads = {"--model.n-heads": self.n_heads, "--model.n-kv-heads": self.kv_heads}
        for name, count in heads.items():
            if count % tp:
                raise ValueError(
                    f"--mesh.tp {tp} does not divide {name} {count}, and a head stays on one rank; "
                    f"choose --mesh.tp {divisors(self.kv_heads)}"
                )
        if cp_method == "ulysses" and cp > 1 and self.kv_heads % (tp * cp):
            name, count = next((name, count) for name, count in heads.items() if count % (tp * cp))
            product = f"--mesh.cp {cp} x --mesh.tp {tp} = {tp * cp}" if tp > 1 else f"--mesh.cp {cp}"
            raise ValueError(
                f"{product} does not divide {name} {count}, and ulysses gives each rank whole heads; choose --mesh.cp "
                f"{divisors(self.kv_heads // tp)}, or the method gather or ring"
            )


@dataclass(frozen=True, kw_only=True)
class SwiGLU(FeedForwardSettings):
    """A gated feed-forward network (Shazeer 2020)."""

    name: tyro.conf.Suppress[Literal["swiglu"]] = "swiglu"
    hidden_size: Annotated[int, WIDTH] = 8192
    """Width of the feed-forward network."""

    def build(self, model: Model, layer: int) -> Sublayer:
        """The sublayer of block ``layer``."""
        from olmo_fn.nn.feed_forward import swiglu_sublayer

        std, residual = model.deviations(layer)
        down = self.hidden_size**-0.5 if model.init_method == "fan_in" else residual
        up = residual if model.init_method in ("llama", "llama_depth") else std
        return swiglu_sublayer(model.d_model, self.hidden_size, std=std, std_up=up, std_down=down)

    def check(self, model: Model) -> None:
        """ValueError, in one line, if the numbers do not fit together."""
        _positive(self, "hidden_size")


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block: the mixer, then the feed-forward network, each with a norm on its output and a residual around both (OLMo 2)."""

    name: tyro.conf.Suppress[str] = "reordered"
    mixer: Annotated[Any, InPlace] = Attention()
    """What mixes positions."""
    feed_forward: Annotated[Any, InPlace] = SwiGLU()
    """What works on each position."""

    def parts(self, model: Model, layer: int) -> tuple[Part, ...]:
        """The parts of block ``layer``: override `combine` for another kind of block."""
        return self.combine(self.mixer.build(model, layer), self.feed_forward.build(model, layer), model.norm_eps)

    def combine(self, mixer: Sublayer, feed_forward: Sublayer, eps: float) -> tuple[Part, ...]:
        """How the two sublayers are put together: a function of `olmo_fn.models.blocks`, or your own."""
        from olmo_fn.models.blocks import reordered

        return reordered(mixer, feed_forward, eps)


@dataclass(frozen=True, kw_only=True)
class PreNorm(Block):
    """A block with the norms on the sublayers' inputs."""

    name: tyro.conf.Suppress[str] = "pre-norm"

    def combine(self, mixer: Sublayer, feed_forward: Sublayer, eps: float) -> tuple[Part, ...]:
        """``x + f(norm(x))`` for each."""
        from olmo_fn.models.blocks import pre_norm

        return pre_norm(mixer, feed_forward, eps)


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
    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
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
        _positive(self, "d_model", "n_layers", "vocab_size")
        for block in self.pattern or (self.block,):
            block.mixer.check(self)
            block.feed_forward.check(self)

    def check_mesh(self, tp: int, cp: int, cp_method: str) -> None:
        """ValueError, with the flags and a way out, if ranks of these degrees cannot share the blocks."""
        for block in self.pattern or (self.block,):
            block.mixer.check_mesh(self, tp, cp, cp_method)
            block.feed_forward.check_mesh(self, tp, cp, cp_method)


def _positive(settings: Any, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--model.{name.replace('_', '-')} is {value}; it must be at least 1")


def divisors(n: int) -> str:
    """The divisors of ``n``, in words.

    >>> divisors(6)
    '1, 2, 3, 6'
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*small, *(n // d for d in small)})))


def dense(d_model: int, n_layers: int, n_heads: int, hidden_size: int, **changes: Any) -> Model:
    """A dense OLMo 2: the same block in every layer. ``changes`` are fields of the model, of its attention or feed-forward.

    >>> dense(64, 2, 4, 96, n_kv_heads=2, vocab_size=100).block.mixer.kv_heads
    2
    """
    return modified(Model(d_model, n_layers), n_heads=n_heads, hidden_size=hidden_size, **changes)


def modified(model: Model, **changes: Any) -> Model:
    """The model with other values of fields, its own or those of its block's mixer and feed-forward network.

    >>> modified(OLMO2["olmo2-1b"], n_kv_heads=4, n_layers=2).block.mixer.n_kv_heads
    4
    """

    def take(settings: Any) -> Any:
        mine = {f.name: changes.pop(f.name) for f in fields(settings) if f.name in changes and f.name != "name"}
        return replace(settings, **mine)

    model = take(model)
    mixer, feed_forward = take(model.block.mixer), take(model.block.feed_forward)
    if changes:
        raise ValueError(f"the model has no {', '.join(changes)}")
    return replace(model, block=replace(model.block, mixer=mixer, feed_forward=feed_forward))


def _each(change: Callable[[str, Model], Model], models: dict[str, Model]) -> dict[str, Model]:
    return {name.replace("olmo2", "olmo3"): change(name, model) for name, model in models.items()}


OLMO2: dict[str, Model] = {
    "olmo2-1m": dense(12, 4, 4, 256, head_dim=4),
    "olmo2-14m": dense(128, 4, 8, 512),
    "olmo2-30m": dense(256, 4, 8, 768),
    "olmo2-60m": dense(384, 8, 8, 1536),
    "olmo2-100m": dense(512, 12, 8, 2048),
    "olmo2-190m": dense(768, 12, 12, 3072),
    "olmo2-370m": dense(1024, 16, 16, 4096),
    "olmo2-600m": dense(1344, 16, 16, 5376),
    "olmo2-760m": dense(1536, 16, 16, 6144),
    "olmo2-1b": dense(2048, 16, 16, 8192),
    "olmo2-1b-18l": dense(2048, 18, 16, 8192),
    "olmo2-3b": dense(3328, 16, 16, 13312),
    "olmo2-7b": dense(4096, 32, 32, 11008),
    "olmo2-13b": dense(5120, 40, 40, 13824),
    "olmo2-32b": dense(5120, 64, 40, 27648, n_kv_heads=8),
}
"""The OLMo 2 sizes; ``olmo2-1b`` is the released OLMo-2-0425-1B, ``olmo2-1b-18l`` OLMo-core's older 18-layer one."""


def _olmo3(name: str, model: Model) -> Model:
    if name == "olmo2-600m":
        model = modified(model, d_model=1280, hidden_size=5120)
    return modified(model, window_pattern=(4096, 4096, 4096, -1))


OLMO3: dict[str, Model] = _each(_olmo3, {name: model for name, model in OLMO2.items() if name != "olmo2-1b-18l"})
"""The OLMo 3 sizes: three layers with a window of 4,096, then one with full attention."""
