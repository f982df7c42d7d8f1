"""How much a step launches, and what lives at its peak: budgets of real sizes, from few blocks, which are all alike."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import same_bits
from traced import traced_step

from olmo_fn import tree
from olmo_fn.core.layout import compute_copies, compute_copy
from olmo_fn.models.config import Model
from olmo_fn.models.families import OLMO2, OLMOE
from olmo_fn.testing import FakeCuda, Seen, Trace
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import Constant

MODELS = {**OLMO2, **OLMOE}
BUDGETS = {"olmo2-7b": (1, 8192, 2000), "olmo2-1b": (4, 4096, 900), "olmoe-1b-7b": (1, 4096, 2200)}
"""Sequences, their length, and the most launches of a step: eager kernels and calls of compiled functions together."""


def steps(process: FakeCuda, model: Model, rows: int, length: int) -> tuple[Seen, Seen]:
    """Steps with two and with three blocks."""
    optim = AdamW(lr=1e-4, moments="bfloat16")
    cfg = Config(model, optim=optim, schedule=Constant(warmup=0), recipe=Recipe(rows, length), run=Run(steps=100_000))
    two, three = (process.run(traced_step, replace(cfg, model=replace(model, n_layers=n))) for n in (2, 3))
    return two, three


def whole(two: Seen, three: Seen, blocks: int) -> Seen:
    """The step of a model with so many blocks, each of which adds what the third one does."""
    found = Seen()
    for kind in ("launches", "calls", "syncs"):
        a, b = getattr(two, kind), getattr(three, kind)
        getattr(found, kind).update({name: a[name] + (b[name] - a[name]) * (blocks - 2) for name in {*a, *b}})
    found.moved = two.moved + (three.moved - two.moved) * (blocks - 2)
    found.peak = two.peak + (three.peak - two.peak) * (blocks - 2)
    return found


@pytest.mark.parametrize("name", BUDGETS)
def test_launches_of_a_step(fake_cuda: FakeCuda, name: str):
    rows, length, most = BUDGETS[name]
    two, three = steps(fake_cuda, MODELS[name], rows, length)
    found = whole(two, three, MODELS[name].n_layers)
    print(f"{name}, {rows} x {length}: {found.table(40)}")
    assert found.launched <= most, found.table(40)
    assert not found.syncs


def casts() -> tuple[int, bool]:
    """Launches that cast the matrices of a subtree, and whether these are what the CPU makes of them."""
    params = {"w": torch.randn(8, 4), "v": {"w": torch.randn(4, 8)}, "gain": torch.randn(8)}
    there = tree.map(lambda p: p.to("cuda"), params)
    with Trace() as trace:
        found = compute_copies(there, torch.bfloat16)
    same = [same_bits(tree.at(found, path).cpu(), compute_copy(p, torch.bfloat16)) for path, p in tree.items(params)]
    return trace.seen.launched, all(same)


def test_matrices_are_cast_in_one_launch(fake_cuda: FakeCuda):
    assert fake_cuda.run(casts) == (1, True)
