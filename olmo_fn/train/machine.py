"""What machine this is: device, compute dtype, matrix-product rate, memory."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from olmo_fn.launch.place import Place
from olmo_fn.train.accelerators import peak_of

DEVICES = Path("/dev")
"""Where the driver shows its GPUs."""


def pick_device(name: str, place: Place | None = None) -> torch.device:
    """The device of that name; ``auto`` is cuda when there is one. ValueError for one that cannot be used.

    Of a process among others, which has a ``place``, its own GPU, before anything is made on another: the ``local_rank``-th of
    those that it sees, or its only one, as Slurm shows it.

    >>> pick_device("cpu")
    device(type='cpu')
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (reason := unusable_gpu()):
            raise ValueError(reason)
    try:
        device = torch.device(name)
        if device.type == "cuda" and place and place.size > 1:
            device = torch.device("cuda", own_gpu(place, torch.cuda.device_count()))
            torch.cuda.set_device(device)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--run.device {name!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def own_gpu(place: Place, gpus: int) -> int:
    """Which of the ``gpus`` that a process sees is its own; ValueError where several would share one.

    >>> own_gpu(Place(rank=9, size=16, local_rank=1, local_size=8), gpus=8), own_gpu(Place(9, 16, 1, 8), gpus=1)
    (1, 0)
    """
    if 1 < gpus < place.local_size:
        raise ValueError(f"{place.local_size} processes on this machine for {gpus} GPUs: start one for each, --nproc {gpus}")
    return place.local_rank % max(1, gpus)


def unusable_gpu() -> str:
    """Why torch, made for CUDA, cannot use a GPU that is there and not hidden, in one line; empty otherwise."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not torch.version.cuda or hidden or not any(DEVICES.glob("nvidia[0-9]*")):
        return ""
    try:
        torch.cuda.init()
        why = "it finds none"
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(". ")[0]
    return (
        f"there is a GPU that torch {torch.__version__} for CUDA {torch.version.cuda} cannot use ({why}): update its driver, "
        "for CUDA 13 to 580 or newer, or install torch for an older CUDA (--index-url https://download.pytorch.org/whl/cu126); "
        "--run.device cpu goes on without it"
    )


def prepare(device: torch.device) -> None:
    """Set what torch keeps for all of a process: on a GPU sums inside of bf16 products are in fp32, as on a CPU."""
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """``float32``, ``bfloat16``, or for ``auto`` bfloat16 where the processor has bf16 matrix instructions.

    >>> compute_dtype("float32", torch.device("cpu"))
    torch.float32
    """
    if name != "auto":
        return torch.bfloat16 if name == "bfloat16" else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if torch.cpu._is_avx512_bf16_supported() else torch.float32


def check_float8(recipe: str, device: torch.device, dtype: torch.dtype) -> None:
    """ValueError for products in float8 on a GPU that has none, or with another dtype than they give."""
    if recipe == "none" or device.type != "cuda":
        return
    have, need = torch.cuda.get_device_capability(device), (10, 0) if recipe == "mx" else (8, 9)
    if have < need:
        name, since = torch.cuda.get_device_name(device), "Blackwell" if recipe == "mx" else "Ada and Hopper"
        raise ValueError(f"--recipe.float8 {recipe} needs a GPU of {since} or later, and {name} is older; leave it out")
    if dtype != torch.bfloat16:
        raise ValueError(f"--recipe.float8 {recipe} needs --recipe.dtype bfloat16 on a GPU, not {str(dtype)[6:]}")


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.3) -> float:
    """FLOP/s of a square matrix product, the median over ``seconds``: what MFU is measured against."""
    size = size if device.type == "cpu" else 8 * size
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 4:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times[1:])


def peak_rate(device: torch.device) -> float:
    """FLOP/s of bf16 products on this device by its maker's data sheet; 0 where none is known, as of a CPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has had resident, or allocated on its accelerator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory(device: torch.device, processes: int = 1) -> float:
    """Bytes that one of ``processes`` on this machine may use: its accelerator's, or its part of the machine's or container's.

    >>> total_memory(torch.device("cpu")) > 1e8
    True
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # cgroups 2 and 1
        with suppress(OSError, ValueError):  # not there, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits) / processes


@contextmanager
def warm_up(scheduled: bool = False) -> Iterator[Callable[[], None]]:
    """Around the steps; call what it gives after the first one, which has compiled.

    Memory that making the state left goes back to the system. Until the call Python looks for no cycles: compiling makes
    hundreds of thousands of objects that stay, and looking through them again and again takes a sixth of a warm start.
    ``scheduled``: nor does it afterwards, but when `collect` says so, and then not at what exists by now.

    >>> with warm_up() as warm:
    ...     for step in range(3):
    ...         if step == 0:
    ...             warm()
    """
    _glibc("malloc_trim", 0)
    enabled = gc.isenabled()
    gc.disable()

    def warm() -> None:
        if scheduled:
            gc.collect()
            gc.freeze()
        elif enabled:
            gc.enable()
        keep_freed_memory()

    try:
        yield warm
    finally:
        if scheduled:
            gc.unfreeze()
        if enabled:
            gc.enable()


COLLECT_EVERY = 100
"""Steps between collections on schedule."""


def on_schedule(device: torch.device, processes: int) -> bool:
    """Whether garbage is collected by the step's number: a pause of one process is a pause of all, so they pause together.

    On GPUs, which wait for a host that pauses, and in large jobs; elsewhere Python collects when it likes.
    """
    return device.type == "cuda" or processes >= 8


def collect(step: int) -> None:
    """Collect garbage if it is the step for it: in every process of a job after the same one."""
    if step % COLLECT_EVERY == 0:
        gc.collect()


def keep_freed_memory() -> None:
    """Release freed memory once, and from now on keep up to 256 MB of it, in blocks below 32 MB.

    To be called after the first step, which has compiled. From then on a step frees and allocates the same tensors again and
    again, and fresh pages for each would cost a tenth of a CPU step. Larger blocks go back at once: kept, a small tensor
    in the place of a large one would keep the next large one out, and the process would grow by it. Elsewhere than glibc,
    nothing.
    """
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    _glibc("malloc_trim", 0)
    _glibc("mallopt", M_TRIM_THRESHOLD, 256 << 20)
    _glibc("mallopt", M_MMAP_THRESHOLD, 32 << 20)


def _glibc(function: str, *numbers: int) -> None:
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):
            getattr(ctypes.CDLL("libc.so.6"), function)(*numbers)
