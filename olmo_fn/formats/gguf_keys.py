"""A model from the metadata of a GGUF file, and back. Imports neither torch nor the gguf package.

What is read is what llama.cpp computes from the file, in the keys of a config.json; where llama.cpp has a number in its code
that other files have as a key (the windows of Gemma 3, say), it is that number. What is written is read back, and refused if
llama.cpp would compute another model.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping
from math import log
from typing import Any

from olmo_fn.formats.config_json import differences, json_of, model_of
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.rope import FULL, SLIDING
from olmo_fn.models.config import Model

READ = {
    "llama": ("LlamaForCausalLM", "llama"),
    "olmo2": ("Olmo2ForCausalLM", "olmo2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
"""llama.cpp's architectures, and those of transformers that are the same; an olmo2 with windows is an OLMo 3."""
OLMO3 = ("Olmo3ForCausalLM", "olmo3")
ARCHITECTURE = {name: arch for arch, (name, _) in READ.items()} | {OLMO3[0]: "olmo2"}
PERIOD = {"olmo2": 4, "gemma3": 6}
"""Every so many layers one has full attention, if the others have windows."""
GEMMA_LOCAL = 10_000.0
"""llama.cpp's base of the rotary positions in Gemma 3's layers with a window."""
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The stepwise scaling of every Llama 3; a file says only by what each frequency is divided."""
NO_EFFECT = ("context_length", "rope.scaling.finetuned")


def shortest(x: float) -> float:
    """The number with the fewest digits that is ``x`` in fp32, as metadata are kept.

    >>> shortest(9.999999747378752e-06)
    1e-05
    """
    kept = _fp32(x)
    return next(y for digits in range(1, 18) if _fp32(y := float(f"{x:.{digits}g}")) == kept)


def _fp32(x: float) -> bytes:
    return struct.pack("f", x)


def read_config(
    arch: str, keys: Keys, shapes: Mapping[str, tuple[int, ...]], tied: bool, stretch: float = 0.0
) -> dict[str, Any]:
    """The config.json of the model that llama.cpp computes from a file of architecture ``arch``.

    ``keys``: its metadata. ``shapes``: those of its tensors. ``tied``: whether the head is the embedding. ``stretch``: the
    factor of Llama 3's scaling, if there is one. ValueError, with its name, for a key that is not understood.
    """

    def name(key: str) -> str:
        return f"{arch}.{key}"

    width, heads = keys.whole(name("embedding_length")), keys.whole(name("attention.head_count"))
    head_dim = keys.whole(name("attention.key_length"), width // heads)
    layers, vocab_size = keys.whole(name("block_count")), shapes.get("token_embd.weight", (0,))[0]
    if layers > len(shapes):
        raise keys.refused(name("block_count"), f"the file has {len(shapes)} tensors")
    keys.must_be(name("attention.value_length"), head_dim)
    keys.must_be(name("rope.dimension_count"), head_dim)
    keys.must_be(name("vocab_size"), vocab_size)
    keys.must_be(name("attention.causal"), True)
    keys.must_be(name("expert_count"), 0)
    keys.must_be(name("expert_used_count"), 0)
    keys.must_be("general.type", "model")
    keys.must_be("split.count", 0, 1)
    theta, scaling = shortest(keys.number(name("rope.freq_base"), 10_000.0)), read_scaling(name("rope.scaling"), keys)
    if stretch:
        if scaling:
            raise keys.refused(name("rope.scaling.type"), "there is rope_freqs.weight as well; no model here has both")
        scaling = {**LLAMA3, "factor": stretch}
    full = {"rope_type": "default", **scaling, "rope_theta": theta}
    architecture, model_type = READ[arch]
    raw = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": keys.whole(name("feed_forward_length")),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole(name("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "rms_norm_eps": shortest(keys.number(name("attention.layer_norm_rms_epsilon"))),
        "tie_word_embeddings": tied,
        "rope_parameters": full,
    }
    if arch == "llama":
        raw |= {"attention_bias": "blk.0.attn_q.bias" in shapes, "mlp_bias": "blk.0.ffn_up.bias" in shapes}
    if arch == "olmo2":
        keys.must_be(name("attention.key_length"), width // heads)
    if arch in PERIOD:
        kinds, window = read_windows(name("attention.sliding_window"), keys, layers, PERIOD[arch])
        local = theta
        if arch == "gemma3":
            local = shortest(keys.number(name("rope.freq_base_swa"), GEMMA_LOCAL))
            cap = keys.get(name("final_logit_softcapping"))
            raw["final_logit_softcapping"] = shortest(keys.number(name("final_logit_softcapping"))) if cap else None
            raw["query_pre_attn_scalar"] = width // heads if layers == 62 else head_dim  # 62 layers are the 27B
        if window or arch == "gemma3":
            sliding = {"rope_type": "default", "rope_theta": local}
            raw |= {"layer_types": kinds, "sliding_window": window, "rope_parameters": {FULL: full, SLIDING: sliding}}
        if window and arch == "olmo2":
            architecture, model_type = OLMO3
    ignored = {name(key) for key in NO_EFFECT}
    for key in sorted(key for key in keys.left - ignored if key.startswith(f"{arch}.")):
        raise keys.refused(key, "it is not known here, and would be ignored")
    return {"architectures": [architecture], "model_type": model_type, **raw}


def read_windows(name: str, keys: Keys, layers: int, period: int) -> tuple[list[str], int | None]:
    """The types of the layers, and their window, if there is one. A file's own list of the layers must be llama.cpp's."""
    window = keys.whole(name) if keys.get(name) else None
    kinds = [window is not None and (layer + 1) % period != 0 for layer in range(layers)]
    keys.must_be(f"{name}_pattern", kinds, period)
    return [SLIDING if kind else FULL for kind in kinds], window


def read_scaling(name: str, keys: Keys) -> dict[str, Any]:
    """The scaling of rotary positions without its base; empty where there is none."""
    kind = keys.get(f"{name}.type", "linear" if keys.get(f"{name}.factor") else "none")
    if kind not in ("none", "linear", "yarn"):
        raise keys.refused(f"{name}.type", "only none, linear and yarn are read")
    if kind == "none" or not keys.get(f"{name}.factor"):
        return {}
    found: dict[str, Any] = {"rope_type": kind, "factor": shortest(keys.number(f"{name}.factor"))}
    if kind == "linear":
        return found
    keys.must_be(f"{name}.yarn_ext_factor", 1.0)
    keys.must_be(f"{name}.yarn_attn_factor", 1.0)
    sharpened = keys.number(f"{name}.attn_factor", 1.0) * (0.1 * log(found["factor"]) + 1)
    return found | {
        "beta_fast": shortest(keys.number(f"{name}.yarn_beta_fast", 32.0)),
        "beta_slow": shortest(keys.number(f"{name}.yarn_beta_slow", 1.0)),
        "original_max_position_embeddings": keys.whole(f"{name}.original_context_length"),
        "attention_factor": sharpened if f"{name}.attn_factor" not in keys.values else shortest(sharpened),
    }


def architecture(model: Model) -> str:
    """llama.cpp's architecture for a model; ValueError if there is none."""
    name = json_of(model)["architectures"][0]
    if name not in ARCHITECTURE:
        raise ValueError(f"a GGUF file is written of {', '.join(ARCHITECTURE)}; this model is a {name}")
    return ARCHITECTURE[name]


def write_metadata(model: Model, context: int, tensors: Collection[str]) -> dict[str, Any]:
    """The metadata of a model whose file has these ``tensors``, for at most ``context`` tokens.

    ValueError, with what would differ, for a model that llama.cpp does not compute.
    """
    arch, raw = architecture(model), json_of(model)
    rope = raw["rope_parameters"].get(FULL, raw["rope_parameters"])
    values = {
        "context_length": context,
        "vocab_size": raw["vocab_size"],
        "embedding_length": raw["hidden_size"],
        "block_count": raw["num_hidden_layers"],
        "feed_forward_length": raw["intermediate_size"],
        "attention.head_count": raw["num_attention_heads"],
        "attention.head_count_kv": raw["num_key_value_heads"],
        "attention.key_length": raw["head_dim"],
        "attention.value_length": raw["head_dim"],
        "attention.layer_norm_rms_epsilon": float(raw["rms_norm_eps"]),
        "rope.dimension_count": raw["head_dim"],
        "rope.freq_base": float(rope["rope_theta"]),
        **{f"rope.scaling.{key}": value for key, value in write_scaling(rope).items()},
    }
    kinds = [kind == SLIDING for kind in raw.get("layer_types", [FULL] * model.n_layers)]
    if raw.get("sliding_window") and (any(kinds) or "layer_types" not in raw):
        values |= {"attention.sliding_window": raw["sliding_window"], "attention.sliding_window_pattern": kinds}
    if raw.get("final_logit_softcapping"):
        values["final_logit_softcapping"] = float(raw["final_logit_softcapping"])
    metadata = {f"{arch}.{key}": value for key, value in values.items()}
    shapes = dict.fromkeys(tensors, (0,)) | {"token_embd.weight": (model.vocab_size, model.d_model)}
    stretch = float(rope["factor"]) if rope["rope_type"] == "llama3" else 0.0
    try:
        back = model_of(read_config(arch, Keys(metadata, arch), shapes, model.tie_embeddings, stretch), arch)
    except ValueError as error:
        raise ValueError(f"llama.cpp computes no such model: as {error}") from None
    if differ := differences(back, model):
        raise ValueError(f"llama.cpp computes no such model: as {arch} it would differ in {', '.join(differ)}")
    return metadata


def write_scaling(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a scaling, of its config.json's; that of Llama 3 has none, as it is a tensor."""
    kind = rope["rope_type"]
    found = {"type": kind, "factor": float(rope.get("factor", 1))}
    if kind == "linear":
        return found
    if kind != "yarn":
        return {}
    usual = 0.1 * log(found["factor"]) + 1
    sharper = {} if rope["attention_factor"] == usual else {"attn_factor": rope["attention_factor"] / usual}
    return {
        **found,
        "original_context_length": rope["original_max_position_embeddings"],
        "yarn_beta_fast": float(rope["beta_fast"]),
        "yarn_beta_slow": float(rope["beta_slow"]),
        **sharper,
    }
