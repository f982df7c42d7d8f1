"""Law 7: what is saved in one layout comes back in any other, bitwise; each box is written once, by one rank."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import examples, same_bits
from hypothesis import given
from hypothesis import strategies as st
from sharding import Layout, layouts, load_in, place, together, wholes
from torch.distributed import HashStore
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from olmo_fn import tree as trees
from olmo_fn.checkpoint import (
    RankLost,
    Ranks,
    Retention,
    SaveFailed,
    Saver,
    load,
    load_newest,
    local_box,
    read_index,
    save,
    steps,
    verify,
)
from olmo_fn.checkpoint.boxes import bands, contiguous, covering, overlap, tiles
from olmo_fn.checkpoint.shards import Held, Plan, assign, local_state
from olmo_fn.checkpoint.stored import PartBytes
from olmo_fn.cli import main as cli
from olmo_fn.spec import Box
from olmo_fn.tree import Tree


def main(words):
    """``olmo-fn checkpoint``."""
    return cli.main(["checkpoint", *map(str, words)])


# Where every file is synced, a disk shared with others makes a hundred small checkpoints a matter of minutes.
MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None


def save_in(layout: Layout, whole: Tree, folder: str | Path, step: int = 1) -> Path:
    """The path of the checkpoint that all ranks of ``layout`` make together, or the first error."""
    results = together(
        layout.size, lambda ranks: save(layout.state(whole, ranks.rank), folder, step=step, ranks=ranks, threads=1)
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
    assert len(set(results)) == 1
    return results[0]


def law_7(whole: Tree, a: Layout, b: Layout) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        path = save_in(a, whole, folder)
        load_in(b, whole, path)
        back, _ = load(path)
        assert trees.flatten(back).keys() == trees.flatten(whole).keys()
        for name, leaf in trees.items(whole):
            assert same_bits(trees.at(back, name), leaf)
        assert verify(path) == []
        assert sorted(file.name for file in path.iterdir()) == sorted([*read_index(path).files, "index.json"])


@given(data=st.data())
@examples(60)
def test_any_layout_loads_any_other(data: st.DataObject) -> None:
    whole = data.draw(wholes())
    law_7(whole, data.draw(layouts(whole)), data.draw(layouts(whole)))


W = torch.arange(77.0).reshape(7, 11)
GRID = Layout(1, (2, 3), {"w": (Shard(1), Shard(0)), "v": (Replicate(), Shard(0))}, {"w": frozenset({0}), "v": frozenset({0})})
ROWS = replace(GRID, mesh=(4,), placements={"w": (Shard(0),), "v": (Replicate(),)})
WHOLE: Tree = {"w": W, "v": torch.arange(5.0)}


def test_each_box_is_written_by_one_rank_into_its_own_file(tmp_path: Path) -> None:
    index = read_index(save_in(GRID, WHOLE, tmp_path))
    assert sorted(part.box for part in index.tensors["w"].parts) == [
        ((0, 0), (3, 6)), ((0, 6), (3, 5)), ((3, 0), (3, 6)), ((3, 6), (3, 5)), ((6, 0), (1, 6)), ((6, 6), (1, 5)),
    ]  # fmt: skip
    assert sorted(part.box for part in index.tensors["v"].parts) == [((0,), (2,)), ((2,), (2,)), ((4,), (1,))]
    assert Counter(part.file for part in index.tensors["w"].parts) == {
        f"state-rank{r:05d}-00000.safetensors": 1 for r in range(6)
    }


@pytest.mark.parametrize("name", ["shifted offset", "box missing", "box written twice", "wrong place", "wrong stride"])
def test_mutants_of_law_7_are_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each breaks one thing; the law, or the check before the commit, must see it."""
    if name == "shifted offset":

        def shifted(leaf: torch.Tensor) -> Box:
            offset, shape = local_box(leaf)
            return Box((max(0, offset[0] - 1), *offset[1:]), shape)

        monkeypatch.setattr("olmo_fn.checkpoint.shards.local_box", shifted)
    elif name in ("box missing", "box written twice"):

        def wrong(held: list[Held]) -> Plan:
            plan = assign(held)
            twice = name == "box written twice"
            return replace(plan, writers={path: list(range(6)) if twice else ranks[1:] for path, ranks in plan.writers.items()})

        monkeypatch.setattr("olmo_fn.checkpoint.writing.assign", wrong)
    elif name == "wrong place":
        monkeypatch.setattr(
            "olmo_fn.checkpoint.reading.covering", lambda part, box: covering(part, Box(box.offset, box.shape[::-1]))
        )
    else:
        monkeypatch.setattr("olmo_fn.checkpoint.reading.strides", lambda shape: (max(1, math.prod(shape[1:]) - 1), 1))
    before = name in ("shifted offset", "box missing", "box written twice")
    with pytest.raises(SaveFailed if before else (AssertionError, ValueError, RuntimeError)) as error:
        law_7(WHOLE, GRID, ROWS)
    if before:
        assert "the boxes of" in str(error.value)
        assert "do not tile its shape" in str(error.value)


@given(data=st.data())
@examples(150)
def test_local_box_is_the_box_that_torch_says(data: st.DataObject) -> None:
    whole = data.draw(wholes())
    layout = data.draw(layouts(whole))
    for rank in range(layout.size):
        for leaf in trees.flatten(layout.state(whole, rank)).values():
            box = local_box(leaf)
            if isinstance(leaf, DTensor):
                shape, offset = compute_local_shape_and_global_offset(leaf.shape, leaf.device_mesh, leaf.placements)
                assert (box.shape, box.offset if math.prod(shape) else offset) == (tuple(shape), tuple(offset))
            else:
                assert box == Box((0,) * leaf.ndim, tuple(leaf.shape))


@given(data=st.data())
@examples(60)
def test_every_box_has_one_writer_among_its_holders(data: st.DataObject) -> None:
    whole = data.draw(wholes())
    layout = data.draw(layouts(whole))
    held = [
        local_state(layout.state(whole, rank), 1, None, Ranks(rank, layout.size, HashStore())).held()
        for rank in range(layout.size)
    ]
    plan = assign(held)
    assert list(plan.writers) == list(dict.fromkeys(name for boxes, _ in held for name in boxes))
    assert plan.nbytes == sum(leaf.nbytes for _, leaf in trees.items(whole))
    for name, ranks in plan.writers.items():
        assert len(set(ranks)) == len(ranks)
        boxes = {tensors[name][0] for tensors, _ in held if name in tensors and tensors[name][1]}
        written = [held[rank][0][name][0] for rank in ranks]
        assert sorted(written) == sorted(boxes) if boxes else len(written) == 1


def test_bytes_are_spread_over_the_holders() -> None:
    """Eight ranks, two by four: every second tensor is sharded over four, the others are plain and on all."""
    sizes = [400, 400, 300, 200, 200, 100, 50, 50, 10, 10]
    held: list[Held] = []
    for rank in range(8):
        boxes = {f"w{i}": Box((n * (rank % 4),), (n,)) if i % 2 else Box((0,), (4 * n,)) for i, n in enumerate(sizes)}
        held.append(({name: (box, box.shape[0], 4 * n) for (name, box), n in zip(boxes.items(), sizes, strict=True)}, ()))
    written = Counter[int]()
    for name, ranks in assign(held).writers.items():
        for rank in ranks:
            written[rank] += held[rank][0][name][1]
    assert sum(written.values()) == 4 * sum(sizes)
    assert max(written.values()) <= 4 * max(sizes), "no more than the largest tensor that only one rank may write"


spans_2d = st.tuples(st.tuples(*[st.integers(0, 4)] * 3), st.tuples(*[st.integers(1, 5)] * 3)).map(lambda pair: Box(*pair))


@given(box=spans_2d, want=spans_2d, most=st.integers(1, 40), sparse=st.integers(1, 40))
@examples(200)
def test_bands_are_the_part_and_their_bytes_lie_where_they_are_said_to(box: Box, want: Box, most: int, sparse: int) -> None:
    whole = np.arange(math.prod(box.shape)).reshape(box.shape)
    part = overlap(box, want)
    common = {tuple(i) for i in np.argwhere(np.ones(box.shape)) + box.offset} & {
        tuple(i) for i in np.argwhere(np.ones(want.shape)) + want.offset
    }
    if part is None:
        assert not common
        return
    assert {tuple(i) for i in np.argwhere(np.ones(part.shape)) + part.offset} == common
    assert tiles([Box(tuple(np.subtract(b.offset, part.offset)), b.shape) for b in bands(part, box, most, sparse)], part.shape)
    for band in bands(part, box, most, sparse):
        cut = tuple(slice(i - j, i - j + n) for i, j, n in zip(band.offset, box.offset, band.shape, strict=True))
        start, stop = covering(band, box)
        assert (start, stop) == (whole[cut].min(), whole[cut].max() + 1)
        assert contiguous(band, box) == (whole[cut].size == stop - start)


@given(data=st.data(), shape=st.tuples(st.integers(1, 4), st.integers(1, 4)))
@examples(200)
def test_tiles_is_counting(data: st.DataObject, shape: tuple[int, int]) -> None:
    count = np.zeros(shape, dtype=int)
    boxes = []
    for _ in range(data.draw(st.integers(1, 5))):
        offset = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
        size = tuple(data.draw(st.integers(0, n - i)) for i, n in zip(offset, shape, strict=True))
        if data.draw(st.booleans()) and (rest := np.argwhere(count == 0)).size:
            offset, size = tuple(rest[0].tolist()), (1, 1)
        boxes.append(Box(offset, size))
        count[offset[0] : offset[0] + size[0], offset[1] : offset[1] + size[1]] += 1
    assert tiles(boxes, shape) == bool((count == 1).all())


def test_a_rank_reads_only_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {"w": torch.arange(4096 * 1024.0).reshape(4096, 1024)}  # 16 MiB in chunks of 1 MiB
    path = save(whole, tmp_path, step=1)
    read: list[int] = []

    def counting(self: PartBytes, i: int, out: memoryview, original: Any = PartBytes._read_chunk) -> None:
        read.append(len(out))
        original(self, i, out)

    monkeypatch.setattr(PartBytes, "_read_chunk", counting)
    layout = Layout(1, (8,), {"w": (Shard(0),)}, {"w": frozenset({0})})
    for rank in (0, 5):
        read.clear()
        load(path, layout.state(whole, rank, meta=True))
        assert sum(read) == 2 << 20, "the rows of this rank"
    read.clear()
    load(path, Layout(1, (7,), layout.placements, layout.held_by).state(whole, 3, meta=True))
    assert sum(read) <= 16 / 7 * 2**20 + (2 << 20), "and at most two chunks that it shares"


def test_the_listing_and_the_checksums_work_on_shards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = save_in(GRID, WHOLE, tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "step1" in capsys.readouterr().out
    file = path / read_index(path).tensors["w"].parts[0].file
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert verify(path) == [f"{file}: w does not match its checksum"]
    with pytest.raises(ValueError, match="w does not match its checksum"):
        load(path, ROWS.state(WHOLE, 0, meta=True))
    load(path, ROWS.state(WHOLE, 3, meta=True))
    assert main([str(tmp_path)]) == 1


def test_the_ranks_agree_on_the_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    """Damage in the rows of one rank makes all of them take the one before; a wrong config on one ends all."""
    save(WHOLE, tmp_path, step=1)
    file = save_in(GRID, WHOLE, tmp_path, step=2) / "state-rank00000-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")

    def resume(ranks: Ranks) -> object:
        skipped: list[str] = []
        like = ROWS.state(WHOLE, ranks.rank, meta=True)
        found = load_newest(tmp_path, lambda path: load(path, like)[0], ranks=ranks, on_skip=skipped.append)
        assert found is not None
        assert same_bits(found[1]["w"].to_local(), ROWS.state(WHOLE, ranks.rank)["w"].to_local())
        return found[0].name, len(skipped), "does not match its checksum" in skipped[0]

    assert together(4, resume) == [("step1", 1, True)] * 4
    assert together(4, lambda ranks: load_newest("/nowhere", load, ranks=ranks)) == [None] * 4

    def differ(ranks: Ranks) -> object:
        like = ROWS.state(WHOLE, ranks.rank, meta=True)
        asked = {"v": like["v"]} if ranks.rank == 2 else like
        return load_newest(tmp_path, lambda path: load(path, asked), ranks=ranks)

    errors = together(4, differ)
    assert [type(error) for error in errors] == [RankLost, RankLost, ValueError, RankLost]
    assert "rank 2: " in str(errors[0])
    assert "there but not asked for: w" in str(errors[0])


def test_a_saver_copies_only_what_its_rank_writes_and_training_may_go_on(tmp_path: Path) -> None:
    layout = replace(GRID, placements={"w": (Replicate(), Shard(0)), "v": (Replicate(), Replicate())})

    def train(ranks: Ranks) -> int:
        with Saver(tmp_path, retention=Retention(keep_last=1), ranks=ranks, threads=1) as saver:
            for step in (1, 2):
                state = layout.state({name: leaf + step for name, leaf in WHOLE.items()}, ranks.rank)
                saver.submit(state, step=step, meta={"step": step})
                for leaf in state.values():
                    leaf.to_local().fill_(-1)
            copied = sum(buffer.nbytes for buffer in saver._buffers.values())
            assert saver.wait() == tmp_path / "step2"
        return copied

    copied = together(6, train)
    assert sum(copied) == sum(leaf.nbytes for leaf in WHOLE.values()), "each replica once"  # type: ignore[arg-type]
    assert steps(tmp_path) == [2]
    back, meta = load(tmp_path / "step2")
    assert meta == {"step": 2}
    assert all(torch.equal(back[name], leaf + 2) for name, leaf in WHOLE.items())


def test_ranks_at_different_steps_are_refused(tmp_path: Path) -> None:
    errors = together(2, lambda ranks: save({"w": W}, tmp_path, step=ranks.rank + 4, ranks=ranks))
    assert all("rank 0 at step 4, rank 1 at step 5; all must save the same ones" in str(error) for error in errors)
    assert steps(tmp_path) == []


def test_what_a_sharded_save_refuses(tmp_path: Path) -> None:
    leaf = GRID.state(WHOLE, 4)["w"]
    with pytest.raises(
        ValueError, match=r"w is a DTensor on the ranks \[0, 1, .*this process is its rank 4, and saves as rank 0"
    ):
        save({"w": leaf}, tmp_path, step=1)
    mesh = DeviceMesh("cpu", torch.arange(1), _init_backend=False, _rank=0)
    partial = DTensor.from_local(W, mesh, [Partial()], run_check=False)
    with pytest.raises(ValueError, match=r"w is placed as P.*; a checkpoint holds Replicate and Shard"):
        save({"w": partial}, tmp_path, step=1)
    wrong = DTensor.from_local(W[1:], mesh, [Shard(0)], run_check=False, shape=W.shape, stride=W.stride())
    with pytest.raises(ValueError, match=r"w holds \[6, 11\] here, its placements say \[7, 11\] of \[7, 11\]"):
        save({"w": wrong}, tmp_path, step=1)
    alone = place(W, mesh, (Shard(0),))
    assert torch.equal(load(save({"w": alone}, tmp_path, step=1))[0]["w"], W)
    with pytest.raises(ValueError, match="4 ranks need a store"):
        Ranks(0, 4)
