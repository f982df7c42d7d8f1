"""The sizes of families with experts, as `olmo_fn.models.families` has the dense ones. Imports no torch.

Where OLMo-core's preset is not the released model, both are here: ``olmoe-1b-7b`` is OLMoE-1B-7B-0924, with norms on the
sublayers' inputs; OLMo-core's ``olmoe-1b-7b-core`` has them on the outputs, and another vocabulary and base of the rotary
positions. The network that tokens share in its ``smallmoe`` has biases there, and none here, as all its other networks.
"""

from __future__ import annotations

from typing import Any

from olmo_fn.models.config import Attention, Block, Hybrid, Model, MoE, PeriNorm, PreNorm, SwiGLU


def sparse(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    *,
    kind: Any = PreNorm,
    qk_norm: str = "none",
    attention: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    block: dict[str, Any] | None = None,
    **experts: Any,
) -> Model:
    """A model with experts in every layer; ``experts`` are fields of `MoE`.

    >>> sparse(64, 2, 4, num_experts=8, top_k=2, expert_size=32).block.feed_forward.num_experts
    8
    """
    options: dict[str, Any] = {"last_layer_full": False, **(attention or {})}
    mixer = Attention(n_heads=n_heads, n_kv_heads=n_kv_heads, qk_norm=qk_norm, **options)  # type: ignore[arg-type]
    made = kind(mixer=mixer, feed_forward=MoE(**experts), **(block or {}))
    return Model(d_model, n_layers, block=made, **(model or {}))


_EXPERTS: dict[str, Any] = {"num_experts": 64, "top_k": 8, "expert_size": 1024, "balance_loss": 0.01, "router_z_loss": 0.001}
_RELEASED: dict[str, Any] = {"vocab_size": 50_304, "norm_eps": 1e-5}
_TINY: dict[str, Any] = {"num_experts": 8, "top_k": 2, "expert_size": 256, "balance_loss": 0.1, "router_z_loss": 0.01}
"""Ten times the usual losses, against Muon's rate: with less, one expert comes to have every token (docs/experts.md)."""

OLMOE: dict[str, Model] = {
    "olmoe-tiny": sparse(192, 4, 3, kind=Block, qk_norm="full", model={"vocab_size": 4096, "init_method": "llama"}, **_TINY),
    "olmoe-1b-7b": sparse(2048, 16, 16, qk_norm="full", attention={"rope_theta": 1e4}, model=_RELEASED, **_EXPERTS),
    "olmoe-1b-7b-core": sparse(2048, 16, 16, kind=Block, qk_norm="full", **_EXPERTS),
}
"""OLMoE (Muennighoff et al. 2024); ``olmoe-tiny`` meets as many numbers of a token as ``olmo2-tiny``."""

_SMALL: dict[str, Any] = {"num_experts": 32, "top_k": 4, "expert_size": 384, "capacity_factor": 1.2, "capacity_over": "batch"}
SMALLMOE: dict[str, Model] = {
    "smallmoe": sparse(768, 12, 12, kind=Block, qk_norm="full", shared_size=1536, shared_mix="average", **_SMALL),
    "smallmoe-hybrid": sparse(768, 12, 12, kind=Hybrid, qk_norm="full", block={"dense": SwiGLU(hidden_size=1536)}, **_SMALL),
}
"""OLMo-core's ``smallmoe`` and ``small_hybrid_moe``: with a capacity of all tokens that are computed at once."""


def _ladder(d_model: int, n_layers: int, n_heads: int) -> Model:
    return sparse(
        d_model,
        n_layers,
        n_heads,
        n_heads // 2,
        kind=PeriNorm,
        qk_norm="head",
        attention={"head_dim": 128, "window_pattern": (-1, 2048), "first_layer_full": True, "last_layer_full": True},
        model={"embed_scale": d_model**0.5, "embed_norm": True, "init_std": 0.01},
        num_experts=48,
        top_k=4,
        expert_size=d_model,
        shared_size=d_model // 2,
        weight_norm=1.0,
        weight_scale=4.0,
        dense_layers=1,
        dense_size=9 * d_model // 2,
        balance_over="sequence",
        balance_loss=0.01 * n_layers,
        router_z_loss=1e-5 * n_layers,
    )


OLMO3MOE: dict[str, Model] = {
    "olmo3moe-275m": _ladder(768, 12, 8),
    "olmo3moe-480m": _ladder(1024, 16, 8),
    "olmo3moe-810m": _ladder(1280, 20, 12),
    "olmo3moe-1.2b": _ladder(1536, 22, 16),
}
"""The ladder that AI2 trains for its next OLMoE (a branch of OLMo-core, olmoe-dev-v2), by the parameters that a token meets:
48 experts as wide as the stream, of which weights as of a dense network are restored, a shared one, and a dense first layer.
"""


def _qwen3(d_model: int, n_layers: int, n_heads: int, expert_size: int) -> Model:
    return sparse(
        d_model,
        n_layers,
        n_heads,
        4,
        qk_norm="head",
        attention={"head_dim": 128, "rope_theta": 1e6},
        model={"vocab_size": 151_936},
        num_experts=128,
        top_k=8,
        expert_size=expert_size,
        weight_norm=1.0,
        balance_loss=0.001,
        router_z_loss=0.0,
    )


QWEN3MOE: dict[str, Model] = {
    "qwen3-30b-a3b": _qwen3(2048, 48, 32, 768),
    "qwen3-235b-a22b": _qwen3(4096, 94, 64, 1536),
}
"""Qwen 3 with experts."""


def _mixtral(d_model: int, n_layers: int, n_heads: int, expert_size: int) -> Model:
    return sparse(
        d_model,
        n_layers,
        n_heads,
        8,
        attention={"rope_theta": 1e6},
        model={"vocab_size": 32_000, "norm_eps": 1e-5},
        num_experts=8,
        top_k=2,
        expert_size=expert_size,
        weight_norm=1.0,
        balance_loss=0.02,
        router_z_loss=0.0,
    )


MIXTRAL: dict[str, Model] = {
    "mixtral-8x7b": _mixtral(4096, 32, 32, 14_336),
    "mixtral-8x22b": _mixtral(6144, 56, 48, 16_384),
}
"""Mixtral 0.1."""
