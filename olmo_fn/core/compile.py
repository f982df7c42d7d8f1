"""Compilation: small fused functions between matrix products, kept on disk in a folder of the project's own.

A process killed in the middle of a compile leaves empty or cut-off libraries in that folder, which would break every
later run that needs them; `prepare_cache` drops them.
"""

from __future__ import annotations

import os
import shutil
import struct
import warnings
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from olmo_fn.core.chain import bind
from olmo_fn.core.pipe import Transform, with_execution
from olmo_fn.core.step import Step
from olmo_fn.kernels import Function


def compile() -> Transform:
    """Compile what is between matrix products, and every update; invisible but for speed. Without a C++ compiler: a warning,
    eager.

    Alike blocks share their compiled functions. Updates that are elementwise see each parameter flattened, so that one
    compiled function serves all shapes.
    """

    def apply(step: Step) -> Step:
        if not has_compiler():
            warnings.warn("no C++ compiler (c++, g++, clang++ or $CXX) found: running eager, which is slower", stacklevel=2)
            return step
        # isolated: closures of the same code would otherwise share Dynamo's limit of eight compilations
        own = partial(torch.compile, fullgraph=True, isolate_recompiles=True, options=_options())
        fuse = cache(lambda fn, *constants: own(bind(fn, *constants), dynamic=False))
        kernel = cache(lambda fn: _of_plain_tensors(own(fn, dynamic=True)))
        return with_execution(step, fuse=fuse, kernel=kernel)

    return Transform("compile()", Step, Step, apply)


def _options() -> dict[str, Any]:
    """Where torch's own kernels use wide vectors Inductor's can: its trials, four seconds of a first start, are left out."""
    return {"cpp.vec_isa_ok": True} if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") else {}


def _of_plain_tensors(fn: Function) -> Function:
    """``fn`` of tensors that are no views: Dynamo guards on what a view is of, and would compile again for each."""
    return lambda *args: fn(*map(_plain, args))


def _plain(x: Any) -> Any:
    """Tensors, and those in dicts, which is all that kernels take: a tenth of what ``torch.utils._pytree`` costs a call."""
    return x.data if isinstance(x, Tensor) else {name: _plain(y) for name, y in x.items()} if isinstance(x, dict) else x


def has_compiler() -> bool:
    """Whether Inductor will find a C++ compiler, or the GPU needs none."""
    candidates = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return torch.cuda.is_available() or any(shutil.which(c) for c in candidates if c)


def prepare_cache(folder: Path, sweep: bool = True) -> list[Path]:
    """Make Inductor keep its files in ``folder``, and ``sweep`` away those that a killed compile left broken; returns them."""
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    broken = [path for path in (folder.rglob("*") if sweep else ()) if path.is_file() and not _whole(path)]
    for path in broken:
        path.unlink(missing_ok=True)
    return broken


def _whole(path: Path) -> bool:
    """False for an empty file, and for an ELF library that ends before its section table does."""
    size = path.stat().st_size
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
