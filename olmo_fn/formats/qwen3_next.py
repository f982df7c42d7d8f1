"""Qwen 3-Next: a hybrid with experts in every layer, and a network that all tokens share by a gate. Imports no torch.

Its recurrent layers have queries, keys, values and gates in one matrix, a key head's rows behind each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from olmo_fn.formats.families import Family
from olmo_fn.formats.families_moe import experts, moe_of, moe_sizes
from olmo_fn.formats.hybrids import fused, gated, linear_json, recurrent, types, with_attention
from olmo_fn.formats.keys import Keys
from olmo_fn.formats.rope import part_rope, rope_json
from olmo_fn.models.config import Model

if TYPE_CHECKING:
    from olmo_fn.formats.names import Stored


def read_qwen3_next(keys: Keys) -> Model:
    """Gated DeltaNet and gated attention; experts in every layer, beside one that all tokens share."""
    keys.must_be("mlp_only_layers", [])
    keys.must_be("decoder_sparse_step", 1)
    keys.must_be("use_sliding_window", False)
    keys.get("intermediate_size")  # of dense layers, which there are none
    chosen = experts(keys, 512, 10, 0.001, "moe_intermediate_size", 512, normed=True)
    shared = keys.whole("shared_expert_intermediate_size", 512)
    return gated(keys, replace(chosen, shared_size=shared, shared_mix="gate"), part_rope(keys, 0.25), kv_heads=2)


def write_qwen3_next(m: Model) -> dict[str, Any]:
    """The keys of a Qwen 3-Next."""
    full, moe = with_attention(m), moe_of(m)
    keys = {**moe_sizes(full), **linear_json(m, recurrent(m)), **rope_json(full)}
    fraction = full.block.mixer.rope_fraction
    return {
        **keys,
        "rope_parameters": {**keys["rope_parameters"], "partial_rotary_factor": fraction},
        "partial_rotary_factor": fraction,
        "layer_types": types(m),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": moe.expert_size,
        "shared_expert_intermediate_size": moe.shared_size,
    }


def qwen3_next_tensors(m: Model, names: Mapping[str, Stored]) -> dict[str, Stored]:
    """A key head's rows are together: its query and key, then the values that have it, and their gates; betas, then decays."""
    by_head = {"in_proj_qkvz": ("w_q", "w_k", "w_v", "w_gate"), "in_proj_ba": ("to_beta", "to_decay")}
    return fused(m, names, renamed={}, side_by_side={}, by_head=by_head)


QWEN3_NEXT = Family(
    "Qwen3NextForCausalLM", "qwen3_next", read_qwen3_next, write_qwen3_next, qwen3_next_tensors, passed_over=("mtp.",)
)
"""Released files have a layer that predicts the token after the next; transformers leaves it out, and so do we."""
