"""Generation: the cache against the whole forward pass, sampling and streamed text against their laws."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import tokenizers
import torch
from generating import full_logits, random_ids, random_params
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from strategies import models
from torch import Tensor

from olmo_fn import tree
from olmo_fn.checkpoint import save
from olmo_fn.cli import main as cli
from olmo_fn.data.tokenizer import Tokenizer, byte_level, train_bpe
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.decode import CHUNK, empty_cache, extend
from olmo_fn.generate.healing import heal
from olmo_fn.generate.load import load_model
from olmo_fn.generate.sample import sample
from olmo_fn.generate.sampling import choose, probabilities, uniforms
from olmo_fn.generate.text import LanguageModel, decoded, generate_text, prepare, stream_text, stream_texts, until, without
from olmo_fn.models.config import Model, dense
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.serialize import to_yaml
from olmo_fn.tree import Tree


def main(words):
    """``olmo-fn generate``."""
    return cli.main(["generate", *map(str, words)])


REPO = Path(__file__).parents[2]
VOCAB = 257
TEXT = "def grüßen(name: str) -> None:\n    print(f'你好, {name} 👋🏽')\n\n\nclass Ωmega:\n    pass\n"


# --- the cache --------------------------------------------------------------------------------------------


@examples(40)
@given(models(), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=6), st.booleans())
def test_cached_logits_are_those_of_the_whole_forward_pass(cfg: Model, rows: int, parts: list[int], double: bool) -> None:
    dtype, tolerance = (torch.float64, 1e-12) if double else (torch.float32, 1e-5)
    params, ids = random_params(cfg, dtype=dtype), random_ids(cfg, rows, sum(parts))
    expected, state = full_logits(cfg, params, ids), empty_cache(cfg, rows, sum(parts) + 1, dtype=dtype)
    for part in ids.split(parts, dim=1):
        logits, state = extend(cfg, params, part, state)
        torch.testing.assert_close(logits, expected[:, state.length - 1], rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("window", [(), (5,), (CHUNK + 9, -1)])
def test_prompts_of_several_chunks(window: tuple[int, ...]) -> None:
    cfg = dense(8, 2, 2, 16, vocab_size=50, window_pattern=window, last_layer_full=False, init_method="fan_in")
    params, ids = random_params(cfg), random_ids(cfg, 2, 2 * CHUNK + 3)
    padding = torch.tensor([0, CHUNK + 7])  # the second row's first chunk is nothing but padding
    logits, _ = extend(cfg, params, ids, empty_cache(cfg, 2, ids.shape[1], padding, dtype=torch.float64))
    for row, pad in enumerate(padding.tolist()):
        expected = full_logits(cfg, params, ids[row : row + 1, pad:])[:, -1]
        torch.testing.assert_close(logits[row : row + 1], expected, rtol=1e-12, atol=1e-12)


@examples(25)
@given(models(), st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_a_row_of_a_padded_batch_is_what_it_is_alone(cfg: Model, lengths: list[int]) -> None:
    params = random_params(cfg)
    prompts = [random_ids(cfg, n, seed=i).tolist() for i, n in enumerate(lengths)]
    how = Sampling(max_tokens=6, temperature=1.0, top_p=0.9)
    together = list(zip(*sample(cfg, params, prompts, how), strict=True))
    for row, prompt in enumerate(prompts):
        alone = [step[0] for step in sample(cfg, params, [prompt], how, first_row=row)]
        assert list(together[row]) == alone


def test_the_padding_does_not_reach_the_logits() -> None:
    cfg = dense(8, 2, 2, 16, vocab_size=50, n_kv_heads=1, window_pattern=(3,), init_method="fan_in")
    params, ids = random_params(cfg), random_ids(cfg, 2, 7)
    other = ids.clone()
    other[1, :4] = (other[1, :4] + 1) % 50
    results = []
    for given_ids in (ids, other):
        state = empty_cache(cfg, 2, 8, torch.tensor([0, 4]), dtype=torch.float64)
        logits, state = extend(cfg, params, given_ids, state)
        results.append((logits, *extend(cfg, params, ids[:, :1], state)[:1]))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_full_cache_says_so() -> None:
    cfg = dense(8, 1, 2, 16, vocab_size=11)
    params = random_params(cfg, dtype=torch.float32)
    _, state = extend(cfg, params, torch.tensor([[1, 2]]), empty_cache(cfg, 1, 3))
    with pytest.raises(ValueError, match="2 columns for a cache of 3 that holds 2; give it from 1 to 1"):
        extend(cfg, params, torch.tensor([[1, 2]]), state)


# --- choosing a token -------------------------------------------------------------------------------------

logit_rows = st.lists(st.floats(-8, 8, width=32) | st.sampled_from([0.0, 1.0, -math.inf]), min_size=2, max_size=12).filter(
    lambda row: max(row) > -math.inf
)


@given(logit_rows, st.floats(0.05, 4), st.integers(0, 13), st.floats(0.01, 1))
def test_top_k_and_top_p_keep_the_likeliest_and_no_more_than_they_must(
    row: list[float], temperature: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([row])
    before = (logits.double() / temperature).softmax(1)[0]
    after = probabilities(logits, temperature, top_k, top_p)[0]
    order = sorted(range(len(row)), key=lambda i: (-before[i], i))
    kept = [i for i in order if after[i] > 0]
    assert kept == order[: len(kept)]  # the likeliest, and of equals the first
    assert 1 <= len(kept) <= (top_k or len(row))
    torch.testing.assert_close(after[kept], before[kept] / before[kept].sum(), rtol=1e-9, atol=0)
    assert after.sum() == pytest.approx(1)
    pool = before[order[: top_k or len(row)]]
    reached = (pool / pool.sum()).cumsum(0)
    assert reached[len(kept) - 1] >= top_p - 1e-9  # enough
    assert len(kept) == 1 or reached[len(kept) - 2] < top_p + 1e-9  # and with one fewer it would not be


@given(logit_rows, st.floats(0, 1, exclude_max=True), st.integers(0, 5), st.floats(0.1, 1))
def test_the_choice_is_the_inverse_of_the_cumulative_distribution(
    row: list[float], uniform: float, top_k: int, top_p: float
) -> None:
    logits = torch.tensor([row])
    p = probabilities(logits, 1.0, top_k, top_p)[0]
    chosen = int(choose(logits, torch.tensor([uniform], dtype=torch.float64), 1.0, top_k, top_p))
    below, above = float(p[:chosen].sum()), float(p[: chosen + 1].sum())
    assert p[chosen] > 0
    assert below - 1e-12 <= uniform <= above + 1e-12


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2.0**-53])
def test_extreme_logits_and_numbers(uniform: float) -> None:
    u = torch.tensor([uniform], dtype=torch.float64)
    logits = torch.tensor([[-math.inf, 3e38, -3e38, -math.inf]])
    for temperature in (0.0, 1e-300, 1e-3, 1.0, 1e3):
        assert int(choose(logits, u, temperature)) == 1
    assert int(choose(torch.tensor([[-math.inf, 0.0, 0.0, -math.inf]]), u)) == 1 + (uniform >= 0.5)
    assert int(choose(torch.zeros(1, 5), u, top_k=1)) == 0


def test_top_p_that_is_reached_exactly() -> None:
    assert probabilities(torch.zeros(1, 4), top_p=0.5).tolist() == [[0.5, 0.5, 0.0, 0.0]]
    assert probabilities(torch.zeros(1, 4), top_k=2, top_p=0.5).tolist() == [[1.0, 0.0, 0.0, 0.0]]


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """(χ² − degrees of freedom) in its standard deviations."""
    seen = expected > 0
    assert int(counts[~seen].sum()) == 0
    degrees = int(seen.sum()) - 1
    statistic = ((counts[seen] - expected[seen]) ** 2 / expected[seen]).sum()
    return float((statistic - degrees) / math.sqrt(2 * max(degrees, 1)))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 0, 0.9), (1.3, 5, 1.0), (1.0, 7, 0.8)])
def test_frequencies_are_the_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    n = 20_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(1))
    u = uniforms(3, range(n), [17] * n)
    counts = choose(logits.expand(n, -1), u, temperature, top_k, top_p).bincount(minlength=12).double()
    assert abs(chi_square(counts, n * probabilities(logits, temperature, top_k, top_p)[0])) < 4


def test_uniforms_are_uniform_and_not_correlated() -> None:
    n = 4096
    by_row, by_position = uniforms(0, range(n), [5] * n), uniforms(0, [5] * n, range(n))
    by_seed = torch.cat([uniforms(seed, [5], [5]) for seed in range(n)])
    for u in (by_row, by_position, by_seed):
        assert abs(chi_square((u * 64).long().bincount(minlength=64).double(), torch.full((64,), n / 64))) < 4
        assert abs(torch.corrcoef(torch.stack([u[:-1], u[1:]]))[0, 1]) < 4 / math.sqrt(n)
    assert abs(torch.corrcoef(torch.stack([by_row, by_position, by_seed])).triu(1)).max() < 4 / math.sqrt(n)
    torch.testing.assert_close(uniforms(0, [7, 5], [5, 9]), torch.stack([by_row[7], by_position[9]]))


# --- token after token ------------------------------------------------------------------------------------


@cache
def tiny() -> LanguageModel:
    cfg = dense(16, 2, 2, 32, vocab_size=VOCAB + 7, window_pattern=(8, -1), init_method="fan_in")
    return LanguageModel(cfg, random_params(cfg, dtype=torch.float32), byte_level())


def generated(prompt: list[int], how: Sampling, **options: object) -> list[int | None]:
    return [step[0] for step in sample(tiny().cfg, tiny().params, [prompt], how, **options)]  # type: ignore[arg-type]


def test_greedy_is_the_argmax_of_the_forward_pass() -> None:
    ids = [5, 9, 200]
    for token in generated(ids, Sampling(max_tokens=20, temperature=0)):
        assert token == int(full_logits(tiny().cfg, tiny().params, torch.tensor([ids]))[0, -1].argmax())
        ids = [*ids, token]


@examples(10)
@given(st.integers(0, 2**40), st.integers(1, 11))
def test_going_on_is_as_if_never_interrupted(seed: int, cut: int) -> None:
    how = Sampling(max_tokens=12, temperature=1.0, top_k=30, seed=seed)
    whole = generated([1, 2], how)
    first = generated([1, 2], replace(how, max_tokens=cut))
    assert whole == first + generated([1, 2, *first], replace(how, max_tokens=12 - cut))


def test_rows_and_seeds_differ() -> None:
    how = Sampling(max_tokens=12, temperature=1.0)
    rows = list(zip(*sample(tiny().cfg, tiny().params, [[1, 2]] * 8, how), strict=True))
    assert len(set(rows)) == 8
    assert generated([1, 2], how) != generated([1, 2], replace(how, seed=1))


def test_a_row_ends_at_its_stop_id_and_the_batch_with_its_last_row() -> None:
    how = Sampling(max_tokens=40, temperature=1.0)
    free = list(zip(*sample(tiny().cfg, tiny().params, [[1], [2, 3]], how), strict=True))
    stop = {free[0][4], free[1][9]}
    ends = [next(i for i, token in enumerate(row) if token in stop) for row in free]
    rows = list(zip(*sample(tiny().cfg, tiny().params, [[1], [2, 3]], how, stop_ids=stop), strict=True))
    assert len(rows[0]) == max(ends) + 1
    for row, whole, end in zip(rows, free, ends, strict=True):
        assert row[: end + 1] == whole[: end + 1]
        assert set(row[end + 1 :]) <= {None}


def test_only_allowed_ids_are_chosen() -> None:
    V = tiny().cfg.vocab_size
    allowed, first = torch.arange(V) < 10, (torch.arange(V) == 3)[None]
    tokens = generated([1], Sampling(max_tokens=30, temperature=2.0, top_p=1.0), allowed=allowed, first_allowed=first)
    assert tokens[0] == 3
    assert len(set(tokens)) > 3
    assert all(token is not None and token < 10 for token in tokens)


def test_grad_mode_of_the_caller_is_left_alone() -> None:
    for _ in sample(tiny().cfg, tiny().params, [[1]], Sampling(max_tokens=2)):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 0 is empty"),
        ([1, 999], "prompt 0 has the id 999; the model's ids are 0 to 263"),
        ([-1], "prompt 0 has the id -1"),
    ],
)
def test_wrong_prompts(prompt: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample(tiny().cfg, tiny().params, [prompt])  # before the first step is asked for
    assert list(sample(tiny().cfg, tiny().params, [])) == []


def test_a_broken_model_is_named_as_such() -> None:
    params = tree.replace(tiny().params, "head.norm", torch.full((16,), torch.nan))
    with pytest.raises(ValueError, match="NaN"):
        list(sample(tiny().cfg, params, [[1]]))


# --- tokens to text ---------------------------------------------------------------------------------------


@cache
def bpe() -> Tokenizer:
    return train_bpe([TEXT] * 3, 300)


@given(st.lists(st.integers(0, 256), max_size=40) | st.text(max_size=20).map(lambda t: list(t.encode())))
def test_streamed_text_of_bytes_is_the_whole_text(ids: list[int]) -> None:
    assert "".join(decoded(byte_level(), ids)) == byte_level().decode(ids)


@given(st.lists(st.integers(0, 299), max_size=40))
def test_streamed_text_of_a_bpe_is_the_whole_text(ids: list[int]) -> None:
    assert "".join(decoded(bpe(), ids)) == bpe().decode(ids)


@given(st.text(max_size=30))
def test_no_character_is_ever_broken(text: str) -> None:
    for tokenizer in (byte_level(), bpe()):
        pieces = list(decoded(tokenizer, tokenizer.encode(text)))
        assert "".join(pieces) == text
        assert "\N{REPLACEMENT CHARACTER}" in text or not any("\N{REPLACEMENT CHARACTER}" in p for p in pieces)


def test_a_character_comes_with_its_last_byte() -> None:
    seen: list[str] = []
    after = []
    ids = iter("é👋a".encode())

    def watched() -> object:
        for i in ids:
            yield i
            after.append("".join(seen))

    for piece in decoded(byte_level(), watched()):  # type: ignore[arg-type]
        seen.append(piece)
    assert after == ["", "é", "é", "é", "é", "é👋", "é👋a"]


def test_a_tokenizer_that_is_not_made_of_bytes() -> None:
    pieces = {"▁the": 0, "▁cat": 1, "s": 2, "▁": 3, "<0xE4>": 4, "<0xBD>": 5, "<0xA0>": 6, "<eos>": 7}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=pieces, merges=[], byte_fallback=True))
    replace_mark = tokenizers.decoders.Replace("▁", " ")
    strip = tokenizers.decoders.Strip(" ", 1, 0)
    steps = [replace_mark, tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(), strip]
    backend.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer = Tokenizer(backend, 7)
    ids = [0, 1, 2, 3, 4, 5, 6, 1]
    assert list(decoded(tokenizer, ids)) == ["the", " cat", "s", " ", "你", " cat"]
    assert "".join(decoded(tokenizer, ids)) == tokenizer.decode(ids)
    assert heal(tokenizer, ids, 8) == (ids, "", None)


letters = st.text("ab\n", max_size=12)
cuts = st.lists(letters, max_size=8)


def reference_cut(text: str, stops: list[str]) -> str:
    """Read a character at a time; the first stop that is complete ends it."""
    for end in range(len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - len(max(found, key=len))]
    return text


@examples(400)
@given(cuts, st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stops_cut_the_same_text_wherever_the_pieces_are_cut(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    assert "".join(until(pieces, stops)) == reference_cut(text, stops)
    assert "".join(until(list(text), stops)) == reference_cut(text, stops)


@given(cuts, st.text("ab", min_size=1, max_size=4))
def test_only_a_beginning_of_a_stop_is_held_back(pieces: list[str], stop: str) -> None:
    given_out, taken = "", ""

    def watched() -> object:
        nonlocal taken
        for piece in pieces:
            if stop not in taken:
                held = taken.removeprefix(given_out)
                assert stop.startswith(held)
                assert len(held) < len(stop)
            taken += piece
            yield piece

    for text in until(watched(), [stop]):  # type: ignore[arg-type]
        given_out += text


@given(cuts, st.integers(0, 30))
def test_without(pieces: list[str], count: int) -> None:
    assert "".join(without(pieces, count)) == "".join(pieces)[count:]


# --- text to text -----------------------------------------------------------------------------------------


def test_healing_one_byte_tokens_changes_nothing() -> None:
    # The token given back can only be chosen again, so all that healing costs is one token.
    how = Sampling(max_tokens=60, temperature=1.0)
    plain = generate_text(tiny(), "é def ", how, healing=False)
    assert len(plain) > 5
    assert plain == generate_text(tiny(), "é def ", replace(how, max_tokens=61))


def test_healing_lets_the_first_token_begin_with_the_last_of_the_prompt() -> None:
    ids, text, begins = heal(bpe(), bpe().encode("def "), 300)
    assert (bpe().decode(ids), text) == ("def", " ")
    assert begins is not None
    texts = {bpe().decode([int(i)]) for i in begins.nonzero()}
    assert " " in texts
    assert len(texts) > 3
    assert all(t.startswith(" ") for t in texts)
    for prompt in ("", "d", "ä"):
        untouched = bpe().encode(prompt)[:1]
        assert heal(bpe(), untouched, 300) == (untouched, "", None)
    assert heal(bpe(), [5, 0], 300) == ([5, 0], "", None)  # end of document
    begins = heal(bpe(), bpe().encode("a<"), 300)[2]
    assert begins is not None
    assert not begins[0]  # its name begins with <, it does not
    assert heal(byte_level(), list("aé".encode()), 257)[2] is None  # half a character


def test_the_healed_text_goes_on_from_the_prompt() -> None:
    cfg = dense(16, 1, 2, 32, vocab_size=300, init_method="fan_in")
    model = LanguageModel(cfg, random_params(cfg, dtype=torch.float32), bpe())
    for prompt in ("def ", "class", "x\n    "):
        start = prepare(model, prompt)
        tokens: list[int] = []
        text = "".join(stream_text(model, start, Sampling(max_tokens=9), tokens.append))
        if bpe().eos_id not in tokens:
            assert prompt + text == bpe().decode([*start.ids, *tokens])


@examples(15)
@given(st.integers(0, 1000), st.integers(0, 15), st.integers(1, 3))
def test_the_text_ends_before_a_stop(seed: int, at: int, length: int) -> None:
    how = Sampling(max_tokens=24, temperature=1.0, seed=seed)
    whole = generate_text(tiny(), "def ", how)
    if stop := whole[at : at + length]:
        assert generate_text(tiny(), "def ", replace(how, stop=("zzzz", stop))) == whole[: whole.index(stop)]


def test_the_end_of_a_document_is_not_printed() -> None:
    # Not even by a tokenizer in which it is an ordinary token.
    model, seen = tiny()._replace(tokenizer=Tokenizer(byte_level().backend, ord("q"))), list[int]()
    hot = Sampling(max_tokens=3000, temperature=5.0)
    text = "".join(stream_text(model, prepare(model, "a"), hot, seen.append))
    assert seen[-1] == ord("q")
    assert text == byte_level().decode(seen[:-1])


def test_a_stop_ends_the_computation_too() -> None:
    how = Sampling(max_tokens=40, temperature=1.0)
    whole, tokens = generate_text(tiny(), "def ", how), list[int]()
    "".join(stream_text(tiny(), prepare(tiny(), "def "), replace(how, stop=(whole[3],)), tokens.append))
    assert len(tokens) < 20


def test_the_context_is_never_exceeded() -> None:
    model = tiny()._replace(context=10)
    for healing in (False, True):
        tokens: list[int] = []
        start = prepare(model, "12345", healing)
        list(stream_text(model, start, Sampling(max_tokens=99), tokens.append))
        assert len(start.ids) + len(tokens) == 10
    with pytest.raises(ValueError, match="10 tokens, and the model's context 10; shorten it to at most 9"):
        generate_text(model, "1234567890")


def test_an_empty_prompt_begins_a_document_and_odd_prompts_are_refused() -> None:
    assert prepare(tiny(), "").ids == [byte_level().eos_id]
    assert isinstance(generate_text(tiny(), "", Sampling(max_tokens=3)), str)
    with pytest.raises(ValueError, match="not valid UTF-8"):
        prepare(tiny(), "a\udc80")


def test_ids_that_the_tokenizer_does_not_know_are_not_chosen() -> None:
    tokens: list[int] = []
    for seed in range(400):
        hot = Sampling(max_tokens=1, temperature=50.0, top_p=1.0, seed=seed)
        list(stream_text(tiny(), prepare(tiny(), "a"), hot, tokens.append))
    assert len(set(tokens)) > VOCAB / 2
    assert max(tokens) < VOCAB


# --- runs and the command ---------------------------------------------------------------------------------


def saved(seed: int) -> Tree:
    """Parameters whose likeliest token is never the end of the document: its logit is 0, and others are above."""
    params = random_params(tiny().cfg, seed, torch.float32)
    params["head"]["w_out"][byte_level().eos_id] = 0.0
    return params


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints of steps 5 and 10, of which the moving average differs."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    cfg = Config(tiny().cfg, recipe=Recipe(sequence_length=2000, ema=0.9), run=Run(folder=str(folder)))
    (folder / "config.yaml").write_text(to_yaml(cfg))
    byte_level().save(folder / "tokenizer.json")
    for step in (5, 10):
        state = {"step": torch.tensor(step), "params": saved(step), "slots": {"ema": saved(step + 1)}}
        save(state, folder / "checkpoints", step=step)
    return folder


def test_a_run_is_loaded_as_it_was_saved(run: Path) -> None:
    for where, step, weights, seed in [
        (run, None, "params", 10),
        (run, 5, "params", 5),
        (run / "checkpoints" / "step5", None, "ema", 6),
        (run, None, "ema", 11),
    ]:
        model, path = load_model(where, step=step, weights=weights)  # type: ignore[arg-type]
        assert path.name == f"step{step or (5 if where != run else 10)}"
        expected = tree.flatten(saved(seed))
        loaded = tree.flatten(model.params)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], leaf) for name, leaf in expected.items())
        assert model.context == 2000


def test_the_newest_whole_checkpoint_is_taken(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    file = next((copy / "checkpoints" / "step10").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-9])
    said: list[str] = []
    _, path = load_model(copy, say=said.append)
    assert path.name == "step5"
    assert "step10" in said[0]


def test_the_command_prints_what_the_functions_give(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--max-tokens", "30", "--temperature", "1.1", "--top-k", "40", "--top-p", "0.9", "--seed", "7"]
    how = Sampling(30, 1.1, 40, 0.9, seed=7)
    expected = "def " + generate_text(load_model(run)[0], "def ", how) + "\n"
    for more in ([], ["--no-stream"]):
        assert main([str(run), "def ", *flags, *more]) == 0
        out, err = capsys.readouterr()
        assert out == expected
        assert re.search(r"step10: \d+ tokens, the first after \S+ s, \d+ tokens/s\n", err)
    stop = expected[9:11]
    assert main([*flags, "--stop", stop, "--stop", "zzzz", str(run), "def "]) == 0
    assert capsys.readouterr().out == expected[: expected.index(stop, 4)] + "\n"


def test_several_prompts_are_the_same_texts_as_one_by_one(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--max-tokens", "20", "--temperature", "0"]
    prompts = ["def ", "class A:", "x", "import os\nimport re", "é"]
    model, how = load_model(run)[0], Sampling(20, 0)
    texts = [generate_text(model, prompt, how) for prompt in prompts]
    expected = "".join(f"=== {i} of 5\n{p}{t}\n" for i, (p, t) in enumerate(zip(prompts, texts, strict=True), 1))
    for batch in ("1", "3", "8"):
        assert main([str(run), *prompts, *flags, "--batch-size", batch]) == 0
        out, err = capsys.readouterr()
        assert out == expected
        assert re.search(r"step10: 5 texts, \d+ tokens in \S+ s, \d+ tokens/s\n", err)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p, "id": 3}) + "\n" for p in prompts))
    assert main([str(run), *flags, "--prompts-file", str(tmp_path / "prompts.jsonl"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["prompt"], row["text"]) for row in rows] == list(zip(prompts, texts, strict=True))
    assert all(0 < row["tokens"] <= 20 for row in rows)
    (tmp_path / "prompts.txt").write_text("x\né\n")
    assert main([str(run), "def ", *flags, "--prompts-file", str(tmp_path / "prompts.txt"), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["text"] for row in rows] == [texts[0], texts[2], texts[4]]


def test_draws_of_a_prompt_do_not_depend_on_its_batch(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outs = []
    for batch in ("1", "4"):
        assert main([str(run), "a", "a", "bcd", "a", "--max-tokens", "20", "--batch-size", batch, "--json"]) == 0
        outs.append(capsys.readouterr().out)
    assert outs[0] == outs[1]
    assert len(set(outs[0].splitlines())) == 4  # equal prompts have draws of their own


def test_rows_of_a_batch_end_where_each_would_alone() -> None:
    prompts = [prepare(tiny(), text) for text in ("def ", "x", "class A")]
    how = Sampling(max_tokens=40, temperature=0)
    whole = ["".join(stream_text(tiny(), prompt, how)) for prompt in prompts]
    how = replace(how, stop=(whole[0][5], whole[1][9], whole[2][3]))
    alone = ["".join(stream_text(tiny(), prompt, how)) for prompt in prompts]
    seen: list[tuple[int, int]] = []
    together = ["".join(pieces) for pieces in stream_texts(tiny(), prompts, how, lambda row, token: seen.append((row, token)))]
    assert together == alone != whole
    assert len({len(text) for text in alone}) > 1
    assert max(map(len, alone)) + 3 > max(sum(row == i for row, _ in seen) for i in range(3))


def test_each_row_has_the_context_for_itself() -> None:
    model, how = tiny()._replace(context=20), Sampling(max_tokens=99, temperature=0)
    prompts = [prepare(model, text, False) for text in ("x" * 15, "abc")]
    counts = [0, 0]

    def count(row: int, _: int) -> None:
        counts[row] += 1

    together = ["".join(pieces) for pieces in stream_texts(model, prompts, how, count)]
    assert counts == [5, 17]
    assert together == ["".join(stream_text(model, prompt, how)) for prompt in prompts]


def test_a_prompt_is_cut_by_choice_and_never_silently(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "".join(chr(97 + i % 26) for i in range(3000))
    flags = ["--max-tokens", "40", "--temperature", "0", "--no-healing"]
    assert main([str(run), text, *flags, "--truncate-prompt", "left"]) == 0
    out, err = capsys.readouterr()
    assert "prompt 1: its first 1,040 tokens were left out (--truncate-prompt left)\n" in err
    assert "stopped at the model's context of 2,000 tokens" in err
    model, _ = load_model(run)
    assert out == text + generate_text(model, text[-1960:], Sampling(40, 0), healing=False) + "\n"
    assert prepare(model, text, False, room=model.room(5000)).ids == list(text[-1000:].encode())  # half stays for the prompt
    assert prepare(model, "short", False, room=40).cut == 0
    assert main([str(run), "short", text, *flags]) == 2
    assert "3,000 tokens, and the model's context 2,000; shorten it to at most 1,999, or give --truncate-prompt left" in (
        capsys.readouterr().err
    )


def test_a_text_begins_and_ends_with_the_ids_that_a_model_says(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    how = Sampling(max_tokens=40, temperature=0)
    whole = generate_text(load_model(copy)[0], "def ", how)
    assert len(set(whole)) > 3
    end = ord(whole[4])
    for ids in (end, [300, end, 5]):  # 300 is outside the vocabulary
        (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        model, _ = load_model(copy)
        assert generate_text(model, "def ", how) == whole[: whole.index(chr(end))]
    assert generate_text(load_model(run)[0], "def ", replace(how, stop_ids=(end,))) == whole[: whole.index(chr(end))]
    begun = load_model(run)[0]._replace(first_ids=(256, 9))
    assert prepare(begun, "ab").ids[:2] == [256, 9]
    assert prepare(begun, "").ids == [256, 9][: len(prepare(begun, "").ids)]


def test_wrong_requests_are_told_in_one_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bare = run.parent / "bare"
    bare.mkdir(exist_ok=True)
    cfg = Config(tiny().cfg, recipe=Recipe(sequence_length=8))
    (bare / "config.yaml").write_text(to_yaml(cfg))
    for args, message in [
        ([str(run.parent / "tinny")], "is not there; give the folder of a run"),
        ([str(run.parent / "tinny")], str(run)),  # what is there
        ([str(run.parent)], "is no run, it holds no config.yaml"),
        ([str(bare)], "holds no whole checkpoint"),
        ([str(bare), "--weights", "ema"], "--recipe.ema was 0"),
        ([str(run), "--step", "7"], "has no checkpoint of step 7; it has 5, 10"),
        ([str(run / "checkpoints" / "step5"), "--step", "5"], "leave out --step"),
        ([str(run), "x", "--temperature", "-1"], "--temperature is -1.0; it must not be negative"),
        ([str(run), "x", "--temperature", "nan"], "--temperature is nan"),
        ([str(run), "x", "--top-p", "0"], "--top-p is 0.0; it must be above 0 and at most 1"),
        ([str(run), "x", "--top-p", "1.5"], "--top-p is 1.5"),
        ([str(run), "x", "--top-k", "-3"], "--top-k is -3"),
        ([str(run), "x", "--min-p", "1.5"], "--min-p is 1.5; it must be at least 0 and at most 1"),
        ([str(run), "x", "--repetition-penalty", "0"], "--repetition-penalty is 0.0; it must be positive"),
        ([str(run), "x", "--stop-ids", "999"], "--stop-ids 999: the model's ids are 0 to 263"),
        ([str(run), "--prompts-file", "nowhere.txt"], "nowhere.txt"),
        ([str(run), "--prompts-file", str(REPO / "pyproject.toml"), "--batch-size", "0"], "--batch-size is 0"),
        ([str(run), "x", "--max-tokens", "0"], "--max-tokens is 0"),
        ([str(run), "x", "--threads", "-1"], "--threads is -1"),
        ([str(run), "x", "--stop", ""], "--stop has an empty text"),
        ([str(run), "x" * 2000], "2,000 tokens, and the model's context 2,000; shorten it"),
    ]:
        assert main(args) == 2, args
        out, err = capsys.readouterr()
        assert message in err, (args, err)
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert out == ""
    for args in ([str(run), "x", "--temprature", "1"], []):
        assert main(args) == 2


def test_another_models_checkpoint_or_tokenizer(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(run), str(copy)], check=True)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json; put the one there"):
        load_model(copy)
    bpe().save(copy / "tokenizer.json")
    with pytest.raises(ValueError, match="has 300 ids and the model 264"):
        load_model(copy)
    (copy / "config.yaml").write_text(to_yaml(Config(replace(tiny().cfg, d_model=32))))
    with pytest.raises(ValueError, match="does not hold the state asked for"):
        load_model(copy)


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "olmo_fn", "generate", *args]


def test_the_command_in_its_own_process(run: Path) -> None:
    result = subprocess.run(
        command(str(run), "def ", "--max-tokens", "5", "--temperature", "0"),
        capture_output=True, cwd=REPO, timeout=120, check=True,
    )  # fmt: skip
    expected = generate_text(load_model(run)[0], "def ", Sampling(5, 0))
    assert result.stdout.decode() == f"def {expected}\n"


def test_ctrl_c_ends_cleanly(run: Path) -> None:
    endless = command(str(run), "def ", "--max-tokens", "1900", "--temperature", "0")
    process = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=REPO)
    assert process.stdout is not None
    os.read(process.stdout.fileno(), 8)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"Traceback" not in err
    assert out.endswith(b"\n")
