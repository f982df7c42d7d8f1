"""The pool of real processes: results in order, the failing rank named, a new start after a failure."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist

from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing import Pool, RankFailed


def test_one_worker_has_all_tests_on_ranks(request, pool):
    """Or each of xdist's workers would have processes of its own: with pytest 9.2 xdist 3.8 knows no groups."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@ranks")


def total(connection, x):
    """The sum of ``x + rank`` over the ranks, and who did it."""
    value = x + connection.rank
    dist.all_reduce(value)
    return value, os.getpid(), id(connection)


def fail(connection, rank, how):
    if connection.rank == rank:
        if how == "raise":
            raise LookupError("on purpose")
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "crash":
            os.abort()
        if how == "sleep":
            time.sleep(60)
    dist.barrier()


def unpicklable(connection):
    return lambda: None


def test_results_by_rank_and_kept_processes(pool: Pool) -> None:
    first = pool.run(total, torch.tensor([1.0]), ranks=3)
    assert [value.tolist() for value, *_ in first] == [[6.0]] * 3
    assert len({pid for _, pid, _ in first}) == 3
    again = pool.run(total, torch.tensor([1.0]), ranks=3)
    assert [row[1:] for row in again] == [row[1:] for row in first], "processes and connections are kept"
    other = pool.run(total, torch.tensor([1.0]), mesh=Mesh(tp=3))
    assert [row[1] for row in other] == [row[1] for row in first], "another mesh, the same processes"
    assert [value.tolist() for value, *_ in pool.run(total, torch.tensor([1.0]), ranks=2)] == [[3.0]] * 2


STACK = r"no answer from rank 0, 1, 2 within 3 s(.|\n)*rank 1: .*\n  File .*test_pool\.py\", line \d+ in fail"


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("raise", "LookupError: on purpose"),
        ("kill", "exit code -9"),
        ("crash", r"exit code -6\nFatal Python error: Aborted(.|\n)*test_pool\.py\", line \d+ in fail"),
        ("sleep", STACK),
    ],
)
def test_a_failing_rank_is_named_and_the_next_call_works(pool: Pool, how: str, expected: str) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailed, match=expected) as error:
        pool.run(fail, 1, how, ranks=3, timeout=3 if how == "sleep" else 60)
    assert error.value.rank == (0 if how == "sleep" else 1)
    assert time.monotonic() - start < 20
    assert pool.run(total, torch.tensor([0.0]), ranks=3)[2][0] == 3.0


def test_what_cannot_travel_is_an_error(pool: Pool) -> None:
    with pytest.raises(RankFailed, match="local object"):
        pool.run(unpicklable, ranks=2)
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        pool.run(lambda connection: None, ranks=2)


def test_no_more_processes_than_said() -> None:
    with Pool(processes=3) as small:
        pids = [pid for _, pid, _ in small.run(total, torch.tensor([0.0]), ranks=2)]
        small.run(total, torch.tensor([0.0]), ranks=1)
        assert sorted(small.worlds) == [1, 2]
        small.run(total, torch.tensor([0.0]), ranks=3)
        assert sorted(small.worlds) == [3]
        for pid in pids:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_an_impossible_mesh_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--mesh\.dp-shard is 0"), Pool() as pool:
        pool.run(total, torch.tensor([0.0]))


def test_a_pool_left_open_does_not_keep_the_program_from_ending() -> None:
    code = "from olmo_fn.testing.pool import Pool, where\npool = Pool()\nprint(pool.run(where, ranks=2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "[('dp_shard', 0), ('dp_shard', 1)]\n", "")
