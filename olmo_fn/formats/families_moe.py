"""The architectures of transformers with experts, in the same way as the dense ones (`olmo_fn.formats.families`).

Their config.json says the weight of one loss of the routers, by a formula that is another than ours. It is taken as it is, as
other keys that start a training; what is written has it from the model's settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from olmo_fn.formats.families import (
    Family,
    attention,
    check_divides,
    depth,
    model,
    shortest,
    silu,
    sizes,
)
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.rope import one_rope, rope_json
from olmo_fn.models.config import Block, Model, MoE, PreNorm, SwiGLU

if TYPE_CHECKING:
    from olmo_fn.formats.names import Stored

NAMES_OF_MIXTRAL = (
    ("mlp.gate.", "block_sparse_moe.gate."),
    ("mlp.experts.{}.gate_proj.", "block_sparse_moe.experts.{}.w1."),
    ("mlp.experts.{}.up_proj.", "block_sparse_moe.experts.{}.w3."),
    ("mlp.experts.{}.down_proj.", "block_sparse_moe.experts.{}.w2."),
)


def read_olmoe(keys: Keys) -> Model:
    """Norms on the sublayers' inputs, and over all heads of queries and keys; experts in every layer."""
    keys.must_be("clip_qkv", None)  # which is behind the norms there, and before them here
    check_divides(keys)
    return model(keys, attention(keys, one_rope(keys)), experts(keys, 64, 8, 0.01), PreNorm)


def write_olmoe(m: Model) -> dict[str, Any]:
    """The keys of an OLMoE."""
    return {name: value for name, value in {**moe_sizes(m), **rope_json(m)}.items() if name != "head_dim"}


def read_flex_olmo(keys: Keys) -> Model:
    """An OLMo 2 with experts."""
    check_divides(keys)
    return model(keys, attention(keys, one_rope(keys, 500_000.0)), experts(keys, 7, 5, 0.01), Block)


def read_qwen3_moe(keys: Keys) -> Model:
    """A Qwen 3 with experts in all layers, in every so many, or in all but some."""
    using, _ = keys.flag("use_sliding_window"), keys.get("max_window_layers")
    windows = [keys.whole("sliding_window", 4096)] if using else []
    keys.get("sliding_window")
    step, dense, n = keys.whole("decoder_sparse_step", 1), keys.get("mlp_only_layers", []), depth(keys)
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise keys.refused("mlp_only_layers", "it must be a list of numbers of layers")
    sparse = experts(keys, 128, 8, 0.001, "moe_intermediate_size", 768)
    found = model(keys, attention(keys, one_rope(keys), windows, qk_norm="head"), sparse, PreNorm)
    network = replace(found.block, feed_forward=silu(keys))
    kinds = [layer not in dense and (layer + 1) % step == 0 for layer in range(n)]
    return found if all(kinds) else replace(found, pattern=tuple(found.block if one else network for one in shortest(kinds)))


def write_qwen3_moe(m: Model) -> dict[str, Any]:
    """The keys of a Qwen 3 with experts."""
    dense = [layer for layer, block in enumerate(m.layers) if not block.feed_forward.num_experts]
    window = m.layers[0].mixer.window(0, m.n_layers)
    inner = m.layers[dense[0]].feed_forward.hidden_size if dense else moe_of(m).expert_size
    return {
        **moe_sizes(m),
        **rope_json(m),
        "intermediate_size": inner,
        "moe_intermediate_size": moe_of(m).expert_size,
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": m.n_layers,
    }


def read_mixtral(keys: Keys) -> Model:
    """A Mistral with experts, whose weights add up to 1."""
    windows = [] if keys.get("sliding_window") is None else [keys.whole("sliding_window")]
    keys.must_be("router_jitter_noise", 0.0)  # of what the experts see too, while it trains
    keys.must_be("attention_bias", False)
    mixer = attention(keys, one_rope(keys, 1_000_000.0), windows, qk_norm="none", kv_heads=8)
    return model(keys, mixer, experts(keys, 8, 2, 0.001, norm=1.0), PreNorm)


def write_mixtral(m: Model) -> dict[str, Any]:
    """The keys of a Mixtral."""
    keys = {**moe_sizes(m), **rope_json(m), "sliding_window": m.layers[0].mixer.window(0, m.n_layers)}
    keys["num_local_experts"] = keys.pop("num_experts")
    return {name: value for name, value in keys.items() if name not in ("attention_bias", "norm_topk_prob")}


def mixtral_tensors(m: Model, names: Mapping[str, Stored]) -> dict[str, Stored]:
    """Its experts have names of their own, but where they are stacked."""
    if not any(one.split for one in names.values()):
        return dict(names)

    def renamed(name: str) -> str:
        for ours, theirs in NAMES_OF_MIXTRAL:
            name = name.replace(ours, theirs)
        return name

    return {path: one._replace(name=renamed(one.name)) for path, one in names.items()}


MOE_FAMILIES = (
    Family("OlmoeForCausalLM", "olmoe", read_olmoe, write_olmoe),
    Family("FlexOlmoForCausalLM", "flex_olmo", read_flex_olmo, write_olmoe),
    Family("Qwen3MoeForCausalLM", "qwen3_moe", read_qwen3_moe, write_qwen3_moe),
    Family("MixtralForCausalLM", "mixtral", read_mixtral, write_mixtral, mixtral_tensors),
)


def experts(
    keys: Keys,
    many: int,
    top_k: int,
    balance: float,
    size: str = "intermediate_size",
    default: int | None = None,
    norm: float | None = None,
    normed: bool = False,
) -> MoE:
    """The experts of every layer, of the width ``size``; defaults where the keys do not say it."""
    keys.must_be("hidden_act", "silu", "swish")
    keys.must_be("output_router_logits", False, True)
    names = [name for name in ("num_experts", "num_local_experts") if keys.get(name) is not None] or ["num_experts"]
    if len({keys.whole(name, many) for name in names}) > 1:
        raise keys.refused("num_experts", f"num_local_experts, another name of the same, is {keys.get('num_local_experts')}")
    return MoE(
        num_experts=keys.whole(names[0], many),
        top_k=keys.whole("num_experts_per_tok", top_k),
        expert_size=keys.whole(size, default),
        weight_norm=norm or (1.0 if keys.flag("norm_topk_prob", normed) else None),
        balance_loss=keys.number("router_aux_loss_coef", balance) if keys.get("router_aux_loss_coef", balance) != 0 else 0.0,
        router_z_loss=0.0,
    )


def moe_of(m: Model) -> MoE:
    """The settings of the experts, which all layers have that have any; AttributeError without."""
    for block in m.layers:
        if isinstance(block.feed_forward, MoE):
            return block.feed_forward
    raise AttributeError("a model without experts")


def spelled_out(m: Model) -> Model:
    """The same model with each layer's own network, where some of the first have a dense one in place of experts."""
    found = [replace(block, feed_forward=block.feed_forward.at(layer)) for layer, block in enumerate(m.layers)]
    return m if found == list(m.layers) else replace(m, block=found[-1], pattern=tuple(shortest(found)))


def moe_sizes(m: Model) -> dict[str, Any]:
    """The keys that all have."""
    moe = moe_of(m)
    network = replace(m.layers[0], feed_forward=SwiGLU(hidden_size=moe.expert_size))
    return {
        **sizes(replace(m, block=network, pattern=())),
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.weight_norm == 1,
        "output_router_logits": False,
        "router_aux_loss_coef": moe.balance_loss,
    }
