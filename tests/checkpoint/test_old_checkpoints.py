"""Checkpoints that older code wrote are read, by one process and by ranks; what is written today has the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import same_bits
from sharding import Layout, load_in
from torch.distributed.tensor import Replicate, Shard

from olmo_fn import tree as trees
from olmo_fn.checkpoint import load, save, verify
from olmo_fn.tree import Tree

OLD = Path(__file__).parents[1] / "fixtures" / "checkpoint"
W = torch.arange(35.0).reshape(7, 5)
BY_ONE: Tree = {
    "step": torch.tensor(3),
    "params": {"w": W, "norm": torch.tensor([1.0, -0.5]).bfloat16()},
    "slots": {
        "m": {"w": (W / 8).to(torch.float8_e4m3fn), "mask": torch.tensor([True, False])},
        "none": {},
        "nothing": torch.empty(0, 3),
    },
}
BY_EIGHT: Tree = {
    "step": torch.tensor(4),
    "embed": W,
    "a": {"w": W + 1},
    "b": {"w": (W + 2).bfloat16(), "norm": torch.arange(3.0)},
}


@pytest.mark.parametrize(
    ("step", "state", "empty", "meta"),
    [
        (3, BY_ONE, ("slots", "none"), {"tokens": 24, "names": ["a", None]}),
        (4, BY_EIGHT, ("none",), {"tokens": 32}),
    ],
)
def test_old_checkpoints_are_read(step: int, state: Tree, empty: tuple[str, ...], meta: Tree) -> None:
    path = OLD / f"step{step}"
    assert verify(path) == []
    back, stored_meta = load(path)
    assert stored_meta == meta
    assert list(trees.flatten(back)) == list(trees.flatten(state))
    for name, leaf in trees.items(state):
        assert same_bits(trees.at(back, name), leaf)
    assert trees.at(back, ".".join(empty)) == {}


def test_ranks_read_old_checkpoints_in_their_own_layout() -> None:
    placements = {"step": None, "embed": (Shard(1),), "a.w": (Shard(0),), "b.w": (Replicate(),), "b.norm": (Shard(0),)}
    load_in(Layout(1, (3,), placements, dict.fromkeys(placements, frozenset({0}))), BY_EIGHT, OLD / "step4")


def test_the_same_state_has_the_same_bytes(tmp_path: Path) -> None:
    path = save(BY_ONE, tmp_path, step=3, meta={"tokens": 24, "names": ["a", None]}, file_bytes=100)
    names = sorted(file.name for file in path.iterdir())
    assert names == sorted(file.name for file in (OLD / "step3").iterdir())
    for name in names:
        assert (path / name).read_bytes() == (OLD / "step3" / name).read_bytes()
