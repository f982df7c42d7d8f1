"""What a run finds around it: no home, caches that cannot or must not be used, compilers that do not work, signals to all."""

from __future__ import annotations

import fcntl
import os
import re
import signal
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch._inductor import config, cpp_builder

from olmo_fn.core.compile import _deafen_compilers, compile, has_compiler, prepare_cache
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.step import Step
from olmo_fn.data.settings import Data, cache_dir
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.loop import train
from olmo_fn.train.schedules import Constant


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    """Inductor's folder is put back after each test."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.delenv("OLMO_FN_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/someone")


# --- where the cache is -----------------------------------------------------------------------------------------------

TEMPORARY = str(Path(tempfile.gettempdir(), f"olmo_fn-{os.getuid()}"))
PLACES = {
    "reports-40-xdg": ({"XDG_CACHE_HOME": "/x/cache"}, "", "/x/cache/olmo_fn"),
    "xdg-relative": ({"XDG_CACHE_HOME": "cache"}, "", "/home/someone/.cache/olmo_fn"),  # the standard says: ignore it
    "own-before-xdg": ({"XDG_CACHE_HOME": "/x", "OLMO_FN_CACHE": "~/c"}, "", "/home/someone/c"),
    "flag-before-all": ({"XDG_CACHE_HOME": "/x", "OLMO_FN_CACHE": "/y"}, "~/flag", "/home/someone/flag"),
    "reports-39-no-home": ({"HOME": None}, "", TEMPORARY),
    "no-home-but-xdg": ({"HOME": None, "XDG_CACHE_HOME": "/x"}, "", "/x/olmo_fn"),
}


@pytest.mark.parametrize(("environment", "flag", "expected"), PLACES.values(), ids=PLACES)
def test_the_cache_has_a_place(monkeypatch, environment, flag, expected):
    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name, value in environment.items():
        monkeypatch.delenv(name) if value is None else monkeypatch.setenv(name, value)
    assert str(cache_dir(Data(cache_dir=flag))) == expected


# --- who can write there ----------------------------------------------------------------------------------------------


def modes(folder: Path, own: int, parent: int) -> Path:
    folder.mkdir(parents=True)
    folder.chmod(own)
    folder.parent.chmod(parent)
    return folder


def of_group(folder: Path) -> Path:
    os.chown(modes(folder, 0o775, 0o755), -1, 12345)
    return folder


def of_another(folder: Path) -> Path:
    os.chown(modes(folder, 0o755, 0o755), 12345, -1)
    return folder


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
BAD = {
    "security-all-can-write": (lambda f: modes(f, 0o777, 0o755), "others can write in .*compiled"),
    "security-all-can-write-around-it": (lambda f: modes(f, 0o755, 0o777), "others can write in .*cache"),
    "security-sticky-is-not-enough": (lambda f: modes(f, 0o1777, 0o755), "others can write"),
    "reports-40-nowhere": (lambda f: Path("/proc/nowhere/compiled"), "/proc/nowhere/compiled cannot be written"),
    "below-a-file": (lambda f: (f.parent.write_text("") and f) or f, "cannot be written .File exists"),
}
GOOD = {
    "new": lambda f: f,
    "in-a-sticky-folder": lambda f: modes(f, 0o755, 0o1777),
    "group-reads": lambda f: modes(f, 0o750, 0o755),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_a_cache_that_others_can_write_or_nobody_can_is_not_used(tmp_path, make, message):
    folder = make(tmp_path / "cache" / "compiled")
    with pytest.warns(UserWarning, match=f"{message}.*: code is compiled anew; another --data.cache-dir can keep it"):
        prepare_cache(folder)
    used = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert used not in (folder, folder.parent)
    assert stat.S_IMODE(used.stat().st_mode) == 0o700


@ROOT_ONLY
@pytest.mark.parametrize("make", [of_group, of_another], ids=["security-group-can-write", "security-of-another-user"])
def test_a_cache_of_others_is_not_used(tmp_path, make):
    with pytest.warns(UserWarning, match="others can write in"):
        prepare_cache(make(tmp_path / "cache" / "compiled"))


@pytest.mark.parametrize("make", GOOD.values(), ids=GOOD)
def test_a_cache_of_one_s_own_is_used(tmp_path, make):
    folder = make(tmp_path / "cache" / "compiled")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_cache(folder)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(folder)
    assert not folder.stat().st_mode & 0o022


# --- two at a time ----------------------------------------------------------------------------------------------------


def test_reliability_9_nothing_is_dropped_while_another_run_compiles(tmp_path):
    """The half-written library of one that lives is left alone; of one that was killed it goes at the next start."""
    folder = tmp_path / "compiled"
    alive = f"from pathlib import Path; from olmo_fn.core.compile import prepare_cache; prepare_cache(Path({str(folder)!r}))"
    other = subprocess.Popen([sys.executable, "-c", f"{alive}; print(1, flush=True); input()"], stdin=-1, stdout=-1)
    other.stdout.readline()
    (folder / "half.so").write_bytes(b"")
    assert prepare_cache(folder) == []
    other.kill()
    other.communicate()
    mine = os.open(folder / ".lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(mine, fcntl.LOCK_EX | fcntl.LOCK_NB)  # this process has it, until it ends
    os.close(mine)
    after = subprocess.run([sys.executable, "-c", f"{alive}; print('still there')"], capture_output=True, text=True)
    assert after.returncode == 0
    assert (folder / "half.so").exists(), "this process lives"


def test_reliability_9_a_file_that_goes_meanwhile_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "c").mkdir(mode=0o700)
    (tmp_path / "c" / "gone.so").write_bytes(b"")
    plain = Path.is_file

    def is_file(path):
        found = plain(path)
        path.unlink()
        return found

    monkeypatch.setattr(Path, "is_file", is_file)
    assert prepare_cache(tmp_path / "c") == []


# --- compilers that do not work ---------------------------------------------------------------------------------------


def one_step(step: Step) -> float:
    """The loss after an update, whose kernels are compiled if anything is."""
    state = step.init({"w": torch.linspace(0.0, 1.0, 40)})
    for _ in range(2):
        state, metrics = step(state, {"x": torch.ones(4, 1), "labels": torch.zeros(4, 1, dtype=torch.int64)})
    return float(metrics["loss"])


def recipe(*more) -> Step:
    def loss(params, batch):
        return ((params["w"] - 0.3) ** 2).sum() * batch["x"].sum(), {}

    return pipe(loss, grad("func"), adamw(1e-2), *more)


NO_HEADER = """#!/bin/sh
case "$*" in *--version*) exec g++ "$@";; esac
seq 1000; echo 'x.cpp:1:10: fatal error: Python.h: No'; exit 1
"""
NO_LIBRARY = """#!/bin/sh
case "$*" in *--version*) exec g++ "$@";; esac
while [ $# -gt 0 ]; do [ "$1" = -o ] && echo no library > "$2"; shift; done
"""
BROKEN = {
    "reports-43-python-h": (NO_HEADER, r"cannot compile \(x.cpp:1:10: fatal error: Python.h: No\): running eager"),
    "reports-41-cannot-be-loaded": (NO_LIBRARY, r"cannot compile \(\w+Error: .*\.so: .*\): running eager"),
}


@pytest.mark.skipif(not has_compiler(), reason="there is no compiler to look like")
@pytest.mark.parametrize(("script", "message"), BROKEN.values(), ids=BROKEN)
def test_a_compiler_that_does_not_work_costs_one_warning(tmp_path, script, message):
    compiler = tmp_path / "g++"
    compiler.write_text(script)
    compiler.chmod(0o755)
    step = recipe(compile(tmp_path / "compiled"))
    with config.patch({"cpp.cxx": (None, str(compiler))}), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cpp_builder.cpp_compiler_search.cache_clear()
        found = one_step(step)
    cpp_builder.cpp_compiler_search.cache_clear()
    told = [str(warning.message) for warning in said if "cannot compile" in str(warning.message)]
    assert len(told) == 1
    assert told[0].count("\n") == 0
    assert re.match(message, told[0]), told
    assert found == one_step(recipe())


@pytest.mark.parametrize(
    ("cxx", "message"),
    [("ccache g++", r"\$CXX is 'ccache g\+\+', which is no program: running eager"), ("/no/such", "which is no program")],
    ids=["reports-43-ccache", "reports-43-not-there"],
)
def test_a_compiler_that_is_none_is_said(monkeypatch, cxx, message):
    monkeypatch.setenv("CXX", cxx)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.warns(UserWarning, match=message):
        recipe(compile())


def test_reliability_34_compilers_do_not_hear_the_signals_of_the_job(tmp_path):
    """What starts them keeps SIGINT, SIGTERM and SIGHUP from them; this process goes on hearing them."""
    _deafen_compilers()
    cpp_builder.run_compile_cmd("sh -c 'kill -INT $$; kill -TERM $$; kill -HUP $$; echo whole > library'", str(tmp_path))
    assert (tmp_path / "library").read_text() == "whole\n"
    with pytest.raises(Exception, match="no such file"):
        cpp_builder.run_compile_cmd("sh -c 'echo no such file; exit 1'", str(tmp_path))
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def test_reports_40_a_run_that_does_not_compile_has_no_compile_cache(tmp_path, capsys):
    np.random.default_rng(0).integers(1, 64, 2_000, dtype=np.uint8).tofile(tmp_path / "tokens.npy")
    data = Data((str(tmp_path / "tokens.npy"),), dtype="uint8", heldout_fraction=0, cache_dir="/proc/nowhere")
    run, recipe = Run(str(tmp_path / "run"), steps=1, threads=1, sample="", device="cpu"), Recipe(4, 16, compile=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cfg = Config(dense(8, 1, 2, 12, vocab_size=64), data, schedule=Constant(warmup=0), recipe=recipe, run=run)
        assert train(cfg).step == 1
    assert capsys.readouterr().err == ""
