"""A model from the config.json of a Hugging Face directory, and the config.json of a model. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from math import log
from pathlib import Path
from typing import Any

from olmo_fn.fields import values
from olmo_fn.formats.families import FAMILIES, Family
from olmo_fn.formats.families_moe import MOE_FAMILIES, spelled_out
from olmo_fn.formats.hybrids import HYBRID_FAMILIES
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.qwen3_next import QWEN3_NEXT
from olmo_fn.models.config import Attention, Block, GatedDelta, Model, MoE
from olmo_fn.models.settings.rope_scaling import AdjustedBase, NoScaling, YaRN

CONFIG = "config.json"
EVERY = (*FAMILIES, *HYBRID_FAMILIES, *MOE_FAMILIES, QWEN3_NEXT)
"""Every architecture that is read and written."""
NO_IDS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
"""transformers' defaults of these are of the tokenizers of its first models."""
LARGEST = 10 << 20
"""Bytes; a config.json has some thousand."""


def read_json(folder: Path) -> dict[str, Any]:
    """The config.json in ``folder``; ValueError, in one line, if there is none or it is no JSON object."""
    path = folder / CONFIG
    if not path.is_file():
        what = "has no config.json" if folder.is_dir() else "is not there"
        raise ValueError(f"{folder} {what}; give a directory in the form of Hugging Face, with config.json and safetensors")
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(LARGEST))
    except (ValueError, RecursionError):
        raise ValueError(f"{path} is no JSON") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file as transformers does."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def model_of(raw: Mapping[str, Any], where: str = CONFIG) -> Model:
    """The model that a config.json describes.

    ValueError, in one line that begins with ``where``, for an architecture that is not read here, and by its name for a key
    that asks for what no model here computes, or that is unknown.

    >>> sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 9}
    >>> raw = {"architectures": ["Olmo2ForCausalLM"], "rms_norm_eps": 1e-6, "rope_theta": 5e5, **sizes}
    >>> model_of(raw).block.mixer.rope_theta
    500000.0
    >>> model_of({**raw, "hidden_act": "relu"})
    Traceback (most recent call last):
    ValueError: config.json: hidden_act is "relu"; no model here computes that, only "silu" or "swish"
    """
    keys = Keys(raw, where)
    found = family_of(keys).read(keys)
    keys.end()
    try:
        found.check()
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return found


def family_of(keys: Keys) -> Family:
    """The family of the architecture that is named, or else of the ``model_type``."""
    names, kind = keys.get("architectures", []), keys.get("model_type")
    if not isinstance(names, list):
        raise keys.refused("architectures", "it must be a list")
    for family in EVERY:
        if family.architecture in names if names else family.model_type == kind:
            return family
    known = ", ".join(family.architecture for family in EVERY)
    raise ValueError(f"{keys.where}: the architecture {', '.join(map(str, names)) or kind} is not read here; there are {known}")


def json_of(model: Model) -> dict[str, Any]:
    """The config.json of a model without what is of no effect on its numbers, of the first family that computes the same.

    ValueError, with what differs from the nearest one, if there is none.
    """
    nearest: list[str] | None = None
    model = spelled_out(model)
    for family in EVERY:
        try:
            raw = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(model), **NO_IDS}
            differ = differences(model_of(raw), model)
        except (ValueError, AttributeError):  # a part has not the fields of this family's
            continue
        if not differ:
            return raw
        if nearest is None or len(differ) < len(nearest):
            nearest, name = differ, family.architecture
    why = f"; as {name} it would differ in {', '.join(nearest)}" if nearest else ""
    raise ValueError(f"no architecture of transformers computes this model{why}")


def differences(there: Model, here: Model) -> list[str]:
    """What of two models is not the same, as flags with both values; nothing if they compute the same from the same weights."""
    one, other = canonical(there), canonical(here)
    if one == other:
        return []
    layer = next((i for i, (a, b) in enumerate(zip(one.pattern, other.pattern, strict=False)) if a != b), 0)
    first, second = (
        {
            field.flag.replace("--", "--model.", 1): field.value
            for field in values(replace(m, block=m.pattern[layer], pattern=()))
        }
        for m in (one, other)
    )
    names = [*first, *(name for name in second if name not in first)]
    return [
        f"{name} {second.get(name, 'none')} (there {first.get(name, 'none')})"
        for name in names
        if first.get(name) != second.get(name)
    ]


def canonical(model: Model) -> Model:
    """The model with every default filled in, layer by layer, and without what is about initial weights alone.

    Two models compute the same function of the same parameters if, and only if, these are equal.

    >>> from olmo_fn.models.config import dense
    >>> canonical(dense(8, 2, 2, 16)) == canonical(dense(8, 2, 2, 16, n_kv_heads=2, window_pattern=(-1,), init_std=0.1))
    True
    """
    blocks = tuple(_block(block, model, layer) for layer, block in enumerate(model.layers))
    scale = 1.0 if model.embed_scale is None else model.embed_scale
    return replace(model, block=Block(), pattern=blocks, embed_scale=scale, init_method="normal", init_std=0.02)


def _block(block: Any, model: Model, layer: int) -> Any:
    block = replace(block, feed_forward=_experts(block.feed_forward.at(layer)))
    if isinstance(block.mixer, Attention):
        return replace(block, mixer=_attention(block.mixer, model, layer), dropout=0.0)
    return replace(block, mixer=_recurrent(block.mixer, model), dropout=0.0) if isinstance(block.mixer, GatedDelta) else block


def _experts(network: Any) -> Any:
    """Experts without what is about training: losses, jitter, a capacity, and how fast biases move, if there are any."""
    if not isinstance(network, MoE):
        return network
    plain, groups = MoE(), network.expert_groups > 1
    training = ("balance_loss", "balance_over", "router_z_loss", "jitter", "dispatch", "capacity_factor", "capacity_over")
    of_parts = (("shared_mix", network.shared_size), ("latent_norm", network.latent_size), ("top_groups", groups))
    unused = (*(name for name, used in of_parts if not used), "dense_layers", "dense_size", *training)
    rate = float(network.balance_rate > 0)
    return replace(network, balance_rate=rate, **{name: getattr(plain, name) for name in unused})


def _recurrent(mixer: GatedDelta, model: Model) -> GatedDelta:
    key, value = mixer.width(model.d_model), mixer.value_width(model.d_model)
    return replace(mixer, n_value_heads=mixer.value_heads, head_dim=key, value_head_dim=value, rule="auto")


def _attention(mixer: Attention, model: Model, layer: int) -> Attention:
    window = mixer.window(layer, model.n_layers)
    rotated = mixer.rope_layers == "all" or (mixer.rope_layers == "windowed" and window is not None)
    theta = mixer.local_rope_theta if window is not None and mixer.local_rope_theta is not None else mixer.rope_theta
    scaling = mixer.rope_scaling if mixer.rope_scaled_layers == "all" or window is None else NoScaling()
    if isinstance(scaling, AdjustedBase):
        theta, scaling = scaling.new_theta, NoScaling()
    if isinstance(scaling, YaRN) and scaling.attention_factor is None:
        scaling = replace(scaling, attention_factor=0.1 * log(scaling.factor) + 1)
    return replace(
        mixer,
        n_kv_heads=mixer.kv_heads,
        head_dim=mixer.width(model.d_model),
        score_scale=mixer.width(model.d_model) ** -0.5 if mixer.score_scale is None else mixer.score_scale,
        rope_theta=theta if rotated else 1.0,
        local_rope_theta=None,
        rope_scaling=scaling if rotated else NoScaling(),
        rope_scaled_layers="all",
        rope_layers="all" if rotated else "none",
        window_pattern=() if window is None else (window,),
        first_layer_full=False,
        last_layer_full=False,
    )
