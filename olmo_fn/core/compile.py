"""Compilation: small fused functions between matrix products, kept on disk in a folder of the project's own.

A process killed in the middle of a compile leaves empty or cut-off libraries in that folder, which would break every
later run that needs them; `prepare_cache` drops them.
"""

from __future__ import annotations

import atexit
import fcntl
import grp
import os
import pwd
import shutil
import signal
import stat
import struct
import sys
import sysconfig
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.chain import bind
from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.kernels import Function


def compile(folder: Path | None = None) -> Transform:
    """Compile what is between matrix products, and every update; invisible but for speed. Where no C++ compiler is, or it does
    not work: a warning, eager.

    Alike blocks share their compiled functions. Updates that are elementwise see each parameter flattened, so that one
    compiled function serves all shapes. They are kept in ``folder``, see `prepare_cache`.
    """

    def apply(step: Step) -> Step:
        if lack := lacking():
            warnings.warn(f"{lack}: running eager, which is slower", stacklevel=2)
            return step
        own = partial(torch.compile, fullgraph=True, backend=_inductor_or_eager(folder), **isolated())
        fuse = cache(lambda fn, *constants: own(bind(fn, *constants), dynamic=False))
        if torch.cuda.is_available():
            kernel = cache(lambda fn: _of_plain_tensors(_by_device(own(fn, dynamic=True), own(fn))))
        else:
            kernel = cache(lambda fn: _of_plain_tensors(own(fn, dynamic=True)))
        return with_execution(step, fuse=fuse, kernel=kernel)

    return Transform("compile()", Step, Step, apply)


def _by_device(any_size: Function, usual_size: Function) -> Function:
    """The second for rows on a GPU, whose loads are of 2 bytes and not 16 where the length of a row is not known."""

    def call(*args: Any) -> Any:
        rows = isinstance(args[0], Tensor) and args[0].is_cuda and args[0].ndim > 1
        return (usual_size if rows else any_size)(*args)

    return call


CUDA_OPTIONS = {"score_fusion_memory_threshold": 256, "triton.mix_order_reduction_non_strict_mode": True}
"""For a GPU. What shares a few numbers (256 bytes) and nothing else stays apart: the updates of eight parameters, which share
their scalars, would become one kernel that keeps all eight in registers, 255 of them, and 584 bytes a thread of memory besides
(for sm_90). A norm's backward is one pass, whose sums over rows and over columns are of what is read once; left to itself,
Inductor does that only where there are twice as many rows as columns.
"""


def _inductor_or_eager(folder: Path | None) -> Callable[..., Any]:
    """A backend of ``torch.compile``: Inductor; from its first failure on, which a warning tells, none."""
    failed = False
    prepare = cache(prepare_cache)

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal failed
        if failed:
            return graph.forward
        if folder:
            prepare(folder)  # before the import: Inductor looks for its folder but once
        from torch._inductor.compile_fx import compile_fx
        from torch._inductor.exc import InductorError

        _deafen_compilers()
        try:
            return compile_fx(graph, inputs, config_patches=_options(inputs))
        except InductorError as error:
            failed = True
            warnings.warn(f"cannot compile ({_reason(error)}): running eager, which is slower", stacklevel=2)
            return graph.forward

    return backend


def _reason(error: Exception) -> str:
    """The line that says what is wrong, of up to a thousand."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error: " in line), lines[0])[:200]


@cache
def _deafen_compilers() -> None:
    """Keep from Inductor's compilers the signals that a terminal or a batch system sends to all processes of a job, and which
    this one answers by saving its state. A process inherits the mask of the thread that starts it.
    """
    from torch._inductor import cpp_builder

    run, signals = cpp_builder._run_compile_cmd, {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

    def deaf(cmd_line: str, cwd: str) -> None:
        thread = ThreadPoolExecutor(1, initializer=signal.pthread_sigmask, initargs=(signal.SIG_BLOCK, signals))
        thread.submit(run, cmd_line, cwd).result()

    cpp_builder._run_compile_cmd = deaf  # torch 2.13: all compilers start there


def _options(inputs: list[Any]) -> dict[str, Any]:
    """Where torch's own kernels use wide vectors Inductor's can: its trials, four seconds of a first start, are left out."""
    if any(isinstance(x, Tensor) and x.device.type == "cuda" for x in inputs):
        return CUDA_OPTIONS
    return {"cpp.vec_isa_ok": True} if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else {}


def _of_plain_tensors(fn: Function) -> Function:
    """``fn`` of tensors that are no views: Dynamo guards on what a view is of, and would compile again for each."""
    return lambda *args: fn(*map(_plain, args))


def _plain(x: Any) -> Any:
    """Tensors, and those in dicts and lists, which is all that kernels take: a tenth of what ``torch.utils._pytree`` costs."""
    if isinstance(x, Tensor):
        return x.data
    if isinstance(x, dict):
        return {name: _plain(y) for name, y in x.items()}
    return [_plain(y) for y in x] if isinstance(x, list) else x


def isolated() -> dict[str, bool]:
    """The option of ``torch.compile`` by which closures of the same code do not share Dynamo's limit of eight compilations;
    before torch 2.13, which has none, that limit is raised.
    """
    if "isolate_recompiles" in signature(torch.compile).parameters:
        return {"isolate_recompiles": True}
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    return {}


def has_compiler() -> bool:
    """Whether Inductor will find all that it compiles with."""
    return not lacking()


def lacking() -> str:
    """What Inductor will not find, in words: a C++ compiler; or on a GPU what Triton builds the callers of its kernels with, a
    C compiler and Python's headers. Empty if all is there.
    """
    if torch.cuda.is_available():
        name, usual, kind = "CC", ["gcc", "clang"], "C"
    else:
        name, usual, kind = "CXX", ["clang++" if sys.platform == "darwin" else "g++"], "C++"
    if not any(map(shutil.which, [given] if (given := os.environ.get(name)) else usual)):
        return f"${name} is {given!r}, which is no program" if given else f"no {kind} compiler found"
    header = Path(sysconfig.get_path("include"), "Python.h")
    if kind == "C" and not header.is_file():
        return f"{header} is not there, which Triton compiles with (apt install python3-dev)"
    return ""


def prepare_cache(folder: Path) -> list[Path]:
    """Make Inductor keep its files in ``folder``, and drop those that a killed compile left broken, which are returned.

    Nothing is dropped while another process that called this lives. Where nobody can write, or others can (what is kept there
    is run), a warning, and a temporary folder instead.
    """
    if problem := _problem(folder):
        temporary = Path(tempfile.mkdtemp(prefix="olmo_fn-compiled-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        warnings.warn(f"{folder} {problem}: code is compiled anew; another --data.cache-dir can keep it", stacklevel=2)
        folder = temporary
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o600)  # until the process ends
    broken: list[Path] = []
    with suppress(OSError):  # another process is at work there, or its file system has no locks
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        broken = [path for path in folder.rglob("*") if path.is_file() and not _whole(path)]
        for path in broken:
            path.unlink(missing_ok=True)
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_SH)
    return broken


def _problem(folder: Path) -> str:
    """Why code must not, or cannot, be kept in ``folder``, which is made if it is not there; empty if it can."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        os.utime(folder)
        for place, sticky in ((folder, 0), (folder.parent, stat.S_ISVTX)):
            if _others_can_write(place.stat(), sticky):
                return f"is not used, for others can write in {place} (chmod go-w {place})"
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def _others_can_write(found: os.stat_result, sticky: int) -> bool:
    """Whether other users can. A group of the user's own name is the user."""
    others = stat.S_IWOTH | stat.S_IWGRP
    with suppress(KeyError):
        if grp.getgrgid(found.st_gid).gr_name == pwd.getpwuid(os.geteuid()).pw_name:
            others = stat.S_IWOTH
    return found.st_uid not in (0, os.geteuid()) or bool(found.st_mode & others and not found.st_mode & sticky)


def _whole(path: Path) -> bool:
    """False for an empty file, and for an ELF library that ends before its section table does."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:  # gone meanwhile
        return True
    if path.suffix == ".lock":
        return True
    if size == 0:
        return path.name.startswith(".") or path.suffix not in (".so", ".cpp", ".py", ".h", ".o", ".json", "")
    if path.suffix not in (".so", ".o"):
        return True
    with path.open("rb") as file:
        header = file.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":  # not 64-bit ELF: some other platform's library
        return header[:4] != b"\x7fELF" or len(header) >= 52
    table, entry, entries = struct.unpack_from("<Q", header, 40)[0], *struct.unpack_from("<HH", header, 58)
    return size >= table + entry * entries
