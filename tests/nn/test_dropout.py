"""Dropout: a function of sequence, position, channel and layer, and of nothing else."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.pipe import accumulate, grad, pipe
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.nn.residual import drop
from olmo_fn.spec import init

PLAIN = dense(16, 2, 2, 24, vocab_size=40, init_std=0.3)
MODEL = replace(PLAIN, block=replace(PLAIN.block, dropout=0.3))
PARAMS = init(transformer.specs(MODEL), seed=0)


def batch(rows=(5, 6, 7, 8)):
    ids = torch.randint(0, 40, (4, 13), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), "rows": torch.tensor(rows)}


def gradient(data, *transforms, engine="tape", remat="none"):
    return pipe(transformer.loss(MODEL), grad(engine, remat), *transforms)(PARAMS, data)[0]


def assert_same(one, other):
    for (path, a), (_, b) in zip(tree.items(one), tree.items(other), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6, msg=path)


def test_a_share_is_dropped_and_the_mean_stays():
    y = drop(torch.ones(8, 64, 31), 0.3, torch.arange(8), torch.arange(64), 0)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=0.02)
    assert y.mean().item() == pytest.approx(1, abs=0.03)
    assert set(y.unique().tolist()) == {0.0, y.max().item()}


@pytest.mark.parametrize("changed", ["rows", "columns", "place"])
def test_every_number_counts(changed):
    given = {"rows": torch.tensor([3]), "columns": torch.arange(9), "place": 1}
    other = given | {changed: given[changed] + (1 << 33 if changed == "rows" else 1)}
    one, two = (drop(torch.ones(1, 9, 40), 0.5, **numbers) for numbers in (given, other))
    assert 0.3 < (one == two).float().mean().item() < 0.7


def test_the_same_in_parts_again_and_by_either_engine():
    """Accumulated, rematerialized, by the other engine, and in another order of the rows."""
    expected = gradient(batch())
    assert_same(gradient(batch(), accumulate(2)), expected)
    assert_same(gradient(batch(), remat="full"), expected)
    assert_same(gradient(batch(), engine="func"), expected)
    assert_same(gradient({name: x.flip(0) for name, x in batch().items()}), expected)
    with pytest.raises(AssertionError):
        assert_same(gradient(batch(rows=(5, 6, 7, 9))), expected)


def test_without_rows_nothing_is_dropped():
    data = {name: x for name, x in batch().items() if name != "rows"}
    assert torch.equal(transformer.loss(MODEL)(PARAMS, data)[0], transformer.loss(PLAIN)(PARAMS, data)[0])


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match=r"rows is \(4, 1\) int64, and must be \(4,\) int64"):
        transformer.loss(MODEL)(PARAMS, {**batch(), "rows": torch.zeros(4, 1, dtype=torch.int64)})
