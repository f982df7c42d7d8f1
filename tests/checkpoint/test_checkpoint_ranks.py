"""Saving by real processes: a rank that dies or fails ends the save on all, by name, and harms no older checkpoint."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import big, run, save_forever, save_on_a_small_disk, save_without_the_last
from sharding import Layout, place
from torch.distributed.tensor import Replicate, Shard

from olmo_fn import tree as trees
from olmo_fn.checkpoint import Ranks, load, newest_whole, save, step_path, steps, sweep, verify
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing.pool import Pool

# Twice the timeout and the time in which starved processes (nice 19, load 10) get that far. The store's own timeout is 300 s.
SOON = 120.0  # seconds, on a busy machine too; the wait that it is about is far longer, or 4 s
ALL = frozenset({0})
HSDP = Layout(
    1, (2, 2), {"step": None, "w": (Replicate(), Shard(1)), "v": (Replicate(), Replicate())}, dict.fromkeys(big(0), ALL)
)
OTHER = Layout(1, (3,), {"step": None, "w": (Shard(0),), "v": (Shard(0),)}, HSDP.held_by)


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.name.startswith(".partial")]


def assert_whole(path: Path, step: int) -> None:
    """It is that of ``step``, and loads in another layout."""
    assert verify(path) == []
    for rank in range(OTHER.size):
        back, meta = load(path, OTHER.state(big(0), rank, meta=True))
        assert meta == {"step": step}
        for name, leaf in OTHER.state(big(step), rank).items():
            assert torch.equal(
                back[name].to_local() if name != "step" else back[name], leaf.to_local() if name != "step" else leaf
            )


@pytest.mark.slow
def test_a_rank_killed_during_a_save_leaves_the_previous_one_whole(tmp_path: Path) -> None:
    rng = random.Random(0)
    save(big(1), tmp_path, step=1, meta={"step": 1})
    for victim in (1, 0, 2):
        words = run(save_forever, HSDP, tmp_path, kill=victim, after=rng.uniform(0.0, 0.5))
        for rank, (word, seconds) in enumerate(words):
            if rank != victim:
                assert re.match(
                    rf"SaveFailed: could not save step \d+ into .*: .*rank {victim} did not answer within [48] s", word
                )
                assert seconds < SOON
        newest = newest_whole(tmp_path, on_skip=pytest.fail)
        assert newest == step_path(tmp_path, steps(tmp_path)[-1])
        committed = [int(word.split()[1]) for word, _ in words if word.startswith("step")]
        assert max(committed, default=0) <= steps(tmp_path)[-1]
        assert_whole(newest, steps(tmp_path)[-1])
    sweep(tmp_path)
    assert left_over(tmp_path) == []


def test_the_rank_that_hosts_the_store_is_killed(tmp_path: Path) -> None:
    words = run(save_forever, HSDP, tmp_path, kill=0, after=0.2, host=True)
    for word, seconds in words[1:]:
        assert re.match(r"SaveFailed: could not save step .*the rank that hosts it \(usually rank 0\) has ended", word)
        assert seconds < SOON
    for step in steps(tmp_path):
        assert_whole(step_path(tmp_path, step), step)


def test_a_full_disk_on_one_rank_ends_the_save_on_all(tmp_path: Path) -> None:
    old = save(big(1), tmp_path, step=1, meta={"step": 1})
    words = run(save_on_a_small_disk, HSDP, tmp_path)
    for rank, (word, _) in enumerate(words):
        who = "" if rank == 1 else "rank 1: "
        assert word.startswith(f"SaveFailed: could not save step 2 into {tmp_path}: {who}File too large"), word
    assert steps(tmp_path) == [1]
    assert_whole(old, 1)
    sweep(tmp_path)
    assert left_over(tmp_path) == []


def test_a_rank_that_does_not_come_is_named(tmp_path: Path) -> None:
    words = run(save_without_the_last, HSDP, tmp_path, timeout=4.0)
    assert words[3][0] == "ended"
    for word, seconds in words[:3]:
        assert re.match(
            r"SaveFailed: could not save step 2 into .*: rank 3 did not answer within 4 s\. Older checkpoints", word
        )
        assert seconds < SOON
    assert steps(tmp_path) == []


WHOLE = {
    "embed": torch.arange(35.0).reshape(7, 5),
    "a": {"w": torch.arange(30.0).reshape(5, 6).bfloat16()},
    "step": torch.tensor(3),
}


def shard_all(connection: Connection, dim: int) -> trees.Tree:
    """The state on the device mesh of ``connection``: ``dim`` over fsdp, the other one over tp, the rest plain."""
    placements = (Replicate(), Shard(dim), Shard(1 - dim))
    return trees.map(lambda x: place(x, connection.device_mesh, placements if x.ndim == 2 else None), WHOLE)


def save_job(connection: Connection, folder: str, port: int, dim: int) -> str:
    ranks = Ranks(connection.rank, connection.mesh.size, torch.distributed.TCPStore("127.0.0.1", port, is_master=False))
    return str(save(shard_all(connection, dim), folder, step=3, ranks=ranks))


def load_job(connection: Connection, path: str, dim: int) -> bool:
    expected = shard_all(connection, dim)
    back, _ = load(path, expected)
    full = {name: leaf.full_tensor() if leaf.ndim == 2 else leaf for name, leaf in trees.items(back)}
    return all(torch.equal(full[name], leaf) for name, leaf in trees.items(WHOLE))


def test_processes_connected_by_gloo_save_in_one_mesh_and_load_in_another(tmp_path: Path, pool: Pool) -> None:
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meshes = [Mesh(dp_shard=2, tp=2), Mesh(dp_replicate=2, dp_shard=2), Mesh(tp=2)]
    for i, mesh in enumerate(meshes):
        folder = tmp_path / str(i)
        (path,) = (
            set(pool.run(save_job, str(folder), store.port, i % 2, mesh=mesh)) if i == 0 else {str(save(WHOLE, folder, step=3))}
        )
        for other in meshes:
            for dim in (0, 1):
                assert all(pool.run(load_job, path, dim, mesh=other))
