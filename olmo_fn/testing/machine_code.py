"""What a GPU would run, read without one: Triton kernels compiled ahead of time, and counted in their machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class MachineCode(NamedTuple):
    """A kernel's machine code (SASS) in numbers."""

    registers: int
    """Of a thread; 255 at most, and 65,536 of all threads of a multiprocessor."""
    stack: int
    """Bytes of a thread's local memory, where what has no register is spilled to."""
    spills: int
    """Instructions that load from there or store there."""
    shared: int
    """Bytes of shared memory of a block of threads."""
    wide: int
    """Loads and stores of global memory by 16 bytes."""
    narrow: int
    """Those by fewer."""
    tensor_cores: int
    """Products of matrices: HGMMA (sm_90), UTCHMMA (sm_100), or HMMA of older cores."""


def read_machine_code(cubin: bytes, shared: int = 0) -> MachineCode:
    """Reads a compiled kernel with the tools that come with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    moves = re.findall(r"\b(?:LDG|STG)\.E[.\w]*|\bLDGSTS[.\w]*", sass)
    wide = sum(".128" in move for move in moves)
    return MachineCode(
        registers=int(found[1]),
        stack=int(found[2]),
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        shared=shared,
        wide=wide,
        narrow=len(moves) - wide,
        tensor_cores=len(re.findall(r"\b(?:HGMMA|UTCHMMA|UTC\w*MMA|HMMA)\b", sass)),
    )


def compile_triton(
    fn: Any,
    signature: Mapping[str, str],
    constants: Mapping[str, Any],
    arch: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: bool = True,
) -> MachineCode:
    """Compiles a function under ``triton.jit`` for ``sm_<arch>``; a second or so each.

    ``signature`` has the types of all arguments that are not ``constants``, such as ``*bf16``, ``i32``, ``fp32``. ``aligned``:
    addresses and integers are multiples of 16, as those of whole tensors of a model are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(fn.arg_names)
    types = {name: "constexpr" if name in constants else signature[name] for name in names}
    divisible = [i for i, name in enumerate(names) if types[name].startswith("*") or types[name] in ("i32", "i64")]
    attrs: Any = {(i,): [["tt.divisibility", 16]] for i in divisible} if aligned else {}
    source = ASTSource(fn=fn, signature=types, constexprs=dict(constants), attrs=attrs)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    return read_machine_code(kernel.asm["cubin"], kernel.metadata.shared)
