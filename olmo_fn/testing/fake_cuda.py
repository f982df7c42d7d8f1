"""A process in which tensors can be on a CUDA device that is not there: steps and commands run as on a GPU, without one.

Under `torch._subclasses.FakeTensorMode` they have no values, so a step may be of any size. Elsewhere they have: see
`olmo_fn.testing.emulated_cuda`.

On a build of torch for the CPU autograd asks the device for a stream, which aborts the process. `FakeCuda` starts one in which
a library of 30 lines, built from ``fake_cuda.cpp`` beside this file, answers for the device; it has to be there before torch is
loaded. A build for CUDA brings its own answers, also where it finds no GPU.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

from olmo_fn.testing.emulated_cuda import emulate
from olmo_fn.testing.pool import Unpickler

T = TypeVar("T")
START = "from olmo_fn.testing.fake_cuda import serve; serve({})"


class FakeCudaFailed(RuntimeError):
    """A function failed in the process; the text is its traceback, or how the process ended."""


class FakeCuda:
    """A process that runs functions one after the other, so that torch is imported once for all of them.

    Functions and arguments travel by pickle, as those of `olmo_fn.testing.Pool` do. RuntimeError without a C++ compiler.

    >>> with FakeCuda() as process:  # doctest: +SKIP
    ...     process.run(where)
    'cuda:0'
    """

    def __init__(self, timeout: float = 300.0) -> None:
        self.timeout = timeout
        self.folder = Path(tempfile.mkdtemp(prefix="olmo_fn-fake-cuda-"))
        shim = {} if torch.version.cuda else {"LD_PRELOAD": str(build_shim(self.folder))}
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={**os.environ, **shim, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
        )
        theirs.close()

    def __enter__(self) -> FakeCuda:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run(self, fn: Callable[..., T], *args: Any, **options: Any) -> T:
        """``fn(*args, **options)`` in the process. `FakeCudaFailed`, with the traceback, if it raises, dies or is not done in
        time.
        """
        try:
            self.pipe.send_bytes(pickle.dumps((sys.path, pickle.dumps((fn, args, options)))))
            if not self.pipe.poll(self.timeout):
                self.close()
                raise FakeCudaFailed(f"no answer within {self.timeout:g} s")
            kind, value = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionError):
            raise FakeCudaFailed(f"the process died, exit code {self.process.wait()}") from None
        if kind == "failure":
            raise FakeCudaFailed(value)
        return value

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def build_shim(folder: Path) -> Path:
    """Compile ``fake_cuda.cpp`` for the installed torch: two seconds. RuntimeError if that cannot be done."""
    source, library, torch_folder = Path(__file__).with_suffix(".cpp"), folder / "fake_cuda.so", Path(torch.__file__).parent
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise RuntimeError("fake CUDA tensors need a C++ compiler; install g++, or set CXX")
    flags = ["-shared", "-fPIC", "-O0", "-std=c++20", f"-I{torch_folder}/include", f"-L{torch_folder}/lib"]
    libraries = ["-lc10", "-ltorch_cpu", f"-Wl,-rpath,{torch_folder}/lib"]
    done = subprocess.run([compiler, *flags, str(source), "-o", str(library), *libraries], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"fake_cuda.cpp cannot be compiled: {done.stderr.strip()}")
    return library


def where() -> str:
    """The device of a gradient that autograd has made: an example of what `FakeCuda.run` runs."""
    with torch._subclasses.FakeTensorMode():
        x = torch.ones(2, device="cuda", requires_grad=True)
        return str(torch.autograd.grad((x * x).sum(), x)[0].device)


def serve(descriptor: int) -> None:
    """The process: answers calls until the pipe is closed, and leaves without the clean-up of a device that is not there."""
    os.environ.pop("LD_PRELOAD", None)  # it is not for compilers that are started here
    torch.set_num_threads(1)
    pretend_cuda()
    emulate()
    pipe = Connection(descriptor)
    while True:
        try:
            message = pipe.recv_bytes()
        except (EOFError, ConnectionError):
            os._exit(0)
        try:
            sys.path[:], call = pickle.loads(message)
            fn, args, options = Unpickler(io.BytesIO(call)).load()
            answer = pickle.dumps(("result", fn(*args, **options)))
        except BaseException:
            answer = pickle.dumps(("failure", traceback.format_exc()))
        sys.stdout.flush()
        with suppress(ConnectionError):
            pipe.send_bytes(answer)


class Nothing:
    """A stream or an event of a device that does nothing: it is always done."""

    device = torch.device("cuda", 0)

    def __enter__(self) -> None: ...

    def __exit__(self, *exception: object) -> None: ...

    def elapsed_time(self, end: object) -> float:
        """1: milliseconds that nothing took."""
        return 1.0

    def query(self) -> bool:
        """True: all is done."""
        return True

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


def pretend_cuda() -> None:
    """Let ``torch.cuda`` answer for one H100 with 80 GB."""
    properties = SimpleNamespace(
        name="NVIDIA H100 80GB HBM3", total_memory=80 << 30, major=9, minor=0, multi_processor_count=132
    )
    answers: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "is_bf16_supported": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": properties.name,
        "get_device_properties": properties,
        "get_device_capability": (9, 0),
        "mem_get_info": (80 << 30, 80 << 30),
        "memory_allocated": 0,
        "max_memory_allocated": 0,
        "current_stream": Nothing(),
        "default_stream": Nothing(),
        "Stream": Nothing(),
        "Event": Nothing(),
        "stream": Nothing(),
    }
    silent = ("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")
    for name, answer in {**answers, **dict.fromkeys(silent)}.items():  # a function each: Dynamo looks them up by identity
        setattr(torch.cuda, name, lambda *args, answer=answer, **kwargs: answer)
    torch._subclasses.FakeTensorMode.avoid_device_init = property(lambda self: True)  # type: ignore[assignment]
