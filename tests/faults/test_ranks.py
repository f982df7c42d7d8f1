"""What ranks meet, on real ones: processes that do not come, that die or stand still, strangers, variables of earlier jobs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from programs import python
from three_ranks import SIZE, reserved_port, run_ranks
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_fn.core.pipe import clip, ema, grad, pipe, skip_spikes
from olmo_fn.launch import meeting
from olmo_fn.launch.local import PEER_FAILED
from olmo_fn.launch.meeting import meet, patience
from olmo_fn.launch.monitor import monitor
from olmo_fn.launch.place import VARIABLES, Place, place_from_env
from olmo_fn.launch.process import Process, init_process_group, rendezvous
from olmo_fn.mesh.collectives import psum
from olmo_fn.mesh.connect import connect
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, muon, partition
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init

SMALL = dense(16, 2, 4, 24, vocab_size=32)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (*VARIABLES, "OLMO_FN_STATUS", "OLMO_FN_TOKEN", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)


# --- ranks.md, 1: the race in gloo ------------------------------------------------------------------------------------


class Names(TorchDispatchMode):
    """The names of the collectives that are called."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("_c10d_functional", "c10d"):
            self.found.add(func._schema.name.partition("::")[2])
        return func(*args, **(kwargs or {}))


def collectives(connection, optimizer):
    specs = transformer.specs(SMALL)
    matrices = muon(1e-2) if optimizer == "muon" else adamw(1e-2)
    update = partition({"matrix": matrices, "default": adamw(1e-2)}, specs)
    step = pipe(transformer.loss(SMALL), grad(), clip(1.0), update, skip_spikes(6.0), ema(0.9), shard(connection, specs))
    ids = torch.arange(8 * 9).view(8, 9) % 32
    with Names() as names:
        step(step.init(init(specs, 0)), {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
    return names.found


@pytest.mark.parametrize(
    ("mesh", "optimizer"),
    [(Mesh(dp_shard=2), "muon"), (Mesh(tp=2), "adamw"), (Mesh(cp=2), "adamw"), (Mesh(pp=2), "adamw")],
    ids=lambda x: f"ranks-1-{x}" if isinstance(x, Mesh) else x,
)
def test_no_step_calls_the_gather_whose_name_races(pool, mesh, optimizer):
    """By what is called; ``test_no_gather_by_the_name_that_races`` looks at the source."""
    found = set.union(*pool.run(collectives, optimizer, mesh=mesh))
    assert found, "the mode sees them"
    assert not {name for name in found if name == "all_gather_into_tensor" or name.endswith("_coalesced")}


# --- ranks.md, 2: ranks that stand still ------------------------------------------------------------------------------


def stop(process: Process, rank: int) -> None:
    """``rank`` is stopped after step 3, and let go on long after the others gave it up."""
    with monitor(process, stall_seconds=1.0, stall_timeout=3.0) as step_done:
        init_process_group(process)
        axis = connect(Mesh(dp_shard=SIZE)).axes.world
        for step in range(1, 9):
            if process.rank == rank and step == 4:
                subprocess.Popen(["sh", "-c", f"sleep 9; kill -CONT {os.getpid()}"])
                os.kill(os.getpid(), signal.SIGSTOP)
            psum(torch.ones(3), axis)
            step_done(step)


def stop_1(process: Process) -> None:
    stop(process, 1)


def stop_0(process: Process) -> None:
    stop(process, 0)


@pytest.mark.parametrize(("program", "rank", "teller"), [(stop_1, 1, 0), (stop_0, 0, 1)], ids=["ranks-2", "ranks-2-rank-0"])
def test_a_rank_that_stands_still_is_named_and_then_ends_the_job(tmp_path, program, rank, teller):
    codes, said, _ = run_ranks(tmp_path, program)
    assert codes == [PEER_FAILED] * SIZE
    assert said[teller].startswith(f"rank {rank} has been at step 3 for ")
    for other in {0, 1, 2} - {rank}:
        assert f"rank {rank} failed after step 3:\nit stood still for " in said[other]
        assert said[other].count("the others wait for it") == (other == teller)


# --- reliability.md, 16: a rank dies before the others have met it ----------------------------------------------------


def dies_early(process: None) -> None:
    """Rank 1 comes and is killed; rank 2 comes seconds later."""
    rank = int(os.environ["RANK"])
    if rank == 1:
        os.system(f"(sleep 2; kill -9 {os.getpid()}; touch failed) &")
    if rank == 2:
        time.sleep(4)
    process = rendezvous()
    with monitor(process):
        init_process_group(process)


def test_reliability_16_a_rank_that_dies_before_the_last_has_come_ends_the_job(tmp_path):
    codes, said, seconds = run_ranks(tmp_path, dies_early, before_meeting=True)
    assert codes == [PEER_FAILED, -signal.SIGKILL, PEER_FAILED]
    assert seconds < 20
    assert said[0] == said[2] == "rank 1 failed after step 0:\nit died: its connection was closed\n"


def test_reliability_16_under_the_launcher_before_torch_is_there(tmp_path):
    """The launcher looks at the processes themselves."""
    program = tmp_path / "program.py"
    program.write_text("import os, time\nos.kill(os.getpid(), 9) if os.environ['RANK'] == '1' else time.sleep(99)")
    launch = f"import sys; from olmo_fn.launch.local import launch; sys.exit(launch(['{program}'], 3))"
    done = subprocess.run([sys.executable, "-c", launch], capture_output=True, text=True, timeout=60)
    assert done.returncode == 137
    assert done.stderr == "rank 1 failed: killed by SIGKILL, as a system does when memory runs out\n"


def test_ranks_2_the_launcher_passes_on_what_other_ranks_say(tmp_path):
    """Rank 0 may be the one that stands still; what ended the others is said once."""
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys, time\nfrom pathlib import Path\nstatus = Path(os.environ['OLMO_FN_STATUS'])\n"
        "if os.environ['RANK'] == '0':\n    time.sleep(99)\n"
        "if os.environ['RANK'] == '1':\n    (status / 'said').write_text('rank 0 has been\\n')\n    time.sleep(0.5)\n"
        "    (status / 'failure').write_text('rank 0 failed')\nelse:\n    time.sleep(1)\nsys.exit(75)"
    )
    launch = f"import sys; from olmo_fn.launch.local import launch; sys.exit(launch(['{program}'], 3))"
    done = subprocess.run([sys.executable, "-c", launch], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (PEER_FAILED, "rank 0 has been\nrank 0 failed\n")


# --- reports.md, 45: variables of an earlier job, and other programs that start processes ------------------------------

JOB = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
REFUSED = {
    "reports-45-rank": (JOB | {"RANK": "3"}, r"RANK must be .* from 0 to 1; the environment has RANK='3', WORLD_SIZE='2'"),
    "reports-45-no-number": (JOB | {"RANK": "x"}, "RANK must be a whole number .*unset RANK to run alone"),
    "reports-45-world": (JOB | {"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
    "world-0": (JOB | {"WORLD_SIZE": "0"}, "WORLD_SIZE must be a whole number"),
    "reports-45-port": (JOB | {"MASTER_PORT": "abc"}, "MASTER_PORT must be a whole number from 1 to 65535"),
    "port-65536": (JOB | {"MASTER_PORT": "65536"}, "MASTER_PORT must be"),
    "reports-45-local": (JOB | {"LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE must be a whole number"),
    "reports-45-local-0": (JOB | {"LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE must be a whole number from 1 to 2"),
    "local-rank": (JOB | {"LOCAL_RANK": "2"}, "LOCAL_RANK must be a whole number from 0 to 1"),
    "many-digits": (JOB | {"RANK": "9" * 5000}, r"RANK='9{40}', WORLD_SIZE"),
    "rank-alone": ({"RANK": "0"}, "RANK is set, but WORLD_SIZE, MASTER_ADDR, MASTER_PORT is not"),
    "srun": ({"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, "one of 2 processes .*--nproc 2"),
    "srun-1": ({"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, "SLURM_NTASKS=2: this is one of 2 processes"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "4"}, "OMPI_COMM_WORLD_SIZE=4: this is one of 4 .*`torchrun …`, or here --nproc 4"),
}


@pytest.mark.parametrize(("environment", "message"), REFUSED.values(), ids=REFUSED)
def test_an_environment_that_cannot_be_is_refused_by_name(monkeypatch, environment, message):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message) as error:
        place_from_env()
    assert "\n" not in str(error.value)


def test_what_is_no_job_is_left_alone(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "0")
    assert place_from_env() is None
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    assert place_from_env() is None, "a batch script's own process"
    assert capsys.readouterr().err == ""
    assert rendezvous() == Process()
    assert capsys.readouterr().err.startswith("SLURM_NTASKS=8, but this process trains alone; ")


def test_reports_45_nproc_beside_rank_is_refused(monkeypatch, tmp_path):
    for name, value in JOB.items():
        monkeypatch.setenv(name, value)
    from olmo_fn.cli.main import main

    assert main(["train", "olmo2-tiny", "--nproc", "2", "--run.folder", str(tmp_path / "r")]) == 2
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("rank", "who"),
    [("0", "1 of 2 processes (WORLD_SIZE=2)"), ("1", "process 0 of 2 (RANK=1) (WORLD_SIZE=2)")],
    ids=["reports-45-rank-0", "reports-45-rank-1"],
)
def test_who_is_waited_for_is_said_and_not_for_ever(monkeypatch, capsys, rank, who):
    with reserved_port() as port:
        for name, value in (JOB | {"RANK": rank, "MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        quick, begun = time.monotonic, time.monotonic()
        monkeypatch.setattr(meeting.time, "monotonic", lambda: begun + 40 * (quick() - begun))  # ten seconds are a quarter
        with pytest.raises(TimeoutError, match=r"waited \d+ s for .* \(--run.stall-timeout\); unset RANK to run alone$"):
            rendezvous(timeout=20.0)
    assert capsys.readouterr().err == f"waiting for {who} at 127.0.0.1:{port}; unset RANK to run alone\n"


# --- reliability.md, security -----------------------------------------------------------------------------------------


def call(port: int, *answer: bytes) -> Connection:
    stranger = Connection(socket.create_connection(("127.0.0.1", port)).detach())
    for part in answer:
        stranger.send_bytes(part)
    return stranger


def signed(port: int, rank: bytes, key: bytes = b"key") -> Connection:
    stranger = Connection(socket.create_connection(("127.0.0.1", port)).detach())
    stranger.send_bytes(rank + b" " + meeting._proof(key, stranger.recv_bytes(), rank))
    return stranger


STRANGERS = {
    "security-silent": lambda port: call(port),
    "security-no-text": lambda port: call(port, b"\xff" * 41),
    "security-nothing": lambda port: call(port, b""),
    "security-huge": lambda port: call(port, b"x" * 100_000),
    "security-wrong-key": lambda port: signed(port, b"1", b"guess"),
    "security-rank-5": lambda port: signed(port, b"-5"),
    "security-rank-0": lambda port: signed(port, b"0"),
    "security-rank-2": lambda port: signed(port, b"2"),
    "security-no-rank": lambda port: signed(port, b"\xff"),
    "security-half-a-frame": lambda port: os.write((peer := call(port)).fileno(), b"\0\0\0\x20only") and peer,
}


@pytest.mark.parametrize("stranger", STRANGERS.values(), ids=STRANGERS)
def test_a_stranger_neither_stops_the_meeting_nor_is_let_in(monkeypatch, stranger):
    monkeypatch.setenv("OLMO_FN_TOKEN", "key")
    store, places = dist.HashStore(), [Place(rank, 2, rank, 2, "127.0.0.1", 1) for rank in range(2)]
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(meet, places[0], store, lambda missing: None)
        port, _, shared = store.get("monitor").decode().partition(" ")
        assert shared == "", "the token is not told to whoever reads the store"
        with suppress(OSError):  # it may be hung up on at once
            peers = [stranger(int(port)) for _ in range(3)]
        begun = time.monotonic()
        second = threads.submit(meet, places[1], store, lambda missing: None)
        (name, ours), (same, theirs) = first.result(20), second.result(20)
    assert name == same
    assert list(ours.values()) == [1]
    assert list(theirs.values()) == [0]
    assert time.monotonic() - begun < 10
    next(iter(theirs)).send_bytes(b"it is I")
    assert next(iter(ours)).recv_bytes() == b"it is I"
    del peers


def test_security_each_rank_is_taken_once(monkeypatch):
    monkeypatch.setenv("OLMO_FN_TOKEN", "key")
    store = dist.HashStore()
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(meet, Place(0, 3, 0, 3, "127.0.0.1", 1), store, lambda missing: None)
        port = int(store.get("monitor").decode())
        one = signed(port, b"1")
        time.sleep(0.3)
        again = signed(port, b"1")
        with pytest.raises(EOFError):
            again.recv_bytes()
        two = signed(port, b"2")
        name, peers = first.result(20)
    assert sorted(peers.values()) == [1, 2]
    assert one.recv_bytes() == two.recv_bytes() == name.encode()


def listening() -> set[str]:
    """The addresses at which this process listens, as the kernel writes them."""
    own = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.islink(f"/proc/self/fd/{fd}")}
    rows = [row.split() for kind in ("tcp", "tcp6") for row in Path(f"/proc/self/net/{kind}").read_text().splitlines()[1:]]
    return {row[1].partition(":")[0] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own}


def where(process: Process) -> None:
    with monitor(process):
        init_process_group(process)
        connect(Mesh(dp_shard=SIZE))
        psum(torch.ones(3), connect(Mesh(dp_shard=SIZE)).axes.world)
        print(*listening(), file=sys.stderr)


@pytest.mark.skipif(not Path("/proc/self/net/tcp").exists(), reason="Linux says it in /proc")
def test_security_on_one_machine_only_the_loopback_is_listened_at(tmp_path):
    codes, said, _ = run_ranks(tmp_path, where)
    assert codes == [0] * SIZE
    assert set("".join(said).split()) == {"0100007F"}


def test_security_the_store_of_the_launcher_is_a_file_that_nobody_else_reads(monkeypatch, tmp_path):
    monkeypatch.setenv("OLMO_FN_STATUS", str(tmp_path))
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, JOB[name])
    from olmo_fn.launch.process import _store

    place = place_from_env()
    assert place is not None
    assert place.one_machine
    store = _store(place, patience(place, 1.0), 1.0)
    store.set("a", "b")
    assert isinstance(store, dist.FileStore)
    assert (tmp_path / "store").exists()


def test_two_processes_by_nproc_from_the_command_line(tmp_path):
    """All of it once: the meeting, a run, and no socket's address or token in the run's folder."""
    (tmp_path / "tokens.npy").write_bytes(bytes(range(1, 60)) * 20)
    flags = {
        "data.paths": tmp_path / "tokens.npy", "data.dtype": "uint8", "data.heldout-fraction": 0, "model.d-model": 16,
        "model.n-layers": 1, "model.n-heads": 2, "model.hidden-size": 32, "model.vocab-size": 64, "recipe.batch-size": 4,
        "recipe.sequence-length": 16, "run.steps": 3, "schedule.warmup": 1, "run.folder": tmp_path / "run", "run.threads": 1,
        "nproc": 2,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    done = python("train.py", "olmo2-tiny", *words, "--recipe.no-compile", "--run.sample=")
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout
    assert (tmp_path / "run" / "logs" / "rank1.log").read_text() == ""
