"""The cache of keys and values: a ring of the window's length, and what a model has read before."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from generating import full_logits, random_ids, random_params
from helpers import caught, examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn import tree
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.decode import CHUNK, empty_cache, enlarged, extend, rewound
from olmo_fn.generate.memory import Memory
from olmo_fn.generate.sample import sample
from olmo_fn.models.config import Head, Model, dense, modified
from olmo_fn.models.families import FAMILIES
from olmo_fn.nn import cache as kv
from olmo_fn.nn.cache import sight

DOUBLE = torch.float64


def windowed(*pattern: int, **changes) -> Model:
    """A small model whose attention is far from uniform, in layers of these windows."""
    sizes = {"vocab_size": 23, "n_kv_heads": 1, "last_layer_full": False, "init_method": "fan_in", **changes}
    return dense(8, len(pattern), 2, 16, window_pattern=pattern, **sizes)


def decodes_as_it_computes(cfg: Model, parts: list[int], padding: list[int], capacity: int = 0) -> None:
    """Law: after each part of the columns, the last one's logits are those of the whole forward pass of each row alone."""
    params, ids = random_params(cfg), random_ids(cfg, len(padding), sum(parts))
    pads = torch.tensor(padding) if any(padding) else None
    cache = empty_cache(cfg, len(padding), capacity or sum(parts), pads, dtype=DOUBLE)
    whole = [full_logits(cfg, params, ids[row : row + 1, pad:])[0] for row, pad in enumerate(padding)]
    for part in ids.split(parts, 1):
        logits, cache = extend(cfg, params, part, cache)
        for row, pad in enumerate(padding):
            if cache.length > pad:
                torch.testing.assert_close(logits[row], whole[row][cache.length - 1 - pad], rtol=1e-12, atol=1e-12)


@examples(40)
@given(
    st.sampled_from([(1,), (3,), (5, -1), (2, 7), (-1, 4)]),
    st.lists(st.integers(1, 9), min_size=1, max_size=7),
    st.lists(st.integers(0, 8), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_ring_decodes_as_the_forward_pass_computes(
    pattern: tuple[int, ...], parts: list[int], padding: list[int], spare: bool
) -> None:
    padding = [min(pad, sum(parts) - 1) for pad in padding]
    decodes_as_it_computes(windowed(*pattern), parts, padding, sum(parts) + 5 * spare)


@pytest.mark.parametrize("parts", [[1] * 23, [11, *[1] * 12], [2, 1, 7, 1, 1, 5, 6], [23]], ids=str)
def test_every_position_across_the_ring_s_turns(parts: list[int]) -> None:
    decodes_as_it_computes(windowed(5, 3, -1), parts, [0, 4, 9])


def test_prompts_longer_than_window_and_chunk() -> None:
    cfg = windowed(7, CHUNK + 40, -1)
    decodes_as_it_computes(cfg, [2 * CHUNK + 3, 1, 1], [0, CHUNK + 9])


SMALL = {"d_model": 16, "n_layers": 4, "n_heads": 4, "n_kv_heads": 2, "head_dim": 4, "hidden_size": 24, "vocab_size": 31}
PRESETS = ("olmo2-1b", "olmo3-7b-long", "llama3.1-8b", "qwen3-0.6b", "gemma3-4b", "ngpt-271m", "smollm2-135m")
PARTS: dict[str, dict] = {
    "sinks": {"sinks": True},
    "score cap": {"score_cap": 2.0, "window_pattern": (5, -1)},
    "gate": {"gate": "head"},
    "biases": {"attention_bias": True, "clip_qkv": 0.7, "qk_norm": "none"},
    "scalable softmax": {"scalable_softmax": True, "window_pattern": (5, -1)},
    "no rope": {"rope_layers": "windowed", "window_pattern": (5, -1)},
    "partial rope": {"rope_fraction": 0.5, "rope_interleaved": True, "qk_norm": "per-head"},
    "head": {"head": Head(bias=True, cap=3.0), "embed_norm": True, "tie_embeddings": True},
}


def shrunk(model: Model) -> Model:
    """The same kind of model in a size that takes no time."""
    windows = {"window_pattern": (5, 5, -1)} if model.block.mixer.window_pattern else {}
    return modified(model, **SMALL, **windows)


@pytest.mark.parametrize("name", [*PRESETS, *PARTS])
def test_every_family_and_part_decodes_as_it_computes(name: str) -> None:
    presets = {preset: model for family in FAMILIES.values() for preset, model in family.items()}
    cfg = shrunk(presets[name]) if name in PRESETS else modified(dense(16, 3, 4, 24), **SMALL, **PARTS[name])
    decodes_as_it_computes(cfg, [3, 1, 9, 1, 1, 5], [0, 2])


MUTANTS = {
    "_put": lambda cache, k, v, start: original_put(cache, k, v, start + (start > 9)),  # one slot too far, once it has turned
    "_columns": lambda stop, S, device: torch.arange(stop - S, stop),  # as if the ring began with its oldest column
    "sight": lambda rows, columns, window, padding: sight(rows, columns, None, padding),
}
original_put = kv._put


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_bites(name: str) -> None:
    parts, padding = [3, 5, 1, 1, 1, 4, 1, 1], [0, 2]
    decodes_as_it_computes(windowed(5, -1), parts, padding)
    with patch.object(kv, name, MUTANTS[name]):
        caught(decodes_as_it_computes, windowed(5, -1), parts, padding)


def test_a_layer_with_a_window_keeps_no_more_than_that() -> None:
    cfg = windowed(5, -1)
    small, large = (empty_cache(cfg, 3, capacity).blocks for capacity in (40, 4000))
    assert small["0"]["attention"]["k"].shape == large["0"]["attention"]["v"].shape == (3, 1, 5, 4)
    assert large["1"]["attention"]["k"].shape == (3, 1, 4000, 4)
    assert empty_cache(cfg, 1, 4).blocks["0"]["attention"]["k"].shape == (1, 1, 4, 4)


@examples(30)
@given(st.integers(1, 12), st.integers(0, 12), st.integers(0, 9))
def test_a_cache_that_goes_back_or_grows_is_as_one_that_never_read_more(first: int, back: int, more: int) -> None:
    cfg = windowed(5, -1)
    params, ids = random_params(cfg), random_ids(cfg, 1, first + 9)
    _, cache = extend(cfg, params, ids[:, :first], empty_cache(cfg, 1, first + 1, dtype=DOUBLE))
    length = max(0, first - back)
    found = rewound(cfg, cache, length)
    assert (found is None) == (length < first and first > 5)  # what left the window may have been overwritten
    if found is not None:
        found = enlarged(cfg, found, first + 9 + more)
        other = (ids[:, length:] + 1) % cfg.vocab_size
        logits, _ = extend(cfg, params, other, found)
        expected = full_logits(cfg, params, torch.cat((ids[:, :length], other), 1))[:, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


# --- a memory of one text ---------------------------------------------------------------------------------------------


def read_columns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many columns each call of `extend` reads, from now on."""
    counts: list[int] = []

    def watched(cfg, params, ids, cache):
        counts.append(ids.shape[1])
        return extend(cfg, params, ids, cache)

    monkeypatch.setattr("olmo_fn.generate.sample.extend", watched)
    return counts


def generated(cfg: Model, prompt: list[int], memory: Memory | None = None, most: int = 4) -> list[int | None]:
    params = random_params(cfg, dtype=torch.float32)
    how = Sampling(max_tokens=most, temperature=0)
    return [step[0] for step in sample(cfg, params, [prompt], how, memory=memory)]


@pytest.mark.parametrize(("pattern", "last"), [((-1, -1), [2, 1, 1, 1]), ((64, -1), [2, 1, 1, 1]), ((5, -1), [5, 1, 1, 1])])
def test_the_shared_beginning_of_two_prompts_is_not_computed_again(pattern, last, monkeypatch) -> None:
    cfg, memory = windowed(*pattern), Memory()
    counts = read_columns(monkeypatch)
    answer = generated(cfg, [1, 2, 3, 4, 5, 6], memory)
    assert memory.ids == [1, 2, 3, 4, 5, 6, *answer[:-1]]
    longer = [1, 2, 3, 4, 5, 6, *answer, 9, 9, 7]
    second = generated(cfg, longer, memory)
    other = [*longer[:3], 8, 9]  # goes back into the middle; a ring that has turned cannot
    third = generated(cfg, other, memory)
    assert counts == [6, 1, 1, 1, 4, 1, 1, 1, *last]
    assert (second, third) == (generated(cfg, longer), generated(cfg, other))


def test_the_same_prompt_again_is_one_column() -> None:
    cfg, memory = windowed(-1), Memory()
    first = generated(cfg, [1, 2, 3], memory)
    with pytest.MonkeyPatch.context() as patched:
        counts = read_columns(patched)
        assert generated(cfg, [1, 2, 3], memory) == first
    assert counts == [1, 1, 1, 1]


def test_what_was_interrupted_is_read_anew() -> None:
    cfg, memory = windowed(-1), Memory()
    generated(cfg, [1, 2, 3, 4, 5, 6], memory)

    def interrupted(cfg, params, ids, cache):
        tree.flatten(cache.blocks)["0.attention.k"].zero_()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("olmo_fn.generate.sample.extend", interrupted)
        with pytest.raises(KeyboardInterrupt):
            generated(cfg, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], memory)
    longer = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert generated(cfg, longer, memory) == generated(cfg, longer)


def test_a_memory_is_of_one_prompt() -> None:
    cfg = windowed(-1)
    with pytest.raises(ValueError, match="a memory is of one prompt, and there are 2"):
        sample(cfg, random_params(cfg), [[1], [2]], memory=Memory())
