"""Small models of transformers with random weights, one for each form that is read, and directories of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "pad_token_id": None,
    "eos_token_id": 3,
}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "original_max_position_embeddings": 16,
    "attention_factor": 1.2,
    "rope_theta": 100.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
    "rope_theta": 500.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
LAYERS = ["sliding_attention", "sliding_attention", "full_attention"]
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0}
WINDOWS = {"layer_types": LAYERS, "sliding_window": 5}
HYBRID = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 10,
}

EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 20}

CASES = {
    "olmo2": ("olmo2", {"rope_parameters": PLAIN}),
    "olmo2-mha-tied": ("olmo2", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "olmo2-bias": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", WINDOWS | {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}),
    "olmo3-yarn": ("olmo3", WINDOWS | {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}),
    "llama": ("llama", {}),
    "llama-stepwise": ("llama", {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LINEAR}),
    "mistral": ("mistral", {"sliding_window": 5}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "rope_parameters": PLAIN}),
    "qwen3-windows": ("qwen3", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "gemma3": ("gemma3_text", {"sliding_window": 5, "layer_types": LAYERS, "query_pre_attn_scalar": 12}),
    "gemma3-capped": (
        "gemma3_text",
        {
            "final_logit_softcapping": 2.0,
            "sliding_window": 5,
            "layer_types": LAYERS,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": PLAIN},
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "olmoe": ("olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "rope_parameters": PLAIN}),
    "olmoe-bias-norm": ("olmoe", {"num_experts": 4, "norm_topk_prob": True, "attention_bias": True, "num_experts_per_tok": 3}),
    "flex-olmo": ("flex_olmo", {"num_experts": 5, "num_experts_per_tok": 3, "router_aux_loss_coef": 0.0}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "tie_word_embeddings": True}),
    "qwen3-moe-mixed": ("qwen3_moe", {**EXPERTS, "mlp_only_layers": [0], "use_sliding_window": True, "sliding_window": 5}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}),
    "mixtral-window": ("mixtral", {"num_local_experts": 3, "sliding_window": 5, "tie_word_embeddings": True}),
    "olmo_hybrid": ("olmo_hybrid", HYBRID | {"rope_parameters": PLAIN, "linear_num_value_heads": 4}),
    "olmo_hybrid-nope": ("olmo_hybrid", HYBRID | {"rope_parameters": {"rope_theta": None, "rope_type": "default"}}),
    "qwen3_5": ("qwen3_5_text", HYBRID | {"rope_parameters": PLAIN | {"partial_rotary_factor": 0.5}}),
    "qwen3_5-tied": ("qwen3_5_text", HYBRID | {"linear_num_value_heads": 6, "tie_word_embeddings": True}),
    "qwen3_next": (
        "qwen3_next",
        HYBRID
        | EXPERTS
        | {
            "linear_num_value_heads": 6,
            "shared_expert_intermediate_size": 12,
            "rope_parameters": PLAIN | {"partial_rotary_factor": 0.5},
        },
    ),
    "qwen3_next-tied": (
        "qwen3_next",
        HYBRID | EXPERTS | {"num_experts_per_tok": 3, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
}  # fmt: skip


def peer(case: str, seed: int = 0, **changes):
    """transformers' model of a case, in fp32, with gains and biases that matter."""
    kind, more = CASES[case]
    torch.manual_seed(seed)
    config = AutoConfig.for_model(kind, **{**SIZES, **more, **changes})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.ndim == 1:
                p.add_(0.3 * torch.randn_like(p))
    return model


def directory(case: str, folder: Path, dtype: torch.dtype = torch.float32, shard: str = "50GB", **changes) -> Path:
    """A directory as transformers saves it."""
    model = peer(case, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def with_tokenizer(folder: Path, vocab_size: int = 300) -> Path:
    """The directory with tokenizer, chat template and generation config, as a published one has them."""
    from olmo_fn.data.tokenizer import train_bpe

    tokenizer = train_bpe([Path(__file__).read_text()], vocab_size)
    assert tokenizer.vocab_size == vocab_size
    tokenizer.save(folder / "tokenizer.json")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": {"content": "<|endoftext|>", "special": True},
        "chat_template": TEMPLATE,
        "model_max_length": 64,
        "a key of its own": 1,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").write_text('{"eos_token":  "<|endoftext|>"}')
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 299], "temperature": 0.7}')
    return folder
