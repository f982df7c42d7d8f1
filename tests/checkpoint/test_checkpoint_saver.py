"""Saving in the background, and what it deletes."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
import torch
from checkpoint_jobs import file_size_limit
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.checkpoint import Retention, SaveFailed, Saver, load, retire, save, steps, to_delete
from olmo_fn.checkpoint.commit import hidden, locked

step_sets = st.sets(st.integers(0, 500), max_size=12)
rules = st.builds(Retention, st.none() | st.integers(1, 6), st.none() | st.integers(1, 100))


@given(there=step_sets, retention=rules, protected=step_sets)
def test_retention_gives_up_only_what_no_rule_keeps(there: set[int], retention: Retention, protected: set[int]) -> None:
    gone = to_delete(there, retention, protected)
    assert gone == sorted(set(gone))
    kept = there - set(gone)
    assert set(gone) <= there - protected
    if retention == Retention():
        assert gone == []
    newest_first = sorted(there, reverse=True)
    for rank, step in enumerate(newest_first):
        by_last = rank < (retention.keep_last or 1)
        by_every = retention.keep_every is not None and step % retention.keep_every == 0
        assert (step in kept) == (by_last or by_every or step in protected or retention == Retention())
    assert to_delete(kept, retention, protected) == [], "what is kept once is kept"


@pytest.mark.parametrize("rule", [{"keep_last": 0}, {"keep_every": -1}])
def test_retention_refuses_rules_without_sense(rule: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"=(0|-1): must be 1 or more; leave it out"):
        Retention(**rule)


def test_broken_ones_and_strangers_are_neither_counted_nor_deleted(tmp_path: Path) -> None:
    for step in range(1, 7):
        save({"w": torch.ones(2)}, tmp_path, step=step)
    (tmp_path / "step2" / "index.json").unlink()
    (tmp_path / "step6" / "state-00000.safetensors").unlink()
    (tmp_path / "step0").mkdir()
    (tmp_path / "step0" / "mine.txt").write_text("")
    assert retire(tmp_path, Retention(keep_last=1), protected=3) == [1, 4]
    assert steps(tmp_path) == [0, 2, 3, 5, 6]


def test_keep_everything_is_the_default(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver:
        for step in range(6):
            saver.submit({"w": torch.full((3,), float(step))}, step=step, meta={"tokens": step})
    assert steps(tmp_path) == list(range(6))
    for step in range(6):
        tree, meta = load(tmp_path / f"step{step}")
        assert (tree["w"].tolist(), meta) == ([step] * 3, {"tokens": step})


def test_the_state_may_change_as_soon_as_submit_returns(tmp_path: Path) -> None:
    w = torch.zeros(3_000_000)
    with Saver(tmp_path) as saver:
        for step in (1, 2):
            w.fill_(step)
            saver.submit({"params": {"w": w, "t": w[:4].view(2, 2).T}, "empty": {}}, step=step)
            w.fill_(-1)
        assert saver.wait() == tmp_path / "step2"
        assert saver.wait() is None
    for step in (1, 2):
        tree, _ = load(tmp_path / f"step{step}")
        assert (tree["params"]["w"] == step).all()
        assert tree["params"]["t"].tolist() == [[step, step], [step, step]]
        assert tree["empty"] == {}


def test_the_second_save_allocates_no_second_copy(tmp_path: Path) -> None:
    w = torch.zeros(1000)
    with Saver(tmp_path) as saver:
        saver.submit({"w": w}, step=1)
        first = saver._buffers["w"].data_ptr()
        saver.submit({"w": w}, step=2)
        assert saver._buffers["w"].data_ptr() == first
        saver.submit({"w": w.double()}, step=3)
        assert saver._buffers["w"].dtype == torch.float64


def test_submit_does_not_wait_for_the_disk(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver, locked(tmp_path):
        saver.submit({"w": torch.ones(3)}, step=1)
        time.sleep(0.05)
        assert steps(tmp_path) == [], "the writer is held up, yet submit has returned"
    assert steps(tmp_path) == [1]


def fail_once(saver: Saver, step: int) -> None:
    with file_size_limit(1 << 20):
        saver.submit({"w": torch.ones(1 << 20)}, step=step)
        assert saver._running is not None
        assert isinstance(saver._running.exception(), SaveFailed)


def test_a_failure_is_logged_once_and_raised_unless_made_up_for(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Saver(tmp_path) as saver, caplog.at_level(logging.ERROR):
        fail_once(saver, step=1)
        assert saver.is_done
        assert (saver.settle(), saver.settle(), saver.is_done) == (None, None, False)
        assert [message.startswith("could not save step 1 into") for message in caplog.messages] == [True]
        with pytest.raises(SaveFailed, match="could not save step 1"):
            saver.wait()
        assert saver.wait() is None


def fail_in_a_block(folder: Path, then: Exception | None = None) -> None:
    with Saver(folder) as saver:
        fail_once(saver, step=1)
        if then is not None:
            raise then


def test_leaving_the_block_raises_the_last_error_but_hides_no_other(tmp_path: Path) -> None:
    with pytest.raises(SaveFailed, match="could not save step 1"):
        fail_in_a_block(tmp_path)
    with pytest.raises(KeyError, match="mine"):
        fail_in_a_block(tmp_path, KeyError("mine"))


def test_a_tree_that_cannot_be_stored_is_refused_at_once(tmp_path: Path) -> None:
    with Saver(tmp_path) as saver, pytest.raises(ValueError, match="lr is a float"):
        saver.submit({"lr": 0.1}, step=1)
    assert steps(tmp_path) == []


def test_a_new_saver_sweeps_up_after_a_dead_one(tmp_path: Path) -> None:
    for kind in ("partial", "deleted"):
        left = hidden(tmp_path / "step3", kind)
        left.mkdir()
        (left / "state-00000.safetensors").write_bytes(b"half")
    with Saver(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
