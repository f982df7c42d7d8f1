"""The sizes of families with recurrent layers, as `olmo_fn.models.families` has the others. Imports no torch."""

from __future__ import annotations

from typing import Any

from olmo_fn.models.config import Attention, Block, GatedDelta, Model, MoE, PreNorm, RMSNorm, SwiGLU


def hybrid(recurrent: Block, attention: Block, d_model: int, n_layers: int, **options: Any) -> Model:
    """Three blocks with a state, then one with attention, over the depth."""
    return Model(d_model, n_layers, block=attention, pattern=(recurrent,) * 3 + (attention,), **options)


def olmo_hybrid(d_model: int, n_layers: int, n_heads: int, hidden_size: int, *, rope: bool = True, **options: Any) -> Model:
    """An OLMo-hybrid: Gated DeltaNet, whose keys are 3/4 as wide as the heads of attention, in blocks with norms on the inputs
    as transformers has them, beside blocks of OLMo 2.

    >>> [block.mixer.name for block in olmo_hybrid(64, 5, 4, 96).layers]
    ['gated-delta', 'gated-delta', 'gated-delta', 'attention', 'gated-delta']
    """
    mixer = GatedDelta(n_heads=n_heads, head_dim=3 * d_model // (4 * n_heads))
    attention = Attention(n_heads=n_heads, rope_layers="all" if rope else "none")
    feed_forward = SwiGLU(hidden_size=hidden_size)
    blocks = PreNorm(mixer=mixer, feed_forward=feed_forward), Block(mixer=attention, feed_forward=feed_forward)
    return hybrid(*blocks, d_model, n_layers, **options)


OLMO_HYBRID: dict[str, Model] = {"olmo-hybrid-7b": olmo_hybrid(3840, 32, 30, 11008)}
"""OLMo-hybrid as its first two stages train it."""
OLMO_HYBRID_LONG: dict[str, Model] = {"olmo-hybrid-7b-long": olmo_hybrid(3840, 32, 30, 11008, rope=False)}
"""OLMo-hybrid as released, whose long-context stage drops the rotary positions."""


def _qwen(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, n_value_heads: int, feed_forward: Any, **options: Any
) -> Model:
    """Gated DeltaNet with several heads of values for one of keys, and attention with a gate and a quarter of each head
    rotated, with the same network behind both; gains around 0.
    """
    sizes: dict[str, Any] = {"n_heads": 16, "n_value_heads": n_value_heads, "head_dim": 128, "value_head_dim": 128}
    attention = Attention(
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=256,
        qk_norm="head",
        zero_centred=True,
        gate="element",
        rope_theta=1e7,
        rope_fraction=0.25,
    )
    recurrent = GatedDelta(**sizes, negative_eigenvalues=False, gate_norm_eps=1e-6)
    return hybrid(
        PreNorm(mixer=recurrent, feed_forward=feed_forward),
        PreNorm(mixer=attention, feed_forward=feed_forward),
        d_model,
        n_layers,
        norm=RMSNorm(zero_centred=True),
        **options,
    )


def qwen3_5(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, hidden_size: int, n_value_heads: int, *, tie: bool
) -> Model:
    """A Qwen 3.5, the language model alone."""
    feed_forward = SwiGLU(hidden_size=hidden_size)
    return _qwen(d_model, n_layers, n_heads, n_kv_heads, n_value_heads, feed_forward, vocab_size=248_320, tie_embeddings=tie)


QWEN3_5: dict[str, Model] = {
    "qwen3.5-0.8b": qwen3_5(1024, 24, 8, 2, 3584, 16, tie=True),
    "qwen3.5-4b": qwen3_5(2560, 32, 16, 4, 9216, 32, tie=True),
    "qwen3.5-9b": qwen3_5(4096, 32, 16, 4, 12288, 32, tie=False),
    "qwen3.5-27b": qwen3_5(5120, 64, 24, 4, 17408, 48, tie=False),
}
"""Qwen 3.5, the dense language models, without the towers for images."""


_EXPERTS = MoE(
    num_experts=512,
    top_k=10,
    expert_size=512,
    weight_norm=1.0,
    shared_size=512,
    shared_mix="gate",
    balance_loss=0.001,
    router_z_loss=0.0,
)
QWEN3_NEXT: dict[str, Model] = {"qwen3-next-80b-a3b": _qwen(2048, 48, 16, 2, 32, _EXPERTS, vocab_size=151_936)}
"""Qwen 3-Next: 512 experts, 10 for a token, beside one that all tokens share; without its layer for further tokens."""
