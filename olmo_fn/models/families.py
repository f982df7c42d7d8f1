"""The sizes of the families: models as they were released, in the names ``<family>-<size>``. Imports no torch.

Where OLMo-core's preset differs from the released model, ours is the released one: ``llama3-70b`` is 8,192 wide (8,196 there),
``qwen3-14b`` has 40 layers (48), ``qwen3-32b`` 64 heads (40), and the heads of ``gemma3`` are 256 wide, 128 in 27b (d_model
divided by the heads).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from olmo_fn.models.config import (
    Attention,
    GeGLU,
    Head,
    Model,
    Normalized,
    PeriNorm,
    PreNorm,
    RMSNorm,
    ScaledSwiGLU,
    SwiGLU,
    dense,
    modified,
)
from olmo_fn.models.families_hybrid import OLMO_HYBRID, OLMO_HYBRID_LONG, QWEN3_5, QWEN3_NEXT
from olmo_fn.models.families_moe import MIXTRAL, OLMO3MOE, OLMOE, QWEN3MOE, SMALLMOE
from olmo_fn.models.settings.rope_scaling import Interpolation, NoScaling, Stepwise, YaRN


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

LONG = YaRN(factor=8.0, old_context=8192)
"""How the long-context stage of OLMo 3 stretches the positions of its full-attention layers, from 8,192 to 65,536 tokens."""

OLMO3_LONG: dict[str, Model] = {f"{name}-long": modified(OLMO3[name], rope_scaling=LONG) for name in ("olmo3-7b", "olmo3-32b")}
"""OLMo 3 as released, after its long-context stage."""


def llama(
    d_model: int,
    n_layers: int,
    n_heads: int,
    hidden_size: int,
    n_kv_heads: int | None = None,
    *,
    vocab_size: int,
    norm_eps: float = 1e-5,
    tie_embeddings: bool = False,
    **attention: Any,
) -> Model:
    """A Llama: norms on the sublayers' inputs, none of queries and keys. ``attention`` are fields of `Attention`.

    >>> llama(64, 2, 4, 96, vocab_size=100, rope_theta=1e4).block.mixer.qk_norm
    'none'
    """
    mixer = Attention(n_heads=n_heads, n_kv_heads=n_kv_heads, **{"qk_norm": "none", "last_layer_full": False, **attention})
    block = PreNorm(mixer=mixer, feed_forward=SwiGLU(hidden_size=hidden_size))
    return Model(d_model, n_layers, vocab_size, block, norm_eps=norm_eps, tie_embeddings=tie_embeddings)


def _llama2(*sizes: int) -> Model:
    return llama(*sizes, vocab_size=32_000, rope_theta=10_000.0)


LLAMA2: dict[str, Model] = {
    "llama2-271m": _llama2(1024, 16, 8, 2816),
    "llama2-1b": _llama2(2048, 18, 16, 5632),
    "llama2-7b": _llama2(4096, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 13824),
    "llama2-26b": _llama2(5120, 80, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 28672, 8),
}
"""Llama 2; 271m, 1b and 26b are OLMo-core's own sizes."""


def _llama3(*sizes: int, factor: float = 1.0, tie_embeddings: bool = False) -> Model:
    model = llama(*sizes, vocab_size=128_256, rope_theta=500_000.0, tie_embeddings=tie_embeddings)
    return modified(model, rope_scaling=Stepwise(factor=factor)) if factor > 1 else model


LLAMA3: dict[str, Model] = {
    "llama3-1b": _llama3(2048, 16, 32, 8192, 8),
    "llama3-8b": _llama3(4096, 32, 32, 14336, 8),
    "llama3-70b": _llama3(8192, 80, 64, 28672, 8),
    "llama3.1-8b": _llama3(4096, 32, 32, 14336, 8, factor=8.0),
    "llama3.1-70b": _llama3(8192, 80, 64, 28672, 8, factor=8.0),
    "llama3.1-405b": _llama3(16384, 126, 128, 53248, 8, factor=8.0),
    "llama3.2-1b": _llama3(2048, 16, 32, 8192, 8, factor=32.0, tie_embeddings=True),
    "llama3.2-3b": _llama3(3072, 28, 24, 8192, 8, factor=32.0, tie_embeddings=True),
}
"""Llama 3, 3.1 and 3.2; ``llama3-1b`` is OLMo-core's own size, whose head is not tied."""


def _qwen3(d_model: int, n_layers: int, n_heads: int, hidden_size: int, tie: bool) -> Model:
    options: dict[str, Any] = {"qk_norm": "head", "head_dim": 128, "rope_theta": 1e6}
    sizes = d_model, n_layers, n_heads, hidden_size, 8
    return llama(*sizes, vocab_size=151_936, norm_eps=1e-6, tie_embeddings=tie, **options)


QWEN3: dict[str, Model] = {
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12288, False),
    "qwen3-14b": _qwen3(5120, 40, 40, 17408, False),
    "qwen3-32b": _qwen3(5120, 64, 64, 25600, False),
}
"""Qwen 3, the dense ones."""


def gemma3(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_size: int,
    *,
    vocab_size: int = 262_208,
    head_dim: int = 256,
    window: int = 1024,
    score_scale: float = 256**-0.5,
    factor: float = 8.0,
) -> Model:
    """A Gemma 3: five layers with a window, then one with full attention, whose positions are stretched by ``factor``."""
    mixer = Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        qk_norm="head",
        zero_centred=True,
        score_scale=score_scale,
        rope_theta=1e6,
        local_rope_theta=1e4,
        rope_scaling=Interpolation(factor=factor) if factor > 1 else NoScaling(),
        window_pattern=(window,) * 5 + (-1,),
        last_layer_full=False,
    )
    return Model(
        d_model,
        n_layers,
        vocab_size,
        PeriNorm(mixer=mixer, feed_forward=GeGLU(hidden_size=hidden_size)),
        norm=RMSNorm(zero_centred=True),
        embed_scale=d_model**0.5,
        tie_embeddings=True,
    )


_SMALL: dict[str, Any] = {"vocab_size": 262_144, "window": 512, "factor": 1.0}
GEMMA3: dict[str, Model] = {
    "gemma3-270m": gemma3(640, 18, 4, 1, 2048, **_SMALL),
    "gemma3-1b": gemma3(1152, 26, 4, 1, 6912, **_SMALL),
    "gemma3-4b": gemma3(2560, 34, 8, 4, 10240),
    "gemma3-12b": gemma3(3840, 48, 16, 8, 15360),
    "gemma3-27b": gemma3(5376, 62, 32, 16, 21504, head_dim=128, score_scale=168**-0.5),
}
"""Gemma 3, the language models."""


def ngpt(d_model: int, n_layers: int, n_heads: int, hidden_size: int, vocab_size: int = 100_352, **attention: Any) -> Model:
    """A normalized transformer (nGPT); train it with ``--recipe.normalize``, which keeps its matrices on the unit sphere."""
    k = attention.get("head_dim") or d_model // n_heads
    mixer = Attention(n_heads=n_heads, qk_norm="unit", score_scale=k**0.5, **{"last_layer_full": False, **attention})
    block = Normalized(mixer=mixer, feed_forward=ScaledSwiGLU(hidden_size=hidden_size))
    return Model(d_model, n_layers, vocab_size, block, head=Head(norm=False, scales=True), init_method="normalized")


NGPT: dict[str, Model] = {"ngpt-271m": ngpt(1024, 16, 16, 2816), "ngpt-1b": ngpt(2048, 18, 16, 5632)}
"""Normalized transformers in the sizes of OLMo-core."""


def _smollm2(*sizes: int, rope_theta: float = 1e5) -> Model:
    return llama(*sizes, vocab_size=49_152, rope_theta=rope_theta, tie_embeddings=True)


SMOLLM2: dict[str, Model] = {
    "smollm2-135m": _smollm2(576, 30, 9, 1536, 3),
    "smollm2-360m": _smollm2(960, 32, 15, 2560, 5),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 8192, rope_theta=130_000.0),
}
"""SmolLM2."""


FAMILIES: dict[str, dict[str, Model]] = {
    "olmo2": OLMO2,
    "olmo3": {**OLMO3, **OLMO3_LONG},
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "qwen3": QWEN3,
    "gemma3": GEMMA3,
    "ngpt": NGPT,
    "smollm2": SMOLLM2,
    "olmoe": OLMOE,
    "smallmoe": SMALLMOE,
    "olmo3moe": OLMO3MOE,
    "qwen3moe": QWEN3MOE,
    "mixtral": MIXTRAL,
    "olmo-hybrid": {**OLMO_HYBRID, **OLMO_HYBRID_LONG},
    "qwen3.5": QWEN3_5,
    "qwen3next": QWEN3_NEXT,
}
