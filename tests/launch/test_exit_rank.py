"""How a rank's process ends: never by gloo's threads, with the code and the last words that Python's own end would have."""

import os
import subprocess
import sys

import pytest
from three_ranks import reserved_port

HEAD = "import atexit, sys, threading, time\nfrom olmo_fn.launch.exit_rank import exit_rank\n"


def end(program: str, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", HEAD + program], env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit('no such file')", 1, "no such file\n"),
        ("sys.exit(OSError('full'))", 1, "full\n"),
        ("raise LookupError('on purpose')", 1, "LookupError: on purpose\n"),
        ("raise KeyboardInterrupt", 130, "KeyboardInterrupt\n"),
    ],
)
def test_the_code_is_python_s(last: str, code: int, said: str) -> None:
    found, out, err = end(f"with exit_rank():\n    print('done', end='')\n    {last}\nprint('never')", RANK="0")
    assert (found, out) == (code, "done")
    assert err.endswith(said)
    assert bool(err) == bool(said)


def test_threads_and_exit_handlers_have_their_turn() -> None:
    program = """
atexit.register(print, "handler")
with exit_rank():
    threading.Thread(target=lambda: (time.sleep(0.3), print("thread"))).start()
"""
    assert end(program, RANK="0") == (0, "thread\nhandler\n", "")


def test_a_process_alone_goes_on() -> None:
    code, out, _ = end("with exit_rank():\n    pass\nprint('goes on')")
    assert (code, out) == (0, "goes on\n")


BUSY = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
with exit_rank():
    print("at work")
    for _ in range(500):
        dist.all_reduce(torch.ones(1_000_000), async_op=True)
"""


def test_gloo_s_threads_do_not_abort_it() -> None:
    """The threads still let go of tensors when the program is over; as Python ends it, such a process gets SIGABRT."""
    with reserved_port() as port:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        assert end(BUSY, OMP_NUM_THREADS="1", **alone) == (0, "at work\n", "")
