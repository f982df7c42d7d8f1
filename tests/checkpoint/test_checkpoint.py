"""Checkpoints come back bitwise, in any dtype and stride, whole or in part, and are plain safetensors."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import examples, same_bits
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from olmo_fn import tree as trees
from olmo_fn.checkpoint import BrokenCheckpoint, Index, load, read_index, save, steps, verify
from olmo_fn.checkpoint.format import CHUNK_BYTES, DTYPES, StoredPart, StoredTensor, crc32
from olmo_fn.spec import Box
from olmo_fn.tree import Tree


def assert_same(a: Tree, b: Tree) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        if isinstance(x, dict):
            assert_same(x, b[name])
        else:
            assert same_bits(x, b[name])


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Any bits in any dtype: NaNs with payloads too; 0-d, empty and non-contiguous tensors."""
    dtype = draw(st.sampled_from(list(DTYPES.values())))
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    n = max(1, int(torch.tensor([*shape, 1]).prod()))
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (n * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    tensor = raw.view(dtype)[: n if 0 not in shape else 0].reshape(shape)
    how = draw(st.sampled_from(["plain", "transposed", "strided", "expanded"]))
    if how == "transposed" and tensor.ndim >= 2:
        return tensor.transpose(0, -1)
    if how == "strided" and tensor.ndim >= 1:
        return tensor[::2]
    if how == "expanded":
        return tensor.expand(3, *tensor.shape)
    return tensor


keys = st.text("abcxyz_0129ß\"\\ /'", min_size=1, max_size=6)
state_trees = st.recursive(tensors(), lambda children: st.dictionaries(keys, children, max_size=4), max_leaves=12).map(
    lambda leaf: leaf if isinstance(leaf, dict) else {"w": leaf}
)


@given(tree=state_trees, file_bytes=st.sampled_from([1, 100, 1 << 30]))
@examples(60)
def test_any_tree_comes_back_bitwise(tree: Tree, file_bytes: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = save(tree, folder, step=3, meta={"tokens": 7, "nested": {"a": [1, None]}}, file_bytes=file_bytes)
        back, meta = load(path)
        assert_same(back, tree)
        assert list(trees.flatten(back)) == list(trees.flatten(tree)), "the order of the leaves is part of the state"
        assert meta == {"tokens": 7, "nested": {"a": [1, None]}}
        assert verify(path) == []
        assert_same(load(path, like=trees.map(lambda x: x.to("meta"), tree))[0], tree)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    state = {f"x{i}": torch.arange(24, dtype=torch.uint8).view(dtype) for i, dtype in enumerate(DTYPES.values()) if i < 14}
    state = {"step": torch.tensor(3), "deep": {"er": state}}
    path = save(state, tmp_path, step=3, file_bytes=100)
    files = sorted(path.glob("*.safetensors"))
    assert len(files) > 1
    loaded = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert_same(loaded, trees.flatten(state))
    assert json.loads((path / "index.json").read_text())["step"] == 3


def test_a_tensor_of_several_chunks_comes_back_bitwise(tmp_path: Path) -> None:
    big = torch.arange(CHUNK_BYTES // 4 * 5 // 2, dtype=torch.int32).view(torch.float32)
    path = save({"big": big, "small": torch.ones(3)}, tmp_path, step=1)
    assert len(read_index(path).tensors["big"].parts[0].crc32) == 3
    assert_same(load(path)[0], {"big": big, "small": torch.ones(3)})


def test_aliased_and_parameter_leaves(tmp_path: Path) -> None:
    tied = torch.nn.Parameter(torch.randn(4, 4))
    back, _ = load(save({"embed": tied, "head": tied, "view": tied.detach()[1:, 1:]}, tmp_path, step=1))
    assert_same(back, {"embed": tied.detach(), "head": tied.detach(), "view": tied.detach()[1:, 1:]})
    assert not any(tensor.requires_grad for tensor in back.values())


def test_a_lazily_negated_tensor_is_stored_as_its_values(tmp_path: Path) -> None:
    strided = torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag
    dense = torch._neg_view(torch.arange(3.0))
    assert strided.is_neg()
    assert dense.is_neg()
    back, _ = load(save({"strided": strided, "dense": dense}, tmp_path, step=1))
    assert back["strided"].tolist() == back["dense"].tolist() == [0, -1, -2]


def state() -> Tree:
    w = torch.arange(6.0).reshape(2, 3)
    return {
        "step": torch.tensor(5),
        "params": {"a": w, "b": w.bfloat16()},
        "slots": {"m": {"a": w + 1}, "none": {}},
    }


def test_select_loads_only_what_matches(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=5)
    assert_same(load(path, select=["params.*"])[0], {"params": state()["params"]})
    assert_same(load(path, select="params.*")[0], {"params": state()["params"]})
    other = {**state(), "slots": {"v": torch.zeros(9)}}
    assert_same(
        load(path, like=other, select=["params.*", "step"])[0],
        {"step": state()["step"], "params": state()["params"]},
    )
    with pytest.raises(ValueError, match=r"'param\.\*' matches nothing; there are step, params.a"):
        load(path, select=["param.*"])


def test_damage_outside_the_selection_does_not_matter(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=5, file_bytes=1)
    broken = path / read_index(path).tensors["slots.m.a"].parts[0].file
    broken.unlink()
    assert_same(load(path, select=["params.*"])[0], {"params": state()["params"]})
    with pytest.raises(BrokenCheckpoint, match=f"{broken.name}: missing"):
        load(path)


def test_like_decides_the_order_and_says_all_the_differences(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=5)
    like = dict(reversed(state().items()))
    assert list(trees.flatten(load(path, like=like)[0])) == ["slots.m.a", "params.a", "params.b", "step"]
    like = {
        "step": torch.tensor(5),
        "params": {"a": torch.zeros(3, 2), "b": torch.zeros(2, 3), "c": torch.zeros(1)},
    }
    with pytest.raises(ValueError, match="does not hold the state asked for") as error:
        load(path, like=like)
    assert not isinstance(error.value, BrokenCheckpoint), "the checkpoint is whole: no reason to skip it"
    assert str(error.value) == (
        f"{path} does not hold the state asked for:\n"
        "  asked for but not there: params.c\n"
        "  there but not asked for: slots.m.a\n"
        "  params.a is F32 [2, 3], asked for F32 [3, 2]\n"
        "  params.b is BF16 [2, 3], asked for F32 [2, 3]\n"
        'use the config it was saved with, or load a part of it, such as select=["params.*"]'
    )


@pytest.mark.parametrize(
    ("tree", "meta", "message"),
    [
        ({"step": 5}, {}, "step is a int; a checkpoint holds dense tensors, other values go into meta"),
        ({"a": {"w.x": torch.ones(1)}}, {}, r"key 'w\.x' in a of the tree: must be a printable str"),
        ({"a": {0: torch.ones(1)}}, {}, "key 0 in a of the tree"),
        ({"a": torch.ones(1, device="meta")}, {}, r"a is a Tensor \(torch.strided, meta\)"),
        (
            {"a": torch.ones(1, dtype=torch.complex128)},
            {},
            "a is torch.complex128; a checkpoint holds float64,",
        ),
        ({"a": torch.eye(2).to_sparse()}, {}, "a is a Tensor .*sparse_coo"),
        ({}, {"loss": float("nan")}, "meta is not JSON"),
        ({}, {"path": Path("x")}, "meta is not JSON"),
        ({}, {"betas": (0.9, 0.95)}, r"meta\['betas'\] is \(0.9, 0.95\), JSON gives back \[0.9, 0.95\]"),
        ({}, {"by": {1: 2}}, r"meta\['by'\] is \{1: 2\}, JSON gives back \{'1': 2\}"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(tmp_path: Path, tree: Tree, meta: Tree, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        save(tree, tmp_path / "checkpoints", step=1, meta=meta)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("step", [-1, 1.0, "1"])
def test_a_step_is_a_number_that_is_found_again(tmp_path: Path, step: Any) -> None:
    with pytest.raises(ValueError, match=r"step=.*: must be an int, 0 or more"):
        save({}, tmp_path, step=step)


def test_a_whole_checkpoint_is_only_replaced_when_asked(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(3)}, tmp_path, step=1)
    with pytest.raises(ValueError, match="step1 is there already, and whole; pass replace=True"):
        save({"w": torch.ones(3)}, tmp_path, step=1)
    assert_same(load(path)[0], {"w": torch.zeros(3)})
    save({"w": torch.ones(3)}, tmp_path, step=1, replace=True)
    assert_same(load(path)[0], {"w": torch.ones(3)})
    assert sorted(os.listdir(tmp_path)) == [".lock", "step1"]


def test_a_broken_one_of_the_same_step_is_moved_aside_and_kept(tmp_path: Path) -> None:
    path = save({"w": torch.zeros(3)}, tmp_path, step=1)
    (path / "index.json").write_text("{}")
    save({"w": torch.ones(3)}, tmp_path, step=1)
    assert_same(load(path)[0], {"w": torch.ones(3)})
    (aside,) = tmp_path.glob("step1.broken-*")
    assert (aside / "index.json").read_text() == "{}"
    assert steps(tmp_path) == [1]


def test_boxes_that_leave_a_gap_are_refused() -> None:
    parts = tuple(StoredPart("f", Box((row, 0), (1, 4)), ("0" * 8,)) for row in (0, 2))
    index = Index(step=1, tensors={"w": StoredTensor("F32", (3, 4), parts)}, files={})
    with pytest.raises(BrokenCheckpoint, match="the boxes of w do not tile its shape"):
        Index.loads(index.dumps(), "index.json")


def test_an_index_of_another_format_says_so(tmp_path: Path) -> None:
    path = save(state(), tmp_path, step=5)
    head, tail = (path / "index.json").read_bytes().split(b'", "crc32": "')
    head, tail = head.replace(b"olmo_fn 1", b"olmo_fn 2"), tail[8:]
    checksum = crc32(head + b'", "crc32": "' + b"0" * 8 + tail).encode()
    (path / "index.json").write_bytes(head + b'", "crc32": "' + checksum + tail)
    with pytest.raises(
        BrokenCheckpoint,
        match=r"written in format 2, this olmo_fn reads format 1 \(it is version .*\); load it with a newer olmo_fn",
    ):
        load(path)
