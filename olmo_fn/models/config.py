"""What a model is: a frozen config, and the sizes of the OLMo 2 and OLMo 3 families. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isqrt
from typing import Annotated, Literal

from olmo_fn.fields import SIGNED

InitMethod = Literal["normal", "llama", "llama_depth", "normalized", "fan_in"]


@dataclass(frozen=True)
class Model:
    """A dense OLMo 2 or OLMo 3 transformer."""

    d_model: int
    """Width of the residual stream."""
    n_layers: int
    """Number of blocks."""
    n_heads: int
    """Query heads."""
    hidden_size: int
    """Width of the feed-forward network."""
    vocab_size: int = 100_352
    """Rows of the embedding and of the head; the default is dolma2's 100,278 rounded up to a multiple of 128."""
    n_kv_heads: int | None = None
    """Key and value heads (grouped-query attention); as many as query heads when not given."""
    head_dim: int | None = None
    """Width of a head; d_model / n_heads when not given."""
    rope_theta: float = 500_000.0
    """Base of the rotary frequencies."""
    norm_eps: float = 1e-6
    """Added to the mean square in every norm."""
    window_pattern: Annotated[tuple[int, ...], SIGNED] = ()
    """Sliding windows of the layers, repeated over the depth: tokens that a position sees, itself included; -1 sees all."""
    first_layer_full: bool = False
    """Give the first layer full attention and start the pattern at the second."""
    last_layer_full: bool = True
    """Give the last layer full attention."""
    tie_embeddings: bool = False
    """Use the embedding as the head's matrix."""
    init_method: InitMethod = "normal"
    """How the standard deviations of the initial weights depend on width and depth."""
    init_std: float = 0.02
    """Standard deviation of the initial weights where the method has one."""

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.n_kv_heads if self.n_kv_heads is not None else self.n_heads

    @property
    def k(self) -> int:
        """Width of a head."""
        return self.head_dim if self.head_dim is not None else self.d_model // self.n_heads

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, or None where it sees everything before it.

        >>> [replace(OLMO3["olmo3-1m"], n_layers=5).window(i) for i in range(5)]
        [4096, 4096, 4096, None, None]
        """
        forced = (self.first_layer_full and layer == 0) or (self.last_layer_full and layer == self.n_layers - 1)
        if not self.window_pattern or forced:
            return None
        size = self.window_pattern[(layer - self.first_layer_full) % len(self.window_pattern)]
        return None if size == -1 else size

    def check(self) -> None:
        """Raise ValueError, in one line with the fix, if the numbers do not fit together."""
        for name in ("d_model", "n_layers", "n_heads", "hidden_size", "vocab_size", "n_kv_heads", "head_dim"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--model.{name.replace('_', '-')} is {value}; it must be at least 1")
        if not self.rope_theta > 0:
            raise ValueError(f"--model.rope-theta is {self.rope_theta}; it must be positive")
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"--model.n-heads {self.n_heads} does not divide --model.d-model {self.d_model}; "
                f"choose one of {divisors(self.d_model)}, or give --model.head-dim"
            )
        if self.k % 2:
            raise ValueError(f"the head width is {self.k}; rotary positions need an even one (--model.head-dim)")
        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"--model.n-kv-heads {self.kv_heads} does not divide --model.n-heads {self.n_heads}; "
                f"choose one of {divisors(self.n_heads)}"
            )
        for size in self.window_pattern:
            if size != -1 and size < 1:
                raise ValueError(f"--model.window-pattern has {size}; use sizes of at least 1, or -1 for full attention")


def divisors(n: int) -> str:
    """The divisors of ``n``, in words.

    >>> divisors(6)
    '1, 2, 3, 6'
    """
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return ", ".join(map(str, sorted({*small, *(n // d for d in small)})))


def _olmo2(d: int, layers: int, heads: int, hidden: int, kv: int | None = None, head_dim: int | None = None) -> Model:
    return Model(d, layers, heads, hidden, n_kv_heads=kv, head_dim=head_dim)


OLMO2: dict[str, Model] = {
    "olmo2-1m": _olmo2(12, 4, 4, 256, head_dim=4),
    "olmo2-14m": _olmo2(128, 4, 8, 512),
    "olmo2-30m": _olmo2(256, 4, 8, 768),
    "olmo2-60m": _olmo2(384, 8, 8, 1536),
    "olmo2-100m": _olmo2(512, 12, 8, 2048),
    "olmo2-190m": _olmo2(768, 12, 12, 3072),
    "olmo2-370m": _olmo2(1024, 16, 16, 4096),
    "olmo2-600m": _olmo2(1344, 16, 16, 5376),
    "olmo2-760m": _olmo2(1536, 16, 16, 6144),
    "olmo2-1b": _olmo2(2048, 16, 16, 8192),
    "olmo2-1b-18l": _olmo2(2048, 18, 16, 8192),
    "olmo2-3b": _olmo2(3328, 16, 16, 13312),
    "olmo2-7b": _olmo2(4096, 32, 32, 11008),
    "olmo2-13b": _olmo2(5120, 40, 40, 13824),
    "olmo2-32b": _olmo2(5120, 64, 40, 27648, kv=8),
}
"""The OLMo 2 sizes; ``olmo2-1b`` is the released OLMo-2-0425-1B, ``olmo2-1b-18l`` OLMo-core's older 18-layer one."""


def _olmo3(name: str, model: Model) -> Model:
    if name == "olmo2-600m":
        model = replace(model, d_model=1280, hidden_size=5120)
    return replace(model, window_pattern=(4096, 4096, 4096, -1))


OLMO3: dict[str, Model] = {
    name.replace("olmo2", "olmo3"): _olmo3(name, model) for name, model in OLMO2.items() if name != "olmo2-1b-18l"
}
"""The OLMo 3 sizes: three layers with a window of 4,096, then one with full attention."""
