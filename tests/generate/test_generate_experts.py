"""Generation with experts: the cache against the whole forward pass, rows by themselves, and the command on a trained run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from generating import full_logits, random_ids, random_params
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.cli import main as cli
from olmo_fn.data.tokenizer import train_bpe
from olmo_fn.generate.config import Sampling
from olmo_fn.generate.decode import empty_cache, extend
from olmo_fn.generate.load import load_model
from olmo_fn.generate.sample import sample
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, Hybrid, Model, MoE, PeriNorm, PreNorm, SwiGLU

some = st.sampled_from


@st.composite
def models(draw) -> Model:
    """Models with experts of all kinds, also those that drop tokens while they train."""
    heads = {"n_heads": 2, "n_kv_heads": draw(some([1, 2])), "window_pattern": draw(some([(), (3, -1)]))}
    sigmoid, shared, latent = draw(st.booleans()), draw(some([0, 3])), draw(some([0, 4]))
    moe = MoE(
        num_experts=6,
        top_k=draw(some([1, 2, 4])),
        expert_size=5,
        gating="sigmoid" if sigmoid else "softmax",
        balance_rate=0.1 if sigmoid else 0.0,
        weight_norm=draw(some([None, 1.0])),
        shared_size=shared,
        shared_mix=draw(some(["add", "average", "gate"])),
        latent_size=latent,
        latent_norm=bool(latent) and draw(st.booleans()),
        capacity_factor=draw(some([None, 0.3])),
        capacity_over=draw(some(["sequence", "batch"])),
        jitter=draw(some([0.0, 0.2])),
        expert_groups=draw(some([1, 2])),
        top_groups=2,
    )
    moe = replace(moe, top_groups=min(2, moe.expert_groups))
    kind = draw(some([Block, PreNorm, PeriNorm, Hybrid]))
    more = {"dense": SwiGLU(hidden_size=7), "norms": draw(some(["input", "output"]))} if kind is Hybrid else {}
    if kind is not Hybrid:
        moe = replace(moe, dense_layers=draw(some([0, 1])), dense_size=9)
    block = kind(mixer=Attention(**heads), feed_forward=moe, **more)
    return Model(8, 2, 23, block=block, init_method="fan_in")


@examples(40)
@given(models(), st.integers(1, 3), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_cached_logits_are_those_of_the_whole_forward_pass(cfg: Model, rows: int, parts: list[int]) -> None:
    params, ids = random_params(cfg), random_ids(cfg, rows, sum(parts))
    expected, state = full_logits(cfg, params, ids), empty_cache(cfg, rows, sum(parts), dtype=torch.float64)
    for part in ids.split(parts, dim=1):
        logits, state = extend(cfg, params, part, state)
        torch.testing.assert_close(logits, expected[:, state.length - 1], rtol=1e-12, atol=1e-11)


@examples(20)
@given(models(), st.lists(st.integers(1, 9), min_size=2, max_size=4))
def test_a_row_of_a_padded_batch_is_what_it_is_alone(cfg: Model, lengths: list[int]) -> None:
    """Whatever a batch is made of: no row takes another's place at an expert."""
    params = random_params(cfg)
    prompts = [random_ids(cfg, n, seed=i).tolist() for i, n in enumerate(lengths)]
    how = Sampling(max_tokens=6, temperature=1.0, top_p=0.9)
    together = list(zip(*sample(cfg, params, prompts, how), strict=True))
    for row, prompt in enumerate(prompts):
        assert list(together[row]) == [step[0] for step in sample(cfg, params, [prompt], how, first_row=row)]


def test_with_the_capacity_of_training_it_would_not_be() -> None:
    """The two tests above bite: a loss drops tokens, and what they are depends on the other rows."""
    moe = MoE(num_experts=4, top_k=2, expert_size=5, capacity_factor=0.3, capacity_over="batch")
    cfg = Model(8, 1, 23, block=Block(mixer=Attention(n_heads=2), feed_forward=moe), init_method="fan_in")
    params, ids = random_params(cfg), random_ids(cfg, 3, 16)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1)}
    _, dropping = transformer.loss(cfg)(params, batch)
    assert dropping["dropped"] > 0
    free = replace(cfg, block=replace(cfg.block, feed_forward=replace(moe, capacity_factor=None)))
    assert full_logits(cfg, params, ids).equal(full_logits(free, params, ids))
    assert not torch.allclose(dropping["ce"], transformer.loss(free)(params, batch)[1]["ce"], rtol=1e-3)


TEXT = "def f(x):\n    return x\n\n\nclass A:\n    def g(self):\n        return f(self)\n" * 200


@pytest.mark.parametrize("experts", [[], ["--model.capacity-factor", "0.5"], ["--model.block.name", "hybrid"]])
def test_a_trained_run_by_the_command(experts: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    """What the command prints is what the whole forward pass says, greedily, token after token."""
    monkeypatch.chdir(tmp_path)
    Path("text.py").write_text(TEXT)
    train_bpe([TEXT], 300).save(Path("tokenizer.json"))
    assert cli.main(["tokenize", "text.py", "--output", "tokens", "--tokenizer", "tokenizer.json"]) == 0
    flags = "--model.d-model 32 --model.n-layers 2 --model.n-heads 2 --model.vocab-size 300 --data.paths tokens/part-00000.npy"
    flags += " --data.tokenizer tokenizer.json --recipe.sequence-length 32 --recipe.batch-size 8 --recipe.no-compile"
    flags += " --run.steps 30 --recipe.dtype float32 --run.threads 1 --run.sample= --run.folder run"
    flags += " --run.eval-tokens 200 --schedule.warmup 3"
    moe = ["--model.num-experts", "4", "--model.top-k", "2", "--model.expert-size", "32"]
    chosen = experts if "hybrid" in experts else ["--model.feed-forward.name", "moe", *experts]
    assert cli.main(["train", "olmo2-tiny", *chosen, *moe, *flags.split()]) == 0
    capsys.readouterr()
    assert cli.main(["generate", "run", "def ", "--max-tokens", "12", "--temperature", "0", "--no-healing"]) == 0
    said = capsys.readouterr().out
    model, _ = load_model(Path("run"))
    ids = model.tokenizer.encode("def ")
    for _ in range(12):
        logits = full_logits(model.cfg, model.params, torch.tensor([ids]))[0, -1]
        ids.append(int(logits[: model.tokenizer.vocab_size].argmax()))
    assert model.tokenizer.decode(ids).strip() in said
