"""A config.json is read in whole or refused by the key's name; a model that is written as one is the same when it is read."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.formats.config_json import canonical, differences, json_of, model_of
from olmo_fn.models import families, families_moe
from olmo_fn.models.config import Attention, Block, GeGLU, Head, Model, MoE, PeriNorm, PreNorm, RMSNorm, SwiGLU, dense, modified
from olmo_fn.models.settings.rope_scaling import AdjustedBase, Interpolation, NoScaling, Stepwise, YaRN

PRESETS = {
    name: model
    for group in (vars(families) | vars(families_moe)).values()
    if isinstance(group, dict)
    for name, model in group.items()
    if isinstance(model, Model)
}

NOWHERE = ("ngpt", "smallmoe", "olmo3moe")
"""What transformers has no architecture for."""

# --- released models, as their config.json says it ------------------------------------------------------------

COMMON = {"attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "use_cache": True}
RELEASED = {
    "olmo2-7b": {
        "architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2", "attention_bias": False, "eos_token_id": 100257,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 4096, "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 100277, "rms_norm_eps": 1e-6, "rope_scaling": None,
        "rope_theta": 500000, "tie_word_embeddings": False, "torch_dtype": "float32", "vocab_size": 100352,
    },
    "olmo3-7b-long": {
        "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False, "eos_token_id": 100257,
        "hidden_size": 4096, "intermediate_size": 11008, "max_position_embeddings": 65536, "num_attention_heads": 32,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8, "num_hidden_layers": 32, "num_key_value_heads": 32,
        "rms_norm_eps": 1e-6, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False, "dtype": "bfloat16",
        "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                         "original_max_position_embeddings": 8192, "rope_type": "yarn"}, "vocab_size": 100352,
    },
    "llama3.2-1b": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009], "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
        "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 16,
        "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                         "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
        "hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
        "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": True,
        "use_sliding_window": False, "vocab_size": 151936,
    },
    "gemma3-1b": {
        "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "attn_logit_softcapping": None,
        "final_logit_softcapping": None, "cache_implementation": "hybrid", "head_dim": 256, "hidden_act": None,
        "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
        "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26, "num_key_value_heads": 1,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-6, "rope_local_base_freq": 10000, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
    },
    "smollm2-135m": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_size": 576,
        "intermediate_size": 1536, "is_llama_config": True, "max_position_embeddings": 8192, "mlp_bias": False,
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3, "pretraining_tp": 1, "rms_norm_eps": 1e-5,
        "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "tie_word_embeddings": True, "vocab_size": 49152,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "olmoe-1b-7b": {
        "architectures": ["OlmoeForCausalLM"], "model_type": "olmoe", "attention_bias": False, "clip_qkv": None,
        "eos_token_id": 50279, "hidden_size": 2048, "intermediate_size": 1024, "max_position_embeddings": 4096,
        "norm_topk_prob": False, "num_attention_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "num_hidden_layers": 16, "num_key_value_heads": 16, "output_router_logits": False, "pad_token_id": 1,
        "rms_norm_eps": 1e-5, "rope_scaling": None, "rope_theta": 10000.0, "router_aux_loss_coef": 0.01,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 50304,
    },
    "qwen3-30b-a3b": {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048, "intermediate_size": 6144,
        "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
        "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
        "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-6,
        "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
        "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
    },
    "mixtral-8x7b": {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "bos_token_id": 1, "eos_token_id": 2,
        "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32,
        "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": False, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.02,
        "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "vocab_size": 32000,
    },
    "olmo-hybrid-7b-long": {
        "architectures": ["OlmoHybridForCausalLM"], "model_type": "olmo_hybrid", "attention_bias": False, "hidden_size": 3840,
        "intermediate_size": 11008, "layer_types": [*["linear_attention"] * 3, "full_attention"] * 8, "linear_a_log_max": 16.0,
        "linear_a_log_min": 0.0, "linear_allow_neg_eigval": True, "linear_conv_kernel_dim": 4, "linear_dt_init_floor": 1e-4,
        "linear_dt_max": 0.1, "linear_dt_min": 0.001, "linear_key_head_dim": 96, "linear_num_key_heads": 30,
        "linear_num_value_heads": 30, "linear_value_head_dim": 192, "max_position_embeddings": 65536, "rms_norm_eps": 1e-6,
        "num_attention_heads": 30, "num_hidden_layers": 32, "num_key_value_heads": 30, "tie_word_embeddings": False,
        "rope_parameters": {"rope_theta": None, "rope_type": "default"}, "vocab_size": 100352,
    },
    "qwen3.5-9b": {
        "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "attention_bias": False, "head_dim": 256,
        "attn_output_gate": True, "full_attention_interval": 4, "hidden_size": 4096, "intermediate_size": 12288,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32", "mlp_only_layers": [], "num_attention_heads": 16,
        "num_hidden_layers": 32, "num_key_value_heads": 4, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
        "rope_parameters": {"mrope_interleaved": True, "mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25,
                            "rope_theta": 10000000, "rope_type": "default"}, "vocab_size": 248320,
    },
    "qwen3-next-80b-a3b": {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "attention_bias": False, "bos_token_id": 151643,
        "decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048,
        "intermediate_size": 5120, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
        "moe_intermediate_size": 512, "norm_topk_prob": True, "num_attention_heads": 16, "num_experts": 512,
        "num_experts_per_tok": 10, "num_hidden_layers": 48, "num_key_value_heads": 2, "output_router_logits": False,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 10000000,
        "router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512, "tie_word_embeddings": False,
        "use_sliding_window": False, "vocab_size": 151936,
    },
}  # fmt: skip
"""Of OLMo-hybrid and Qwen 3.5, released with other parts or by another name, what transformers has for their sizes."""


@pytest.mark.parametrize("name", RELEASED)
def test_the_config_of_a_released_model_is_its_preset(name):
    assert differences(model_of({**COMMON, **RELEASED[name]}), PRESETS[name]) == []


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(NOWHERE)])
def test_every_preset_has_a_config_json(name):
    raw = json.loads(json.dumps(json_of(PRESETS[name])))
    assert differences(model_of(raw), PRESETS[name]) == []


def test_a_model_of_no_architecture_is_refused_with_what_differs():
    with pytest.raises(ValueError, match=r"no architecture of transformers computes this model; as \w+ it .*--model\.\S+ "):
        json_of(PRESETS["ngpt-271m"])
    with pytest.raises(ValueError, match=r"--model\.clip-qkv 2\.0 \(there None\)"):
        json_of(modified(dense(8, 2, 2, 16), clip_qkv=2.0))


# --- law 11, of configs ---------------------------------------------------------------------------------------

some = st.sampled_from
SCALINGS = (
    NoScaling(),
    Interpolation(factor=3.0),
    Stepwise(factor=8.0, old_context=64),
    YaRN(factor=4.0, old_context=32),
    AdjustedBase(new_theta=77.0),
)


@st.composite
def models(draw) -> Model:
    """Models of all kinds, most of which some architecture computes."""
    kind, heads = draw(some([Block, PreNorm, PreNorm, PeriNorm])), draw(some([2, 4]))
    gemma = kind is PeriNorm
    mixer = Attention(
        n_heads=heads,
        n_kv_heads=draw(some([None, 1, 2])),
        head_dim=draw(some([None, 6])),
        qk_norm="full" if kind is Block else "head" if gemma else draw(some(["none", "head"])),
        zero_centred=gemma,
        attention_bias=draw(some([False, False, True])),
        score_scale=draw(some([None, 16**-0.5])) if gemma else None,
        rope_theta=draw(some([1e4, 5e5])),
        local_rope_theta=draw(some([None, 1e4])) if gemma else None,
        rope_scaling=draw(some(SCALINGS)),
        rope_scaled_layers=draw(some(["full", "all"])),
        window_pattern=draw(some([(), (), (5,), (5, 5, -1), (-1, 5)])),
        first_layer_full=draw(st.booleans()),
        last_layer_full=draw(st.booleans()),
    )
    feed_forward = (GeGLU if gemma else SwiGLU)(
        hidden_size=draw(some([8, 12])), feed_forward_bias=draw(some([False, False, True]))
    )
    return Model(
        d_model=8,
        n_layers=draw(st.integers(1, 7)),
        vocab_size=draw(some([20, 33])),
        block=kind(mixer=mixer, feed_forward=feed_forward),
        norm=RMSNorm(zero_centred=gemma),
        norm_eps=draw(some([1e-5, 1e-6])),
        embed_scale=8**0.5 if gemma else None,
        head=Head(cap=draw(some([None, 30.0])) if gemma else None),
        tie_embeddings=draw(st.booleans()),
        init_std=draw(some([0.02, 0.3])),
    )


@st.composite
def sparse_models(draw) -> Model:
    """Models with experts, each of which some architecture computes; what is about training alone is drawn as well."""
    name = draw(some(["olmoe", "flex", "qwen", "qwen-mixed", "mixtral"]))
    heads, kind = draw(some([2, 4])), Block if name == "flex" else PreNorm
    plain = name in ("olmoe", "flex")
    mixer = Attention(
        n_heads=heads,
        n_kv_heads=draw(some([None, 1, 2])),
        head_dim=None if plain else draw(some([None, 6])),
        qk_norm="full" if plain else "none" if name == "mixtral" else "head",
        attention_bias=name != "mixtral" and draw(some([False, False, True])),
        rope_theta=draw(some([1e4, 5e5])),
        rope_scaling=draw(some(SCALINGS)),
        rope_scaled_layers="all",
        window_pattern=() if plain else draw(some([(), (5,)])),
        last_layer_full=False,
    )
    number = draw(st.integers(2, 5))
    moe = MoE(
        num_experts=number,
        top_k=draw(st.integers(1, number)),
        expert_size=draw(some([4, 8])),
        weight_norm=1.0 if name == "mixtral" else draw(some([None, 1.0])),
        balance_loss=draw(some([0.0, 0.02])),
        balance_over=draw(some(["batch", "sequence"])),
        router_z_loss=draw(some([0.0, 0.001])),
        capacity_factor=draw(some([None, None, 1.0])),
        jitter=draw(some([0.0, 0.1])),
        dispatch=draw(some(["auto", "gather"])),
        dense_layers=draw(some([0, 1, 2])) if name == "qwen-mixed" else 0,
        dense_size=12,
    )
    block = kind(mixer=mixer, feed_forward=moe)
    size = {"d_model": 8, "n_layers": draw(st.integers(1, 4)), "vocab_size": draw(some([20, 33]))}
    found = Model(**size, block=block, norm_eps=draw(some([1e-5, 1e-6])), tie_embeddings=draw(st.booleans()))
    if name != "qwen-mixed" or moe.dense_layers:
        return found
    return replace(found, pattern=draw(some([(block, replace(block, feed_forward=SwiGLU(hidden_size=12)))])))


@given(sparse_models())
@examples(60)
def test_every_such_model_with_experts_has_a_config_json(model):
    assert differences(model_of(json.loads(json.dumps(json_of(model)))), model) == []


def test_what_no_architecture_computes_of_experts_is_named():
    moe = Block(mixer=Attention(n_heads=2), feed_forward=MoE(num_experts=4, top_k=2, expert_size=8))
    for change, said in (
        ({"balance_rate": 0.1}, "balance-rate 1.0"),
        ({"gating": "sigmoid"}, "gating sigmoid"),
        ({"shared_size": 8}, "shared-size 8"),
        ({"weight_scale": 2.0}, "weight-scale 2.0"),
    ):
        with pytest.raises(ValueError, match=f"FlexOlmoForCausalLM it would differ in .*--model.{said}"):
            json_of(modified(Model(8, 1, 20, moe), **change))


@given(models())
@examples(150)
def test_what_has_a_config_json_is_read_as_the_same_model(model):
    try:
        raw = json_of(model)
    except ValueError:  # no architecture computes it
        return
    assert canonical(model_of(json.loads(json.dumps(raw)))) == canonical(model)


def test_dropout_is_of_training_alone():
    model = dense(8, 2, 2, 16)
    assert json_of(replace(model, block=replace(model.block, dropout=0.1))) == json_of(model)


def test_nearly_all_are_written_that_an_architecture_has():
    """The law is not empty: these are of some architecture."""
    base = dense(8, 6, 2, 16)
    for model in (
        base,
        modified(base, window_pattern=(5, 5, -1)),
        modified(base, window_pattern=(5,), last_layer_full=False),
        modified(base, window_pattern=(5, -1), rope_scaling=YaRN(factor=4.0, old_context=32)),
        replace(base, block=PreNorm(mixer=Attention(n_heads=2, qk_norm="none", window_pattern=(5,), last_layer_full=False))),
        replace(base, block=PreNorm(mixer=Attention(n_heads=2, qk_norm="head", window_pattern=(-1, 5), last_layer_full=False))),
        replace(base, pattern=(PreNorm(mixer=Attention(n_heads=2, qk_norm="none")),
                               PreNorm(mixer=Attention(n_heads=2, qk_norm="none", rope_layers="none")))),
    ):  # fmt: skip
        assert differences(model_of(json_of(model)), model) == []


LEAVES = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5) | some(["yarn", 1e-9])
INNER = some(["rope_type", "factor", "full_attention", "x"])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(INNER, inner, max_size=3), max_leaves=6)


@given(st.data(), some([*RELEASED]))
@examples(100)
def test_whatever_stands_in_a_key_is_read_or_refused_in_one_line(data, name):
    raw = {**COMMON, **RELEASED[name], "layer_types": None}
    raw |= {} if "linear_key_head_dim" in raw else {"rope_parameters": None}
    key = data.draw(some(sorted(raw)))
    try:
        found = model_of({**raw, key: data.draw(JSON)}, "DIR/config.json")
    except ValueError as error:
        said = str(error)
        assert said.startswith("DIR/config.json"), said
        assert len(said.splitlines()) == 1
    else:
        json_of(found)


# --- what is refused, by name ---------------------------------------------------------------------------------

SMALL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8, "intermediate_size": 16, "vocab_size": 9,
    "num_hidden_layers": 2, "num_attention_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
}  # fmt: skip
NEXT = {**RELEASED["qwen3-next-80b-a3b"], "num_hidden_layers": 4}
OLMO3 = {**SMALL, "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "rope_theta": 5e5}
REFUSED = [
    (SMALL, {"hidden_act": "gelu"}, 'hidden_act is "gelu"; no model here computes that, only "silu" or "swish"'),
    (SMALL, {"attention_dropout": 0.1}, "attention_dropout is 0.1"),
    (SMALL, {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "is of rope_type 'dynamic'; there are default"),
    (SMALL, {"rope_scaling": {"type": "longrope"}}, "'longrope'"),
    (SMALL, {"rope_scaling": {"type": "linear"}}, "rope_scaling has no factor"),
    (SMALL, {"rope_scaling": {"type": "linear", "factor": 2.0, "extra": 1}}, "extra is 1; it is not known here"),
    (SMALL, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "keep one of them"),
    (SMALL, {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    (SMALL, {"rope_interleaved": True}, "rope_interleaved is true"),
    (SMALL, {"quantization_config": {"bits": 4}}, 'quantization_config is {"bits": 4}; it is not known here'),
    (SMALL, {"auto_map": {"AutoModel": "a.py"}}, "auto_map"),
    (SMALL, {"residual_multiplier": 0.2}, "residual_multiplier is 0.2; it is not known here, and would be ignored"),
    (SMALL, {"num_attention_heads": 3}, "num_attention_heads is 3; it does not divide hidden_size 8"),
    (SMALL, {"hidden_size": "8"}, 'hidden_size is "8"; it must be a whole number'),
    (SMALL, {"hidden_size": None}, "has no hidden_size"),
    (SMALL, {"tie_word_embeddings": 1}, "tie_word_embeddings is 1; it must be true or false"),
    (SMALL, {"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not read here; there are Olmo2ForCausalLM, Olmo3"),
    (OLMO3, {"rope_theta": 1e4}, "transformers 4 takes it for all layers, 5 for those with full attention alone"),
    (NEXT, {"mlp_only_layers": [1]}, r"mlp_only_layers is \[1\]; no model here computes that"),
    (NEXT, {"decoder_sparse_step": 2}, "decoder_sparse_step is 2"),
    (NEXT, {"attention_bias": True}, "attention_bias is true"),
    (NEXT, {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size is 0"),
    (NEXT, {"partial_rotary_factor": 1.5}, "partial_rotary_factor is 1.5; .* above 0 and at most 1"),
    (NEXT, {"rope_parameters": {"partial_rotary_factor": 0}}, "rope_parameters is .*above 0 and at most 1"),
    (NEXT, {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}}, "keep one of them"),
    (OLMO3, {"layer_types": ["full_attention"]}, "layer_types is .*for each of the 2 layers"),
    (OLMO3, {"layer_types": ["chunked_attention"] * 2}, "layer_types"),
    (OLMO3, {"layer_types": ["sliding_attention"] * 2, "sliding_window": 0}, "sliding_window is 0"),
    (OLMO3, {"rope_scaling": {"rope_type": "yarn", "factor": 8.0, "truncate": False}}, "truncate is false"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "change", "said"), REFUSED)
def test_a_key_that_would_be_ignored_is_refused_by_name(base, change, said):
    model_of(base)
    with pytest.raises(ValueError, match=said) as caught:
        model_of({**base, **change}, "DIR/config.json")
    assert str(caught.value).startswith("DIR/config.json")
    assert "\n" not in str(caught.value)
