"""The architectures of transformers with recurrent layers. Imports no torch.

A layer is ``linear_attention`` or ``full_attention`` by ``layer_types``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from olmo_fn.formats.families import Family, attention, depth, model, shortest, silu, sizes
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.rope import FULL, Rotation, full_json, one_rope, part_rope
from olmo_fn.models.config import Attention, Block, FeedForwardSettings, GatedDelta, Model, PreNorm, RMSNorm

if TYPE_CHECKING:
    from olmo_fn.formats.names import Stored

LINEAR = "linear_attention"
ONLY_AT_FIRST = ("linear_a_log_max", "linear_a_log_min", "linear_dt_init_floor", "linear_dt_max", "linear_dt_min")
"""Keys about initial values."""


def read_olmo_hybrid(keys: Keys) -> Model:
    """Gated DeltaNet in blocks with norms on the inputs, beside blocks of OLMo 2. A ``rope_theta`` of null is no rotation."""
    heads = keys.whole("num_attention_heads")
    width = keys.whole("linear_key_head_dim", 3 * keys.whole("hidden_size") // (4 * keys.whole("linear_num_key_heads", heads)))
    for name in ONLY_AT_FIRST:
        keys.get(name)
    mixer = GatedDelta(
        n_heads=keys.whole("linear_num_key_heads", heads),
        n_value_heads=keys.whole("linear_num_value_heads", heads),
        head_dim=width,
        value_head_dim=keys.whole("linear_value_head_dim", 2 * width),
        conv_size=keys.whole("linear_conv_kernel_dim", 4),
        negative_eigenvalues=keys.flag("linear_allow_neg_eigval", True),
    )
    turned = "rope_theta" not in (rope := keys.object("rope_parameters")) or rope["rope_theta"] is not None
    full = attention(keys, one_rope(keys)) if turned else replace(attention(keys, Rotation(1.0)), rope_layers="none")
    return of_layers(keys, PreNorm(mixer=mixer), Block(mixer=full), silu(keys))


def write_olmo_hybrid(m: Model) -> dict[str, Any]:
    """The keys of an OLMo-hybrid."""
    mixer, full = recurrent(m), with_attention(m)
    rope = full_json(full)[2] if full.block.mixer.rope_layers != "none" else {"rope_type": "default", "rope_theta": None}
    more = {"linear_allow_neg_eigval": mixer.negative_eigenvalues, "rope_parameters": rope, "layer_types": types(m)}
    return {**sizes(full), **linear_json(m, mixer), **more}


def olmo_hybrid_tensors(m: Model, names: Mapping[str, Stored]) -> dict[str, Stored]:
    """The norms of recurrent layers have names of their own in the released files."""
    found = dict(names)
    for layer, block in enumerate(m.layers):
        if isinstance(block.mixer, GatedDelta):
            for norm, (theirs, module) in zip(("attention_norm", "feed_forward_norm"), NORMS, strict=True):
                path = f"blocks.{layer}.{norm}"
                found[path] = names[path]._replace(name=names[path].name.replace(module, theirs))
    return found


NORMS = (("attention_layer_norm", "input_layernorm"), ("feedforward_layer_norm", "post_attention_layernorm"))
"""What norms are called in the released files of OLMo-hybrid, and in its modules. transformers reads both, and writes the first
in layers of attention, too."""
CONVOLUTIONS = tuple(f"linear_attn.{one}_conv1d.weight" for one in "qkv")
"""transformers (5.24) has them as one, and when it saves them divides it in three equal parts, whatever they are."""


def read_qwen3_5(keys: Keys) -> Model:
    """Gated DeltaNet and gated attention, a dense network behind each. The language model alone."""
    keys.must_be("attn_output_gate", True)
    keys.must_be("mlp_only_layers", [])
    keys.must_be("mtp_num_hidden_layers", 0)
    keys.get("mamba_ssm_dtype")  # of a cache
    # Sections are of positions in images; those of a text are the same in all.
    return gated(keys, silu(keys), part_rope(keys, 0.25, of_images=("mrope_section", "mrope_interleaved")), kv_heads=4)


def gated(keys: Keys, feed_forward: FeedForwardSettings, rope: tuple[Rotation, float], kv_heads: int) -> Model:
    """Gated DeltaNet and attention with a gate, of whose heads a part is rotated; gains around 0: what Qwen's hybrids have."""
    keys.must_be("attention_bias", False)  # it would have one of the gate, too
    mixer = GatedDelta(
        n_heads=keys.whole("linear_num_key_heads", 16),
        n_value_heads=keys.whole("linear_num_value_heads", 32),
        head_dim=keys.whole("linear_key_head_dim", 128),
        value_head_dim=keys.whole("linear_value_head_dim", 128),
        conv_size=keys.whole("linear_conv_kernel_dim", 4),
        negative_eigenvalues=False,
        gate_norm_eps=keys.number("rms_norm_eps"),
    )
    turned, fraction = rope
    more: dict[str, Any] = {"qk_norm": "head", "zero_centred": True, "gate": "element", "rope_fraction": fraction}
    full = attention(keys, turned, head_dim=256, kv_heads=kv_heads, **more)
    found = of_layers(keys, PreNorm(mixer=mixer), PreNorm(mixer=full), feed_forward)
    return replace(found, norm=RMSNorm(zero_centred=True))


def write_qwen3_5(m: Model) -> dict[str, Any]:
    """The keys of a Qwen 3.5."""
    mixer, full = recurrent(m), with_attention(m)
    rope = {**full_json(full)[2], "partial_rotary_factor": full.block.mixer.rope_fraction}
    return {**sizes(full), **linear_json(m, mixer), "rope_parameters": rope, "layer_types": types(m)}


def qwen3_5_tensors(m: Model, names: Mapping[str, Stored]) -> dict[str, Stored]:
    """Queries, keys and values are one matrix there, and one convolution; each head of attention has its gate behind it."""
    renamed = {"w_gate": "in_proj_z", "to_decay": "in_proj_a", "to_beta": "in_proj_b"}
    return fused(m, names, renamed, side_by_side={"in_proj_qkv": ("w_q", "w_k", "w_v")})


def fused(
    m: Model,
    names: Mapping[str, Stored],
    renamed: Mapping[str, str],
    side_by_side: Mapping[str, Sequence[str]],
    by_head: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> dict[str, Stored]:
    """Where the parameters of Qwen's hybrids are: each head of attention has its gate behind it, three convolutions are one,
    and of recurrent layers some are ``renamed``, and others one tensor: ``side_by_side``, or key head after key head.
    """
    renamed = {"out_norm": "norm", "w_out": "out_proj", **renamed}
    side_by_side = {"conv1d": ("q_conv", "k_conv", "v_conv"), **side_by_side}
    found = dict(names)
    for layer, block in enumerate(m.layers):
        at, inside = f"blocks.{layer}.attention.", f"model.layers.{layer}."
        if isinstance(block.mixer, GatedDelta):
            for name, theirs in renamed.items():
                found[at + name] = names[at + name]._replace(name=f"{inside}linear_attn.{theirs}.weight")
            for turns, tensors in ((1, side_by_side), (block.mixer.n_heads, by_head)):
                for theirs, parts in tensors.items():
                    found |= in_turns(names, [at + name for name in parts], f"{inside}linear_attn.{theirs}.weight", turns)
        else:
            paths = [f"{at}w_q", f"{at}w_gate"]
            found |= in_turns(names, paths, names[paths[0]].name, block.mixer.n_heads)
    return found


def in_turns(names: Mapping[str, Stored], paths: Sequence[str], tensor: str, turns: int) -> dict[str, Stored]:
    """Parameters that share a ``tensor``, each with an equal part of its rows in each of the ``turns``."""
    from olmo_fn.formats.names import Rows

    heights = [names[path].shape[0] // turns for path in paths]
    stride, first, found = sum(heights), 0, {}
    for path, height in zip(paths, heights, strict=True):
        shape, rows = (turns * stride, *names[path].shape[1:]), Rows(first, height, stride)
        found[path] = names[path]._replace(name=tensor, shape=shape, rows=rows)
        first += height
    return found


HYBRID_FAMILIES = (
    Family(
        "OlmoHybridForCausalLM",
        "olmo_hybrid",
        read_olmo_hybrid,
        write_olmo_hybrid,
        tensors=olmo_hybrid_tensors,
        aliases=NORMS,
        joined=CONVOLUTIONS,
    ),
    Family("Qwen3_5ForCausalLM", "qwen3_5_text", read_qwen3_5, write_qwen3_5, qwen3_5_tensors),
)


def of_layers(keys: Keys, linear: Block, full: Block, feed_forward: FeedForwardSettings) -> Model:
    """A model of such blocks, which have a network behind their mixer, in the order of ``layer_types``."""
    n, interval = depth(keys), keys.whole("full_attention_interval", 4)
    found = keys.get("layer_types", [FULL if (layer + 1) % interval == 0 else LINEAR for layer in range(n)])
    if not isinstance(found, list) or len(found) != n or {FULL, LINEAR} != {str(kind) for kind in found}:
        raise keys.refused("layer_types", f"it must name {FULL} or {LINEAR} for each of the {n} layers, and both of them")
    blocks = {LINEAR: replace(linear, feed_forward=feed_forward), FULL: replace(full, feed_forward=feed_forward)}
    pattern = tuple(blocks[kind] for kind in shortest(found))
    return replace(model(keys, full.mixer, feed_forward), block=pattern[-1], pattern=pattern)


def recurrent(m: Model) -> GatedDelta:
    """The first of its recurrent mixers; ValueError if there is none."""
    found = next((block.mixer for block in m.layers if isinstance(block.mixer, GatedDelta)), None)
    if found is None:
        raise ValueError("no layer is recurrent")
    return found


def with_attention(m: Model) -> Model:
    """The model as if all its layers were its first with attention; ValueError if there is none."""
    found = next((block for block in m.layers if isinstance(block.mixer, Attention)), None)
    if found is None:
        raise ValueError("no layer has attention")
    return replace(m, block=found, pattern=())


def linear_json(m: Model, mixer: GatedDelta) -> dict[str, Any]:
    """The sizes of recurrent layers."""
    return {
        "linear_num_key_heads": mixer.n_heads,
        "linear_num_value_heads": mixer.value_heads,
        "linear_key_head_dim": mixer.width(m.d_model),
        "linear_value_head_dim": mixer.value_width(m.d_model),
        "linear_conv_kernel_dim": mixer.conv_size,
    }


def types(m: Model) -> list[str]:
    """The ``layer_types`` of a model."""
    return [LINEAR if isinstance(block.mixer, GatedDelta) else FULL for block in m.layers]
