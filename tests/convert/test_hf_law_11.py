"""Law 11: a model that some architecture has goes to a directory and comes back bit for bit; transformers computes the same."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers import caught, examples, same_bits
from hypothesis import assume, example, given
from hypothesis import strategies as st
from test_hf_config_json import models, sparse_models
from torch import Tensor
from transformers import AutoModelForCausalLM

from olmo_fn import spec, tree
from olmo_fn.formats import config_json, families_moe, hybrids
from olmo_fn.formats.config_json import differences, json_of
from olmo_fn.formats.huggingface import open_directory, write_directory
from olmo_fn.formats.names import Stored
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, GatedDelta, Model, MoE, PreNorm, RMSNorm, SwiGLU, dense
from olmo_fn.nn import feed_forward

GQA = dense(8, 2, 4, 12, n_kv_heads=2, vocab_size=20, init_std=0.3)


def random_params(model: Model, seed: int) -> tree.Tree:
    """Initial weights, with gains and biases that matter."""
    generator = torch.Generator().manual_seed(seed)
    params = spec.init(transformer.specs(model), seed)
    return tree.map(lambda p: p if p.ndim > 1 else p + 0.3 * torch.randn(p.shape, generator=generator), params)


def law(model: Model, seed: int, dtype: torch.dtype) -> None:
    """There and back: the same model, the same bits; and there: the same logits."""
    params = tree.map(lambda p: p.to(dtype).float(), random_params(model, seed))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "dir"
        write_directory(path, model, tree.items(params), dtype, shard_bytes=4000)
        found = open_directory(path, model)
        assert not differences(found.model, model)
        assert found.dtype == dtype
        assert same_bits(tree.unflatten((name, found.parameter(name)) for name in found.names), params)
        theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    ids = torch.randint(model.vocab_size, (2, 11), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        expected = theirs(ids).logits
    ours = transformer.logits(model, params, {"input_ids": ids})
    exact = transformer.logits(model, tree.map(Tensor.double, params), {"input_ids": ids})
    lost = float((ours - exact).abs().max())  # what fp32 itself loses, which drawn weights may make large
    assert float((ours - expected).abs().max()) <= max(1e-5 * max(1.0, float(expected.abs().max())), 3 * lost)


@given(models(), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16]))
@example(GQA, 0, torch.float32)
@examples(15)
def test_law_11(model: Model, seed: int, dtype: torch.dtype) -> None:
    try:
        json_of(model)
    except ValueError:
        assume(False)
    law(model, seed, dtype)


@given(sparse_models(), st.integers(0, 2**20), st.sampled_from([torch.float32, torch.bfloat16]))
@examples(15)
def test_law_11_of_experts(model: Model, seed: int, dtype: torch.dtype) -> None:
    law(model, seed, dtype)


SPARSE = Model(
    8, 2, 20, PreNorm(mixer=Attention(n_heads=2), feed_forward=MoE(num_experts=4, top_k=2, expert_size=8)), init_std=0.5
)


@pytest.mark.parametrize("way", ["experts in another order", "weights that add up to 1"])
def test_the_law_of_experts_bites(way: str) -> None:
    law(SPARSE, 0, torch.float32)
    if way == "weights that add up to 1":  # in what is written
        real = families_moe.moe_sizes
        with (
            patch.object(families_moe, "moe_sizes", lambda m: real(m) | {"norm_topk_prob": True}),
            patch("olmo_fn.formats.config_json.differences", lambda *_: []),
            patch("olmo_fn.formats.huggingface.differences", lambda *_: []),
        ):
            caught(law, SPARSE, 0, torch.float32)
    else:  # both ways alike, of the router alone
        theirs, ours = Stored.theirs, Stored.ours

        def turned(one: Stored, x: torch.Tensor) -> torch.Tensor:
            return theirs(one, x).flip(0) if one.name.endswith("mlp.gate.weight") else theirs(one, x)

        with patch.object(Stored, "theirs", turned), patch.object(Stored, "ours", ours):
            caught(law, SPARSE, 0, torch.float32)


FEED_FORWARD = SwiGLU(hidden_size=12)
QWEN = {"value_head_dim": 5, "negative_eigenvalues": False, "gate_norm_eps": 1e-6}
GATED = {"qk_norm": "head", "zero_centred": True, "gate": "element", "rope_fraction": 0.5}
SHARED = MoE(num_experts=5, top_k=2, expert_size=8, weight_norm=1.0, shared_size=6, shared_mix="gate")
HYBRIDS = {
    "olmo-hybrid": (
        PreNorm(mixer=GatedDelta(n_heads=2, head_dim=3, conv_size=3), feed_forward=FEED_FORWARD),
        Block(mixer=Attention(n_heads=4, n_kv_heads=2, last_layer_full=False), feed_forward=FEED_FORWARD),
    ),
    "olmo-hybrid, no rotation": (
        PreNorm(mixer=GatedDelta(n_heads=2, n_value_heads=4, negative_eigenvalues=False), feed_forward=FEED_FORWARD),
        Block(mixer=Attention(n_heads=2, rope_layers="none"), feed_forward=FEED_FORWARD),
    ),
    "qwen3.5": (
        PreNorm(
            mixer=GatedDelta(n_heads=2, n_value_heads=6, head_dim=3, **QWEN),
            feed_forward=FEED_FORWARD,
        ),
        PreNorm(
            mixer=Attention(n_heads=4, n_kv_heads=2, head_dim=8, **GATED),
            feed_forward=FEED_FORWARD,
        ),
    ),
    "qwen3-next": (
        PreNorm(mixer=GatedDelta(n_heads=2, n_value_heads=6, head_dim=3, **QWEN), feed_forward=SHARED),
        PreNorm(mixer=Attention(n_heads=4, n_kv_heads=2, head_dim=8, **GATED), feed_forward=SHARED),
    ),
}


def hybrid(name: str) -> Model:
    """A model whose files have tensors that are several parameters, or names of their own."""
    recurrent, attention = HYBRIDS[name]
    norm = RMSNorm(zero_centred=name.startswith("qwen"))
    return Model(8, 3, 20, attention, (recurrent, attention), norm, tie_embeddings=norm.zero_centred, init_std=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HYBRIDS)
def test_law_11_of_hybrids(name: str, dtype: torch.dtype) -> None:
    law(hybrid(name), 0, dtype)


@pytest.mark.parametrize(
    ("name", "one", "other"),
    [
        ("qwen3.5", "w_q", "w_k"),
        ("qwen3.5", "w_q", "w_gate"),
        ("qwen3-next", "w_q", "w_k"),
        ("qwen3-next", "w_v", "w_gate"),
        ("qwen3-next", "to_beta", "to_decay"),
    ],
)
def test_the_law_of_hybrids_bites(name: str, one: str, other: str) -> None:
    """Rows of a fused tensor in another order, both ways alike: the bits come back, and transformers computes another thing."""
    law(hybrid(name), 0, torch.float32)
    swaps = 0

    def swapped(real, m, names):
        nonlocal swaps
        found = real(m, names)
        for layer in range(m.n_layers):
            a, b = (found.get(f"blocks.{layer}.attention.{part}") for part in (one, other))
            if a and b and a.rows and b.rows and a.name == b.name:
                found[f"blocks.{layer}.attention.{one}"] = a._replace(rows=b.rows)
                found[f"blocks.{layer}.attention.{other}"] = b._replace(rows=a.rows)
                swaps += 1
        return found

    families = tuple(f._replace(tensors=partial(swapped, f.tensors)) if f.tensors else f for f in config_json.EVERY)
    with patch.object(config_json, "EVERY", families):
        caught(law, hybrid(name), 0, torch.float32)
    assert swaps


def test_the_law_of_turns_bites() -> None:
    """Key heads side by side, as Qwen 3.5 has them, and not one after the other."""
    real = hybrids.in_turns
    with patch.object(hybrids, "in_turns", lambda names, paths, tensor, turns: real(names, paths, tensor, 1)):
        caught(law, hybrid("qwen3-next"), 0, torch.float32)


@pytest.mark.parametrize("way", ["up and gate", "not transposed", "another window"])
def test_the_law_bites(way: str) -> None:
    if way == "up and gate":  # both ways alike: the bits come back, and transformers computes something else
        swapped = {**feed_forward.GATED_NAMES}
        swapped["w_gate"], swapped["w_up"] = swapped["w_up"], swapped["w_gate"]
        with patch.object(feed_forward, "GATED_NAMES", swapped):
            transformer.layers.cache_clear()
            caught(law, GQA, 0, torch.float32)
    elif way == "not transposed":
        with patch("olmo_fn.formats.names.Stored.theirs", lambda self, ours: ours):
            caught(law, dense(8, 2, 2, 8, vocab_size=20, head_dim=4, init_std=0.3), 0, torch.float32)
    else:
        from olmo_fn.formats import families

        model = dense(8, 2, 4, 12, vocab_size=20, window_pattern=(3, -1), init_std=0.3)
        real = families.windows_json
        with (
            patch.object(families, "windows_json", lambda m: real(m) | {"sliding_window": 4}),
            patch("olmo_fn.formats.config_json.differences", lambda *_: []),
            patch("olmo_fn.formats.huggingface.differences", lambda *_: []),
        ):
            caught(law, model, 0, torch.float32)
    transformer.layers.cache_clear()
