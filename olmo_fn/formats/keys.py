"""The keys of a config.json: each is used, or is known to be of no effect on the numbers, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

NO_EFFECT = {
    "_attn_implementation", "_attn_implementation_autoset", "_model_name_or_path", "_name_or_path", "architectures",
    "attn_implementation", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype", "early_stopping",
    "encoder_no_repeat_ngram_size", "eos_token_id", "exponential_decay_length_penalty", "finetuning_task",
    "forced_bos_token_id", "forced_eos_token_id", "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id",
    "length_penalty", "max_length", "max_position_embeddings", "min_length", "model_name", "model_type", "name_or_path",
    "no_repeat_ngram_size", "num_beam_groups", "num_beams", "num_labels", "num_return_sequences", "output_attentions",
    "output_hidden_states", "output_scores", "pad_token_id", "prefix", "pretraining_tp", "problem_type", "pruned_heads",
    "remove_invalid_values", "repetition_penalty", "return_dict", "return_dict_in_generate", "sep_token_id",
    "suppress_tokens", "task_specific_params", "temperature", "tf_legacy_loss", "tie_encoder_decoder", "tokenizer_class",
    "top_k", "top_p", "torch_dtype", "torchscript", "transformers.js_config", "transformers_version", "typical_p",
    "unk_token_id", "unsloth_fixed", "unsloth_version", "use_bfloat16", "use_cache",
}  # fmt: skip
"""Keys that say how to start a model's training, to load it, to generate with it, or what it is called."""
OFF = ("add_cross_attention", "is_encoder_decoder")
"""Keys that are true in models of another kind."""


class Keys:
    """The keys of one JSON object, ``where`` it is from, and which of them have been asked for. A null is as if not there."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values = {name: value for name, value in values.items() if value is not None}
        self.where = where
        self.nulls = values.keys() - self.values.keys()
        self.left = set(self.values)

    def get(self, name: str, default: Any = None) -> Any:
        """A value of any kind."""
        self.left.discard(name)
        return self.values.get(name, default)

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least ``least``; ValueError without it, where there is no default."""
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.where} has no {name}")
        if type(value) is not int or not least <= value < 1 << 40:
            raise self.refused(name, f"it must be a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number above 0."""
        value = self.get(name, default)
        if value is None:
            raise ValueError(f"{self.where} has no {name}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.refused(name, "it must be a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if type(value) is not bool:
            raise self.refused(name, "it must be true or false")
        return value

    def object(self, name: str) -> dict[str, Any]:
        """A JSON object; an empty one if there is none."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.refused(name, "it must be an object")
        return value

    def is_null(self, name: str) -> bool:
        """Whether the key is there, and null."""
        return name in self.nulls

    def must_be(self, name: str, *allowed: Any) -> None:
        """ValueError for another value than these; the first is what holds where there is none."""
        if self.get(name, allowed[0]) not in allowed:
            words = " or ".join(json.dumps(value) for value in allowed)
            raise self.refused(name, f"no model here computes that, only {words}")

    def end(self) -> None:
        """ValueError for a key that nobody has asked for, and that may change the numbers."""
        for name in OFF:
            self.must_be(name, False)
        for name in sorted(self.left - NO_EFFECT):
            raise self.refused(name, "it is not known here, and would be ignored")

    def refused(self, name: str, why: str) -> ValueError:
        """What is wrong with a key, in one line with its value."""
        value = json.dumps(self.values.get(name))
        return ValueError(f"{self.where}: {name} is {value if len(value) < 100 else value[:100] + '…'}; {why}")
