"""Checkpoints that are written and read a tensor at a time are those of whole trees."""

from __future__ import annotations

import weakref

import pytest
import torch
from helpers import same_bits

from olmo_fn import tree
from olmo_fn.checkpoint import BrokenCheckpoint, Deferred, load, read_index, save, stream

TREE = {"params": {"a": torch.arange(12.0).view(3, 4), "b": {"c": torch.ones(5, dtype=torch.bfloat16), "d": torch.tensor(2)}}}


def deferred(alive: list[int] | None = None):
    """The tree, each leaf made when it is written; ``alive`` gets how many of those made before are still there then."""
    made: list[weakref.ref] = []

    def of(x):
        def make():
            if alive is not None:
                alive.append(sum(ref() is not None for ref in made))
            fresh = x.clone()
            made.append(weakref.ref(fresh))
            return fresh

        return Deferred(tuple(x.shape), x.dtype, make)

    return tree.map(of, TREE)


def test_what_is_made_late_is_stored_as_what_was_there(tmp_path):
    one, other = save(TREE, tmp_path / "a", step=1), save(deferred(), tmp_path / "b", step=1)
    assert read_index(one) == read_index(other)
    assert same_bits(load(other)[0], TREE)
    for file in one.iterdir():
        assert file.read_bytes() == (other / file.name).read_bytes()


def test_each_is_let_go_before_the_next_is_made(tmp_path):
    alive: list[int] = []
    save(deferred(alive), tmp_path, step=1, threads=1)
    assert alive == [0, 0, 0]


def test_what_is_not_what_was_said_is_noticed(tmp_path):
    with pytest.raises(AssertionError):
        save({"w": Deferred((2,), torch.float32, lambda: torch.ones(3))}, tmp_path, step=1)
    assert not list(tmp_path.glob("step*"))


def test_a_stream_has_the_tensors_in_the_order_that_is_asked_for(tmp_path):
    path = save(TREE, tmp_path, step=1)
    flat = tree.flatten(TREE)
    like = {name: x.to("meta") for name, x in reversed(flat.items())}
    found = list(stream(path, like))
    assert [name for name, _ in found] == list(like)
    assert same_bits(dict(found), flat)
    assert [name for name, _ in stream(path, {"params.b.d": like["params.b.d"]})] == ["params.b.d"]


def test_a_stream_of_what_is_not_there_or_damaged_is_refused(tmp_path):
    path = save(TREE, tmp_path, step=1)
    with pytest.raises(ValueError, match=r"asked for but not there: params\.x"):
        list(stream(path, {"params.x": torch.empty(1, device="meta")}))
    with pytest.raises(ValueError, match=r"params\.a is F32 \[3, 4\], asked for F32 \[4, 3\]"):
        list(stream(path, {"params.a": torch.empty(4, 3, device="meta")}))
    (file,) = path.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(BrokenCheckpoint):
        list(stream(path, {name: x.to("meta") for name, x in tree.flatten(TREE).items()}))
