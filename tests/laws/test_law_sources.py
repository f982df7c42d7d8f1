"""Losses by source are those of the sources' rows alone, under both engines, in parts and on any ranks."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from helpers import batch_of, params_of

from olmo_fn.core.gradients import EAGER
from olmo_fn.core.pipe import accumulate, grad, pipe
from olmo_fn.core.tape import loss_sums
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.nn import cross_entropy
from olmo_fn.optim import adamw
from olmo_fn.testing import assert_equivalent

MODEL = dense(d_model=16, n_layers=1, n_heads=2, hidden_size=32, vocab_size=50)
SOURCES = 3


def batch(rows=4, T=8, seed=0):
    found = batch_of(MODEL.vocab_size, rows, T, seed=seed, masked=(0.0, 0.5))
    return {**found, "sources": torch.tensor([2, 0, 2, 0][:rows])}


def step(engine, parts=1):
    loss = transformer.loss(MODEL, z_loss=1e-3, sources=SOURCES)
    return pipe(loss, grad(engine, dtype=torch.float64), accumulate(parts), adamw(1e-3))


@pytest.fixture(scope="module")
def params():
    return params_of(MODEL)


@pytest.mark.parametrize("engine", ["tape", "func"])
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_by_source_are_those_of_its_rows(params, engine, parts):
    whole = batch()
    _, metrics = step(engine, parts).grads(params, whole)
    plain = pipe(transformer.loss(MODEL, z_loss=1e-3), grad(engine, dtype=torch.float64), accumulate(parts))
    _, without = plain(params, {name: x for name, x in whole.items() if name != "sources"})
    assert metrics["loss"].equal(without["loss"])
    for source in range(SOURCES):
        rows = whole["sources"] == source
        alone = {name: x[rows] for name, x in whole.items() if name != "sources"}
        count = (alone["labels"] != -100).sum()
        assert metrics["source_tokens"][source] == count
        if count:
            ce = loss_sums(transformer.loss(MODEL), params, alone, replace(EAGER, dtype=torch.float64))["ce"]
            torch.testing.assert_close(metrics["source_ce"][source], ce, rtol=1e-12, atol=0)
    assert metrics["source_ce"][1] == 0


@pytest.mark.parametrize("mesh", [Mesh(dp_shard=2), Mesh(cp=2), Mesh(tp=2)], ids=str)
def test_losses_by_source_on_ranks(pool, mesh):
    batches = [batch(seed=i) for i in range(2)]
    assert_equivalent(partial(step, "tape"), transformer.specs(MODEL), [(mesh, Rules())], batches, pool=pool)


def test_a_source_that_is_forgotten_is_seen(params, monkeypatch):
    """The mutant counts every position for its own source and the next one."""
    right = cross_entropy.of_sources
    monkeypatch.setattr(cross_entropy, "of_sources", lambda *a: right(*a) | right(*a).roll(1, 0))
    with pytest.raises(AssertionError):
        test_losses_by_source_are_those_of_its_rows(params, "tape", 1)
