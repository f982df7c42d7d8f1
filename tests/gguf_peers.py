"""Small models of each form that a GGUF file has, with random weights; files of them; and transformers' own reader."""

from __future__ import annotations

from pathlib import Path

import tokenizers
import torch
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from olmo_fn import tree
from olmo_fn.formats import gguf_file
from olmo_fn.formats.config_json import model_of
from olmo_fn.formats.gguf_file import write_gguf
from olmo_fn.formats.gguf_tokenizer import CL100K, KEY
from olmo_fn.models import transformer
from olmo_fn.spec import init

SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
PLAIN = {"rope_type": "default", "rope_theta": 5e5}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "rope_theta": 5e5}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_theta": 5e5,
}
LINEAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
WINDOWS = {"sliding_window": 5, "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 5, "tie_word_embeddings": True}
CASES = {
    "llama": ("Llama", "llama", {"rope_theta": 1e4}),
    "llama-tied": ("Llama", "llama", {"rope_theta": 1e5, "tie_word_embeddings": True}),
    "llama-3": ("Llama", "llama", {"rope_parameters": LLAMA3}),
    "llama-biased": ("Llama", "llama", {"rope_parameters": LINEAR, "attention_bias": True, "mlp_bias": True}),
    "olmo2": ("Olmo2", "olmo2", {"rope_theta": 5e5}),
    "olmo2-tied": ("Olmo2", "olmo2", {"rope_theta": 5e5, "tie_word_embeddings": True}),
    "olmo3": ("Olmo3", "olmo3", WINDOWS | {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": PLAIN}}),
    "olmo3-long": ("Olmo3", "olmo3", WINDOWS | {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}),
    "qwen3": ("Qwen3", "qwen3", {"head_dim": 128, "rope_theta": 1e6, "tie_word_embeddings": True}),
    "gemma3": ("Gemma3", "gemma3_text", GEMMA),
    "gemma3-long": (
        "Gemma3",
        "gemma3_text",
        GEMMA
        | {
            "final_logit_softcapping": 3.0,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
        },
    ),
}
NO_TOKENIZER = {f"{KEY}model": "none"}


def model_for(case, **changes):
    name, kind, more = CASES[case]
    return model_of({"architectures": [f"{name}ForCausalLM"], "model_type": kind, **SIZES, **more, **changes})


def random(model, seed=0):
    """Parameters with gains and biases that matter; their changes are in bf16, so that 1 + g is exact in fp32."""
    generator = torch.Generator().manual_seed(seed)
    params = dict(tree.items(init(transformer.specs(model), seed)))
    for path, p in params.items():
        noise = torch.randn(p.shape, generator=generator)
        params[path] = p + (0.3 * noise).bfloat16() if p.ndim == 1 else p + 0.1 * noise
    return params


def written(path, model, params, dtype="f32", more=NO_TOKENIZER):
    """A file of them."""
    path.parent.mkdir(exist_ok=True)
    names = gguf_file.places(model, gguf_file.architecture(model))
    write_gguf(path, model, ((name, params[name]) for name in names), dtype, 64, more)
    return path


def logits(model, params, ids=None):
    """Ours of the ids (B, T), or some."""
    ids = ids_for(model) if ids is None else ids
    with torch.no_grad():
        return transformer.logits(model, tree.unflatten(params.items()), {"input_ids": ids})


def ids_for(model):
    return torch.randint(model.vocab_size, (2, 24), generator=torch.Generator().manual_seed(1))


def parameters(file):
    return {path: file.parameter(path) for path in file.places}


def trained(pre_tokenizer=None, **more):
    """A small byte-level BPE with special tokens and another added one, as text; it cuts as OLMo 2's without another way."""
    backend = tokenizers.Tokenizer(models.BPE(**more))
    backend.pre_tokenizer, backend.decoder = pre_tokenizer or split(CL100K, "removed", True), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([Path(__file__).read_text()], trainer)
    backend.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return backend.to_str()


def split(pattern, behavior="isolated", invert=False):
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), behavior, invert), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )


def read_by_transformers(file: Path):
    """What ``from_pretrained(folder, gguf_file=name)`` makes, in fp32, but for the package accelerate, which that asks for."""
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    tensors = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)["tensors"]
    found = model.load_state_dict(tensors, strict=False)
    assert not found.unexpected_keys
    assert set(found.missing_keys) <= ({"lm_head.weight"} if config.tie_word_embeddings else set())
    model.tie_weights()
    return model
