"""The architectures of transformers that are read and written: for each, from a config.json to a model and back.

What `Family.write` gives need not be right for every model: it is read back, and taken only if the model is the same again
(`olmo_fn.formats.config_json.json_of`). Defaults are those of transformers for keys that a config.json may lack.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from olmo_fn.formats.keys import Keys
from olmo_fn.formats.rope import FULL, SLIDING, Rotation, one_rope, rope_json, ropes_by_layer_type, ropes_json
from olmo_fn.models.config import (
    Attention,
    Block,
    FeedForwardSettings,
    GeGLU,
    Head,
    Model,
    PeriNorm,
    PreNorm,
    RMSNorm,
    SwiGLU,
)
from olmo_fn.models.settings.rope_scaling import NoScaling

if TYPE_CHECKING:
    from olmo_fn.formats.names import Stored


class Family(NamedTuple):
    """An architecture: its class in transformers, its ``model_type``, and the two directions.

    ``tensors``: from a model and its parameters under their usual names, where they are in its files, if they are elsewhere.
    ``aliases``: pairs of parts of tensors' names that stand for each other in its files. ``joined``: ends of the names of
    tensors that together are right, but may be divided at other rows than the model's. ``passed_over``: starts of the names of
    tensors that released files have, and that no part of the model is.
    """

    architecture: str
    model_type: str
    read: Callable[[Keys], Model]
    write: Callable[[Model], dict[str, Any]]
    tensors: Callable[[Model, Mapping[str, Stored]], dict[str, Stored]] | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    joined: tuple[str, ...] = ()
    passed_over: tuple[str, ...] = ()


def read_olmo2(keys: Keys) -> Model:
    """Norms on the sublayers' outputs, and over all heads of queries and keys."""
    return model(keys, attention(keys, one_rope(keys)), silu(keys))


def write_olmo2(m: Model) -> dict[str, Any]:
    """The keys of an OLMo 2."""
    return {**sizes(m), **rope_json(m)}


def read_olmo3(keys: Keys) -> Model:
    """An OLMo 2 with sliding windows, whose full-attention layers alone have a scaling of the rotary positions."""
    windows = windows_of(keys, [SLIDING, SLIDING, SLIDING, FULL], keys.get("sliding_window", 4096))
    full, sliding = ropes_by_layer_type(keys, windows)
    return model(keys, attention(keys, full, windows, local=sliding), silu(keys))


def write_olmo3(m: Model) -> dict[str, Any]:
    """The keys of an OLMo 3."""
    return {**sizes(m), **windows_json(m), **ropes_json(m)}


def read_llama(keys: Keys) -> Model:
    """Norms on the sublayers' inputs, and none of queries and keys: Llama, SmolLM2, and whatever has their form."""
    keys.must_be("rope_interleaved", False)
    check_divides(keys)
    mixer = attention(keys, one_rope(keys), qk_norm="none")
    return model(keys, mixer, silu(keys, bias=keys.flag("mlp_bias")), PreNorm)


def write_llama(m: Model) -> dict[str, Any]:
    """The keys of a Llama."""
    return {**sizes(m), **rope_json(m), "mlp_bias": m.layers[0].feed_forward.feed_forward_bias}


def read_mistral(keys: Keys) -> Model:
    """A Llama with the same window in every layer, or with none."""
    windows = [None if keys.is_null("sliding_window") else keys.whole("sliding_window", 4096)]
    keys.must_be("attention_bias", False)
    return model(keys, attention(keys, one_rope(keys), windows, qk_norm="none", kv_heads=8), silu(keys), PreNorm)


def write_mistral(m: Model) -> dict[str, Any]:
    """The keys of a Mistral."""
    keys = {**sizes(m), **rope_json(m), "sliding_window": m.layers[0].mixer.window(0, m.n_layers)}
    return {name: value for name, value in keys.items() if name != "attention_bias"}


def read_qwen3(keys: Keys) -> Model:
    """Norms on the sublayers' inputs, and one of each head of queries and keys."""
    using, first = keys.flag("use_sliding_window"), keys.whole("max_window_layers", 28, least=0)
    n, window = depth(keys), keys.get("sliding_window", 4096)
    kinds = [SLIDING if using and layer >= first else FULL for layer in range(n)]
    windows = windows_of(keys, kinds, window if using else None)
    return model(keys, attention(keys, one_rope(keys), windows, qk_norm="head", head_dim=128), silu(keys), PreNorm)


def write_qwen3(m: Model) -> dict[str, Any]:
    """The keys of a Qwen 3."""
    keys = {**sizes(m), **windows_json(m), **rope_json(m)}
    return {**keys, "use_sliding_window": SLIDING in keys["layer_types"], "max_window_layers": m.n_layers}


def read_gemma3(keys: Keys) -> Model:
    """Norms around the sublayers and of each head, gains around 0, scaled embeddings, two bases of the rotary positions."""
    keys.must_be("attn_logit_softcapping", None)
    keys.must_be("use_bidirectional_attention", False)
    check_divides(keys)
    period = keys.whole("sliding_window_pattern", keys.get("_sliding_window_pattern", 6))
    kinds = [SLIDING] * (period - 1) + [FULL]
    windows = windows_of(keys, kinds, keys.get("sliding_window", 4096))
    full, sliding = ropes_by_layer_type(keys, windows)
    scale = keys.number("query_pre_attn_scalar", 256) ** -0.5
    mixer = attention(keys, full, windows, local=sliding, qk_norm="head", head_dim=256, zero_centred=True, score_scale=scale)
    cap = keys.number("final_logit_softcapping") if keys.get("final_logit_softcapping") is not None else None
    return replace(
        model(keys, mixer, gelu(keys), PeriNorm, tie=True),
        norm=RMSNorm(zero_centred=True),
        embed_scale=keys.whole("hidden_size") ** 0.5,
        head=Head(cap=cap),
    )


def write_gemma3(m: Model) -> dict[str, Any]:
    """The keys of a Gemma 3."""
    mixer = m.layers[0].mixer
    scale = mixer.score_scale or mixer.width(m.d_model) ** -0.5
    keys = {**sizes(m, "hidden_activation"), **windows_json(m), **ropes_json(m, "rope_local_base_freq")}
    return {
        **keys,
        "query_pre_attn_scalar": whole(scale**-2),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": m.head.cap,
    }


def read_smollm3(keys: Keys) -> Model:
    """A Llama in which some layers have no rotary positions."""
    keys.must_be("use_sliding_window", False)
    n, interval = depth(keys), keys.whole("no_rope_layer_interval", 4)
    rotated = keys.get("no_rope_layers", [int((layer + 1) % interval != 0) for layer in range(n)])
    if not isinstance(rotated, list) or len(rotated) < n or not all(type(one) is int and one in (0, 1) for one in rotated):
        raise keys.refused("no_rope_layers", f"it must be a list of 0 and 1 for each of the {n} layers")
    windows = windows_of(keys, [FULL], None)
    mixer = attention(keys, one_rope(keys, 2_000_000.0), windows, qk_norm="none", kv_heads=4)
    blank = model(keys, mixer, silu(keys, bias=keys.flag("mlp_bias")), PreNorm, tie=True)
    kinds = {1: blank.block, 0: replace(blank.block, mixer=replace(mixer, rope_layers="none"))}
    return replace(blank, pattern=tuple(kinds[one] for one in shortest(rotated[:n])))


def write_smollm3(m: Model) -> dict[str, Any]:
    """The keys of a SmolLM 3."""
    rotated = [int(block.mixer.rope_layers != "none") for block in m.layers]
    first = next((block for block, one in zip(m.layers, rotated, strict=True) if one), m.layers[0])
    keys = {**sizes(m), **rope_json(replace(m, block=first, pattern=())), "no_rope_layers": rotated}
    return {**keys, "layer_types": [FULL] * m.n_layers, "mlp_bias": m.layers[0].feed_forward.feed_forward_bias}


FAMILIES = (
    Family("Olmo2ForCausalLM", "olmo2", read_olmo2, write_olmo2),
    Family("Olmo3ForCausalLM", "olmo3", read_olmo3, write_olmo3),
    Family("LlamaForCausalLM", "llama", read_llama, write_llama),
    Family("MistralForCausalLM", "mistral", read_mistral, write_mistral),
    Family("Qwen3ForCausalLM", "qwen3", read_qwen3, write_qwen3),
    Family("Gemma3ForCausalLM", "gemma3_text", read_gemma3, write_gemma3),
    Family("SmolLM3ForCausalLM", "smollm3", read_smollm3, write_smollm3),
)


def model(
    keys: Keys, mixer: Attention, feed_forward: FeedForwardSettings, kind: type[Block] = Block, tie: bool = False
) -> Model:
    """A model of one kind of block; ``tie``: whether the head is the embedding where the keys do not say it."""
    return Model(
        d_model=keys.whole("hidden_size"),
        n_layers=depth(keys),
        vocab_size=keys.whole("vocab_size"),
        block=kind(mixer=mixer, feed_forward=feed_forward),
        norm_eps=keys.number("rms_norm_eps"),
        tie_embeddings=keys.flag("tie_word_embeddings", tie),
    )


def depth(keys: Keys) -> int:
    """The number of layers."""
    n = keys.whole("num_hidden_layers")
    if n > 1024:
        raise keys.refused("num_hidden_layers", "no model has more than 1,024")
    return n


def attention(
    keys: Keys,
    rope: Rotation,
    windows: Sequence[int | None] = (),
    local: Rotation | None = None,
    head_dim: int | None = None,
    kv_heads: int | None = None,
    **more: Any,
) -> Attention:
    """Attention with the ``windows`` of the layers, or the beginning of a pattern, and another rotation of those with a window;
    ``head_dim`` and ``kv_heads`` where the keys do not say them.
    """
    keys.must_be("attention_dropout", 0.0)
    heads = keys.whole("num_attention_heads")
    if keys.get("head_dim", head_dim) is None:
        check_divides(keys)
    if local is not None and any(windows) and None not in windows:
        rope, local = local, None  # all layers are of one type
    local = local if any(windows) else None
    if local is not None and local.scaling not in (NoScaling(), rope.scaling):
        raise keys.refused("rope_parameters", "layers with a window have the scaling of the others, or none")
    return Attention(
        n_heads=heads,
        n_kv_heads=keys.whole("num_key_value_heads", kv_heads or heads),
        head_dim=keys.whole("head_dim", head_dim or keys.whole("hidden_size") // heads),
        attention_bias=keys.flag("attention_bias"),
        rope_theta=rope.theta,
        local_rope_theta=None if local is None or local.theta == rope.theta else local.theta,
        rope_scaling=rope.scaling,
        rope_scaled_layers="full" if local is not None and local.scaling != rope.scaling else "all",
        window_pattern=tuple(-1 if window is None else window for window in shortest(windows)) if any(windows) else (),
        last_layer_full=False,
        **more,
    )


def check_divides(keys: Keys) -> None:
    """ValueError unless heads divide the width, as transformers demands of some architectures whatever the ``head_dim``."""
    if (d_model := keys.whole("hidden_size")) % keys.whole("num_attention_heads"):
        raise keys.refused("num_attention_heads", f"it does not divide hidden_size {d_model}")


def silu(keys: Keys, bias: bool = False) -> SwiGLU:
    """The gated feed-forward network with SiLU."""
    keys.must_be("hidden_act", "silu", "swish")
    return SwiGLU(hidden_size=keys.whole("intermediate_size"), feed_forward_bias=bias)


def gelu(keys: Keys) -> GeGLU:
    """The gated feed-forward network with GELU by tanh. Old files have ``hidden_act`` beside it, which transformers ignores."""
    keys.must_be("hidden_activation", "gelu_pytorch_tanh")
    keys.must_be("hidden_act", "gelu_pytorch_tanh")
    return GeGLU(hidden_size=keys.whole("intermediate_size"))


def windows_of(keys: Keys, kinds: Sequence[str], window: Any) -> list[int | None]:
    """The window of each layer, from ``layer_types`` or a pattern of them, ``kinds``."""
    n = depth(keys)
    types = keys.get("layer_types", [kinds[layer % len(kinds)] for layer in range(n)])
    if not isinstance(types, list) or len(types) != n or not all(kind in (FULL, SLIDING) for kind in types):
        raise keys.refused("layer_types", f"it must name {FULL} or {SLIDING} for each of the {n} layers")
    if SLIDING in types and (type(window) is not int or window < 1):
        raise keys.refused("sliding_window", f"layer_types has {SLIDING}, and a window is at least 1 token")
    return [window if kind == SLIDING else None for kind in types]


def sizes(m: Model, activation: str = "hidden_act") -> dict[str, Any]:
    """The keys that all have."""
    mixer, feed_forward = m.layers[0].mixer, m.layers[0].feed_forward
    return {
        "vocab_size": m.vocab_size,
        "hidden_size": m.d_model,
        "intermediate_size": feed_forward.hidden_size,
        "num_hidden_layers": m.n_layers,
        "num_attention_heads": mixer.n_heads,
        "num_key_value_heads": mixer.kv_heads,
        "head_dim": mixer.width(m.d_model),
        activation: "gelu_pytorch_tanh" if isinstance(feed_forward, GeGLU) else "silu",
        "attention_bias": mixer.attention_bias,
        "attention_dropout": 0.0,
        "rms_norm_eps": m.norm_eps,
        "tie_word_embeddings": m.tie_embeddings,
    }


def windows_json(m: Model) -> dict[str, Any]:
    """``layer_types`` and ``sliding_window``, which transformers wants to be a number though no layer has a window."""
    windows = [block.mixer.window(layer, m.n_layers) for layer, block in enumerate(m.layers)]
    kinds = [FULL if window is None else SLIDING for window in windows]
    return {"layer_types": kinds, "sliding_window": next(filter(None, windows), 4096)}


def shortest(items: Sequence[Any]) -> Sequence[Any]:
    """The shortest beginning that the items repeat.

    >>> shortest([1, 1, 2, 1, 1, 2, 1]), shortest([]), shortest([3, 3])
    ([1, 1, 2], [], [3])
    """
    fits = (k for k in range(1, len(items) + 1) if all(items[i] == items[i % k] for i in range(len(items))))
    return items[: next(fits, 0)]


def whole(x: float) -> float | int:
    """The whole number that is as good as ``x``, or ``x``."""
    return round(x) if abs(x - round(x)) < 1e-9 * abs(x) else x
