"""The model in OLMo-core's ``config.json``. Every field is read, or known to change no number, or refused by name.

OLMo-core 2.x and 3.x: a block's attention is called ``attention`` until 2.4, and ``sequence_mixer`` since. A field that is not
there has OLMo-core's default, which for biases is true.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from olmo_fn.formats.groups import Group, shown
from olmo_fn.models.config import (
    Attention,
    Block,
    FeedForwardSettings,
    GatedDelta,
    GeGLU,
    Head,
    Hybrid,
    LayerNorm,
    Model,
    MoE,
    Normalized,
    NormSettings,
    PeriNorm,
    PreNorm,
    RMSNorm,
    ScaledNorm,
    ScaledSwiGLU,
    SwiGLU,
)
from olmo_fn.models.settings.rope_scaling import AdjustedBase, Interpolation, NoScaling, RopeScaling, Stepwise, YaRN

HOW = (
    *("_CLASS_", "type", "dtype", "backend", "use_flash", "fused_ops", "loss_implementation", "full_precision"),
    "use_recompute_qkv_prep",
)
"""Fields that say how something is computed, not what."""
OF_MODEL = ("compile", "dp_config", "tp_config", "cp_config", "ac_config", "init_seed", "init_device", "embedding_init_std")
EIGHT_BITS = ("mxfp8_projections", "mxfp8_qkv_projection", "mxfp8_out_projection", "mxfp8_save_qkv_for_backward")
BLOCKS = {
    "default": PreNorm,
    "default_scaled": ScaledNorm,
    "reordered_norm": Block,
    "peri_norm": PeriNorm,
    "normalized": Normalized,
}
SPARSE = {
    "moe": PreNorm,
    "moe_reordered_norm": Block,
    "moe_hybrid": partial(Hybrid, norms="input"),
    "moe_hybrid_reordered_norm": partial(Hybrid, norms="output"),
}
"""Blocks with experts; hybrid ones have a dense network beside them."""
RMS = ("rms", "fused_rms", "cute_rms", "qwen_rms", "nemotron_rms")
"""Norms that differ in their rounding alone."""
Norms = set[tuple[NormSettings, float]]


def model(config: Mapping[str, Any]) -> Model:
    """The model that ``config["model"]`` describes; ValueError with the field's path for what this package has not.

    >>> norm = {"name": "rms", "eps": 1e-6, "bias": False}
    >>> attention = {"n_heads": 2, "bias": False, "qk_norm": norm, "rope": {"theta": 10_000}}
    >>> feed_forward = {"hidden_size": 24, "bias": False}
    >>> block = {"name": "reordered_norm", "attention": attention, "feed_forward": feed_forward, "layer_norm": norm}
    >>> head = {"layer_norm": norm, "bias": False}
    >>> found = model({"model": {"d_model": 16, "n_layers": 2, "vocab_size": 64, "block": block, "lm_head": head}})
    >>> found.block.mixer.rope_theta, found.block.feed_forward.hidden_size
    (10000.0, 24)
    """
    fields = Group(config.get("model"), "model", HOW)
    fields.one_of("name", "default", "normalized", "moe")
    d_model, n_layers = fields.take("d_model", int), fields.take("n_layers", int)
    if not 1 <= n_layers <= 1024:
        raise ValueError(f"model.n_layers is {n_layers}; it must be from 1 to 1024")
    norms: Norms = set()
    pattern = _pattern(fields, n_layers, d_model, norms)
    head = _head(fields.group("lm_head"), norms)
    if embed_norm := "embedding_norm" in fields.left:
        _norm(fields.group("embedding_norm"), norms)
    if len(norms) > 1:
        found = " and ".join(sorted(f"{norm.name} with eps {eps:g}" for norm, eps in norms))
        raise ValueError(f"model: its norms are of different kinds, {found}, and there is one for all of a model here")
    norm, eps = norms.pop() if norms else (RMSNorm(), 1e-6)
    method = fields.left.pop("init_method", "normal")
    made = Model(
        d_model,
        n_layers,
        vocab_size=fields.take("vocab_size", int),
        block=pattern[0],
        pattern=pattern if len(pattern) > 1 else (),
        norm=norm,
        norm_eps=eps,
        embed_scale=fields.maybe("embed_scale", float),
        embed_norm=embed_norm,
        head=head,
        tie_embeddings=fields.take("tie_word_embeddings", bool, False),
        init_method=method if method in ("llama", "llama_depth", "normalized", "fan_in") else "normal",
        init_std=fields.take("init_std", float, 0.02),
    )
    fields.ignore(*OF_MODEL)
    fields.end()
    made.check()
    return _simplest(made)


def _pattern(fields: Group, n_layers: int, d_model: int, norms: Norms) -> tuple[Block, ...]:
    """Blocks that are repeated over the depth."""
    pattern, overrides = fields.maybe("block_pattern", list), fields.maybe("block_overrides", dict) or {}
    if pattern:
        kinds = fields.group("block")
        named = {name: _block(kinds.group(name), d_model, n_layers, norms) for name in list(kinds.left)}
        if not all(isinstance(name, str) and name in named for name in pattern):
            raise ValueError(f"model.block_pattern must name blocks of model.block, {', '.join(named)}")
        found = tuple(named[name] for name in pattern)
    else:
        found = (_block(fields.group("block"), d_model, n_layers, norms),)
    if not overrides:
        return found
    layers = [found[i % len(found)] for i in range(n_layers)]
    for key, value in overrides.items():
        path = f"model.block_overrides.{key}"
        if not key.isdecimal() or int(key) >= n_layers:
            raise ValueError(f"{path}: there is no such layer, but {n_layers}")
        layers[int(key)] = _block(Group(value, path, HOW), d_model, n_layers, norms)
    return tuple(layers)


def _block(fields: Group, d_model: int, n_layers: int, norms: Norms) -> Block:
    kinds: dict[str, Any] = {**BLOCKS, **SPARSE}
    name = fields.one_of("name", *kinds)
    kind, more = kinds[name], {}
    mixer = _mixer(fields.group("sequence_mixer", "attention"), d_model, norms)
    feed_forward: FeedForwardSettings
    if name in SPARSE:
        feed_forward = _experts(fields.group("feed_forward_moe"), n_layers, norms)
    else:
        feed_forward = _feed_forward(fields.group("feed_forward"))
    if "hybrid" in name:
        more["dense"] = _feed_forward(fields.group("feed_forward"))
    if kind is not Normalized:
        _norm(fields.group("layer_norm"), norms)
    unit = kind is Normalized, getattr(mixer, "qk_norm", "none") == "unit", isinstance(feed_forward, ScaledSwiGLU)
    if len(set(unit)) > 1:
        raise ValueError(f"{fields.path}: block, attention and feed-forward network must be normalized all three, or none")
    fields.one_of("dropout", 0.0)
    found: Block = kind(
        **more,
        mixer=mixer,
        feed_forward=feed_forward,
        attention_factor=fields.take("attention_residual_alpha", float, 1.0),
        feed_forward_factor=fields.take("feed_forward_residual_alpha", float, 1.0),
    )
    fields.end()
    return found


def _feed_forward(fields: Group) -> FeedForwardSettings:
    name, activation = fields.one_of("name", "default", "normalized"), fields.one_of("activation", "silu", "gelu_tanh")
    hidden, bias = fields.take("hidden_size", int), fields.take("bias", bool, name == "default")
    fields.end()
    if name == "normalized" and (bias or activation != "silu"):
        raise ValueError(f"{fields.path} is normalized, and then only silu without biases is read")
    kind: Any = ScaledSwiGLU if name == "normalized" else GeGLU if activation == "gelu_tanh" else SwiGLU
    found: FeedForwardSettings = kind(hidden_size=hidden, feed_forward_bias=bias)
    return found


def _experts(fields: Group, n_layers: int, norms: Norms) -> MoE:
    """Those of a block. Their capacity, and the loss over all tokens, are those of what a rank computes at once there."""
    bounded = fields.one_of("name", "default", "dropless") == "default"
    shared = _feed_forward(fields.group("shared_mlp")) if "shared_mlp" in fields.left else None
    shared_size = 0 if shared is None else getattr(shared, "hidden_size", 0)
    if shared not in (None, SwiGLU(hidden_size=shared_size)):
        raise ValueError(f"{fields.path}.shared_mlp is not the kind that is read: silu, without biases")
    by_instance = fields.one_of("lb_loss_granularity", "local_batch", "instance") == "instance"
    per_layer = 1 if fields.take("scale_loss_by_num_layers", bool, True) else n_layers
    no_loss = "lb_loss_weight" in fields.values and fields.values["lb_loss_weight"] is None
    capacity = fields.take("capacity_factor", float, 1.2)
    router = fields.group("router") if "router" in fields.left else Group({}, f"{fields.path}.router", fields.ignored)
    router.one_of("name", "default")
    for flag in ("uniform_expert_assignment", "random_expert_assignment"):
        router.one_of(flag, False)
    found = MoE(
        num_experts=fields.take("num_experts", int, 1),
        top_k=router.take("top_k", int, 1),
        expert_size=fields.take("hidden_size", int, 256),
        shared_size=shared_size,
        shared_mix="average",
        gating=router.one_of("gating_function", "softmax", "sigmoid"),
        weight_norm=router.maybe("normalize_expert_weights", float),
        jitter=router.take("jitter_eps", float, 0.0),
        capacity_factor=capacity if bounded else None,
        capacity_over="batch",
        balance_loss=0.0 if no_loss else fields.take("lb_loss_weight", float, 0.01) * per_layer,
        balance_over="sequence" if by_instance else "batch",
        router_z_loss=fields.take("z_loss_weight", float, 0.0) * per_layer,
        balance_rate=router.take("bias_gamma", float, 0.0),
        **_latent(fields, norms),
    )
    router.end()
    fields.end()
    return found


def _latent(fields: Group, norms: Norms) -> dict[str, Any]:
    if "latent_moe" not in fields.left:
        return {}
    latent = fields.group("latent_moe")
    found = {
        "latent_size": latent.take("latent_dim", int),
        "latent_norm": latent.take("up_proj_input_norm_enabled", bool, False),
    }
    latent.one_of("bias", False)
    if found["latent_norm"]:
        given = latent.group("up_proj_input_norm") if "up_proj_input_norm" in latent.left else None
        _norm(given or Group({"name": "rms", "bias": False}, latent.path), norms)
    latent.ignore("up_proj_input_norm")
    latent.end()
    return found


def _mixer(fields: Group, d_model: int, norms: Norms) -> Attention | GatedDelta:
    kind = str(fields.values.get("type") or fields.values.get("_CLASS_") or "attention").rpartition(".")[2]
    if kind in ("gated_delta_net", "GatedDeltaNetConfig"):
        return _gated_delta(fields, d_model)
    if kind not in ("attention", "AttentionConfig"):
        raise ValueError(f"{fields.path} is a {kind[:60]}, and of mixers only attention and gated_delta_net are read")
    return _attention(fields, d_model, norms)


def _gated_delta(fields: Group, d_model: int) -> GatedDelta:
    fields.one_of("conv_bias", False)
    n_heads, head_dim = fields.take("n_heads", int, 16), fields.maybe("head_dim", int)
    expand = fields.take("expand_v", float, 2.0)
    found = GatedDelta(
        n_heads=n_heads,
        n_value_heads=fields.maybe("n_v_heads", int),
        head_dim=head_dim,
        value_head_dim=None if expand == 2 else int((head_dim or d_model // max(n_heads, 1)) * expand),
        conv_size=fields.take("conv_size", int, 4),
        negative_eigenvalues=fields.take("allow_neg_eigval", bool, True),
        gate_norm_eps=fields.take("norm_eps", float, 1e-5),
    )
    fields.end()
    return found


def _attention(fields: Group, d_model: int, norms: Norms) -> Attention:
    name = fields.one_of("name", "default", "normalized")
    fields.one_of("dropout", 0.0)
    for flag in EIGHT_BITS:
        fields.one_of(flag, False)
    n_heads, head_dim = fields.take("n_heads", int, 16), fields.maybe("head_dim", int)
    k = head_dim or d_model // max(n_heads, 1)
    gate = fields.group("gate") if "gate" in fields.left else Group({}, "")
    found = Attention(
        n_heads=n_heads,
        n_kv_heads=fields.maybe("n_kv_heads", int),
        head_dim=head_dim,
        qk_norm=_qk_norm(fields, name, norms),  # type: ignore[arg-type]
        attention_bias=fields.take("bias", bool, name == "default"),
        clip_qkv=fields.maybe("clip_qkv", float),
        gate={"headwise": "head", "elementwise": "element", "": "none"}[
            gate.one_of("granularity", "headwise", "elementwise") if gate.path else ""
        ],  # type: ignore[arg-type]
        sinks=fields.take("attention_sinks", bool, False),
        scalable_softmax=fields.take("scalable_softmax", bool, False),
        score_scale=k**0.5 if name == "normalized" else None,
        **_rope(fields),
        **_windows(fields),
    )
    gate.end()
    fields.end()
    return found


def _qk_norm(fields: Group, name: str, norms: Norms) -> str:
    """Of which kind the norms of queries and keys are."""
    by_head, gains = fields.take("use_head_qk_norm", bool, False), fields.take("qk_norm_per_head_gains", bool, False)
    if name == "normalized":
        if "qk_norm" in fields.left:
            fields.group("qk_norm").one_of("name", "l2_norm")
        return "unit"
    if "qk_norm" not in fields.left:
        return "none"
    _norm(fields.group("qk_norm"), norms, RMS)
    return "full" if not by_head else "per-head" if gains else "head"


def _rope(fields: Group) -> dict[str, Any]:
    if "rope" not in fields.left:
        return {"rope_layers": "none"}
    rope = fields.group("rope")
    found = {
        "rope_theta": rope.take("theta", float, 500_000.0),
        "rope_interleaved": rope.one_of("name", "default", "fused", "complex") == "complex",
        "rope_layers": "windowed" if rope.take("no_global_rope", bool, False) else "all",
        "rope_fraction": rope.take("partial_rotary_factor", float, 1.0),
    }
    if "scaling" in rope.left:
        found |= {"rope_scaling": _scaling(rope.group("scaling")), "rope_scaled_layers": "all"}
    rope.end()
    return found


def _scaling(fields: Group) -> RopeScaling:
    kind = str(fields.values.get("_CLASS_")).rpartition(".")[2].removesuffix("RoPEScalingConfig")
    if kind == "YaRN":  # without a rescaling of its own; old configs have one that OLMo-core ignores
        fields.ignore("attention_rescale_factor")
    fields.one_of("attention_rescale_factor", 1.0)
    made: RopeScaling
    match kind:
        case "ABF":
            made = AdjustedBase(new_theta=fields.take("new_theta", float, 8_000_000.0))
        case "PI":
            made = Interpolation(factor=fields.take("factor", float, 2.0))
        case "Stepwise":
            low, high = fields.take("low_freq_proportion", float, 0.0), fields.take("high_freq_proportion", float, 0.25)
            if not 0 <= low < 1 or not 0 < high <= 1:
                raise ValueError(f"{fields.path}: the proportions {low:g} and {high:g} must be from 0 to 1")
            made = Stepwise(
                factor=fields.take("factor", float, 32.0),
                low_freq_factor=1 / (1 - low),
                high_freq_factor=1 / high,
                old_context=fields.take("old_context_len", int, 8192),
            )
        case "YaRN":
            made = YaRN(
                factor=fields.take("factor", float, 8.0),
                beta_fast=fields.take("beta_fast", float, 32.0),
                beta_slow=fields.take("beta_slow", float, 1.0),
                old_context=fields.take("old_context_len", int, 8192),
            )
        case _:
            raise ValueError(f"{fields.path} is {shown(kind)}, and only ABF, PI, Stepwise or YaRN is read")
    fields.end()
    return made


def _windows(fields: Group) -> dict[str, Any]:
    if "sliding_window" not in fields.left:
        return {"last_layer_full": False}
    sliding = fields.group("sliding_window")
    pattern = sliding.take("pattern", list)
    if not pattern or not all(type(size) is int for size in pattern):
        raise ValueError(f"{sliding.path}.pattern must be a list of whole numbers")
    first = sliding.take("force_full_attention_on_first_layer", bool, True)
    last = sliding.take("force_full_attention_on_last_layer", bool, True)
    sliding.end()
    return {"window_pattern": tuple(pattern), "first_layer_full": first, "last_layer_full": last}


def _norm(fields: Group, norms: Norms, kinds: tuple[str, ...] = (*RMS, "default")) -> None:
    """Add a norm to those of the model; the kind of those of queries and keys is not the model's."""
    own = kinds == RMS
    kind = fields.one_of("name", "default", *RMS)
    if own and kind == "default":
        raise ValueError(f"{fields.path}.name is {kind!r}, and for queries and keys only {' or '.join(map(repr, RMS))} is read")
    fields.one_of("elementwise_affine", True)
    bias, eps = fields.take("bias", bool, True), fields.take("eps", float, 1e-5)
    if bias and kind != "default":
        raise ValueError(f"{fields.path}.bias is true or not there, and norms of kind {kind} are read without biases")
    fields.end()
    norms.add((LayerNorm(bias=bias) if kind == "default" else RMSNorm(), eps))


def _head(fields: Group, norms: Norms) -> Head:
    scales = fields.one_of("name", "default", "normalized") == "normalized"
    bias = fields.take("bias", bool, not scales)
    if norm := "layer_norm" in fields.left:
        _norm(fields.group("layer_norm"), norms)
    fields.end()
    return Head(norm=norm, bias=bias, scales=scales)


def _simplest(made: Model) -> Model:
    """One block for all layers, where it gives the same ones: if all are alike, or if it is just those without a window whose
    rotary positions are scaled, as in OLMo 3.
    """
    if len(set(made.layers)) == 1:
        return replace(made, block=made.layers[0], pattern=())
    if not all(isinstance(block.mixer, Attention) for block in made.layers):
        return made
    scaled = next((block for block in made.layers if block.mixer.rope_scaling != NoScaling()), made.layers[0])
    block = replace(scaled, mixer=replace(scaled.mixer, rope_scaled_layers="full"))
    one = replace(made, block=block, pattern=())
    same = (
        replace(theirs, mixer=replace(theirs.mixer, rope_scaling=block.mixer.rope_scaling, rope_scaled_layers="full")) == block
        and theirs.mixer.rope(made, i) == block.mixer.rope(one, i)
        for i, theirs in enumerate(made.layers)
    )
    return one if all(same) else made
