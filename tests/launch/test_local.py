"""Several processes by one command: output, signals, and a rank that fails ends the others and is named."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

LAUNCH = "import sys; from pathlib import Path; from olmo_fn.launch.local import launch; "
LAUNCH += "sys.exit(launch(sys.argv[2:], 3, Path(sys.argv[1])))"
HEAD = "import os, signal, sys, time\nfrom pathlib import Path\nrank = int(os.environ['RANK'])\n"


def start(tmp_path: Path, program: str) -> subprocess.Popen[str]:
    script = tmp_path / "program.py"
    script.write_text(HEAD + textwrap.dedent(program))
    command = [sys.executable, "-c", LAUNCH, str(tmp_path / "run"), str(script), "argument"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(tmp_path: Path, program: str) -> tuple[int, str, str]:
    process = start(tmp_path, program)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def test_output_of_rank_0_goes_through_and_the_rest_into_the_run_folder(tmp_path: Path) -> None:
    code, out, err = run(
        tmp_path,
        """
        print(sys.argv[1:], [os.environ[n] for n in ("RANK", "LOCAL_RANK", "WORLD_SIZE")], flush=True)
        run = Path(sys.argv[0]).parent / "run"
        if rank == 0:
            run.mkdir()
            (run / "config.yaml").touch()
        while not (run / "logs").exists():
            time.sleep(0.01)
        print("end")
        """,
    )
    assert (code, err) == (0, "")
    assert out == "['argument'] ['0', '0', '3']\nend\n"
    logs = sorted((tmp_path / "run" / "logs").iterdir())
    assert [log.name for log in logs] == ["rank1.log", "rank2.log"]
    assert logs[1].read_text() == "['argument'] ['2', '2', '3']\nend\n"


@pytest.mark.parametrize(
    ("failure", "code", "expected"),
    [
        (
            "raise LookupError('oh')",
            1,
            r"^rank 1 failed: exit code 1\nsecond 1\nTraceback (.|\n)*LookupError: oh\n$",
        ),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            137,
            r"^rank 1 failed: killed by SIGKILL, .* when memory runs out\nsecond 1\n$",
        ),
        ("sys.exit(2)", 2, r"^rank 1 failed: exit code 2\nsecond 1\n$"),
    ],
)
def test_a_rank_that_fails_ends_the_others(tmp_path: Path, failure: str, code: int, expected: str) -> None:
    program = f"""
    print("second", rank, flush=True)
    if rank == 1:
        {failure}
    time.sleep(600)
    """
    begun = time.monotonic()
    found, _, err = run(tmp_path, program)
    assert time.monotonic() - begun < 30
    assert found == code
    assert re.search(expected, err), err


def test_wrong_input_is_said_once(tmp_path: Path) -> None:
    code, _, err = run(tmp_path, "time.sleep(600 * rank); print('error: no such flag', file=sys.stderr); sys.exit(2)")
    assert (code, err) == (2, "error: no such flag\n")
    program = "time.sleep(0.3 * (rank == 0)); print('error: no such flag', file=sys.stderr); sys.exit(2)"
    code, _, err = run(tmp_path, program)
    assert (code, err) == (2, "error: no such flag\n"), "another rank came first"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_every_rank_once(tmp_path: Path, number: signal.Signals) -> None:
    process = start(
        tmp_path,
        """
        caught = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: caught.append(number))
        Path(sys.argv[0]).with_name(f"ready{rank}").touch()
        while not caught:
            time.sleep(0.01)
        time.sleep(0.1 * rank)
        Path(sys.argv[0]).with_name(f"caught{rank}").write_text(str(caught))
        sys.exit(128 + caught[0])
        """,
    )
    while len(list(tmp_path.glob("ready*"))) < 3:
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (128 + number, "")
    assert [(tmp_path / f"caught{rank}").read_text() for rank in range(3)] == [f"[{number.value}]"] * 3


def test_no_rank_outlives_an_interrupted_launch(tmp_path: Path) -> None:
    """A signal that the ranks do not heed ends them all."""
    process = start(tmp_path, "Path(sys.argv[0]).with_name(f'pid{rank}').write_text(str(os.getpid())); time.sleep(600)")
    while len([path for path in tmp_path.glob("pid*") if path.read_text()]) < 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    for rank in range(3):
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / f"pid{rank}").read_text()), 0)


def test_the_whole_with_collectives(tmp_path: Path) -> None:
    """A rank is killed while the others wait for it in a collective: one block names it and its last step."""
    code, out, err = run(
        tmp_path,
        """
        import torch, torch.distributed as dist
        from olmo_fn.launch.process import agree, code_hash, init_process_group, rendezvous
        from olmo_fn.launch.monitor import monitor
        process = rendezvous()
        with monitor(process) as step_done:
            agree(code_hash(), "code", process)
            init_process_group(process)
            for step in range(1, 1000):
                x = torch.ones(3)
                dist.all_reduce(x)
                assert x.tolist() == [3.0] * 3
                if rank == 2 and step == 5:
                    os.kill(os.getpid(), signal.SIGKILL)
                step_done(step)
        """,
    )
    assert (code, out) == (137, "")
    assert err == "rank 2 failed after step 4: killed by SIGKILL, as a system does when memory runs out\n"


def test_the_ranks_of_a_killed_launch_stop_in_order(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        """
        from olmo_fn.launch.process import rendezvous
        from olmo_fn.launch.monitor import monitor
        caught = []
        signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
        with monitor(rendezvous()) as step_done:
            Path(sys.argv[0]).with_name(f"ready{rank}").touch()
            while not caught:
                time.sleep(0.01)
        Path(sys.argv[0]).with_name(f"saved{rank}").touch()
        """,
    )
    while len(list(tmp_path.glob("ready*"))) < 3:
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)  # until the last rank has closed its output
    end = time.monotonic() + 30
    while len(list(tmp_path.glob("saved*"))) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert len(list(tmp_path.glob("saved*"))) == 3


PROGRAM = """
import torch, torch.distributed as dist
from olmo_fn.launch.exit_rank import exit_rank
from olmo_fn.launch.process import init_process_group, rendezvous
from olmo_fn.launch.monitor import monitor
process = rendezvous()
saved = Path(sys.argv[1])
first = int(saved.read_text()) if saved.exists() else 0
torchruns = next(dist.rendezvous("env://"))[0]  # a second connection to the store of torchrun's agent
assert torchruns.check(["of the first start"]) == (first > 0), "torchrun gives restarted ranks the store of the dead"
assert not process.store.check(["of the first start"]), "the job's part of it is new"
with exit_rank(), monitor(process) as step_done:
    init_process_group(process)
    for step in range(first + 1, 11):
        if rank == 1 and step == 5 and first == 0:
            torchruns.set("of the first start", "")
            process.store.set("of the first start", "")
            raise LookupError("on purpose")
        dist.all_reduce(torch.ones(3))
        step_done(step)
        if rank == 0:
            saved.write_text(str(step))
    print("done from", first)
"""


@pytest.mark.slow
def test_torchrun_restarts(tmp_path: Path) -> None:
    """Under torchrun the surviving rank says what happened, ends at once, and the restart goes on, with the store of before."""
    script = tmp_path / "program.py"
    script.write_text(HEAD + PROGRAM)
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=2"]  # or it kills rank 0 first
    command = [sys.executable, "-m", "torch.distributed.run", *options, str(script), str(tmp_path / "saved")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done from 4\ndone from 4\n"
    assert re.search(r"rank 1 failed after step 4:\nTraceback (.|\n)*LookupError: on purpose\n", done.stderr)
