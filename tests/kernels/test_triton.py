"""Triton kernels: in the interpreter as the plain operations, and compiled for GPUs that are not here, without a spill."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from olmo_fn.testing.machine_code import compile_triton

pytest.importorskip("triton", reason="triton is not installed (Linux: it comes with the CUDA builds of torch)")

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
spec = importlib.util.spec_from_file_location("benchmark_of_kernels", BENCHMARK)
assert spec is not None
assert spec.loader is not None
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)


def test_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(here / "interpreted.py")]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
    assert "skipped" not in run.stdout


@pytest.mark.parametrize("arch", [90, 100])
def test_machine_code(arch):
    """Nothing is spilled, tensors are read and written by 16 bytes, and a row of logits of a 7B is kept but for its end."""
    found = {row.name: row for row in kernels.ours(T=8192, D=4096, N=4096, V=100_352, rows=4096, arch=arch)}
    assert found.keys() == {"norm + rotation", "norm + rotation, backward", "softmax"}
    for row in found.values():
        for code in row.code:
            assert code.stack == code.spills == 0, row
            assert code.wide > 2 * code.narrow, row
        assert row.moved < 1.06 * row.ideal
    assert found["softmax"].code[0].registers == 128  # all that 512 threads can have


def test_products_are_seen():
    """A product of tiles is on the tensor cores of either GPU; what spills is seen to."""
    from matrix_product import product

    signature = {"a": "*bf16", "b": "*bf16", "out": "*fp32", "K": "i32"}
    for arch in (90, 100):
        code = compile_triton(product, signature, {"M": 128, "N": 128, "BLOCK": 64}, arch, num_warps=8)
        assert code.tensor_cores > 0
        assert code.spills == 0
    assert compile_triton(product, signature, {"M": 256, "N": 256, "BLOCK": 64}, 90, num_warps=4).spills > 0


@pytest.mark.slow
def test_generated_code():
    """The kernels that Inductor makes for an H100 of a norm and of its backward: counted, compiled, and read."""
    rows = table("--only", "residual", "--tokens", "4096", "--d-model", "512")
    by = {(row["by"], row["name"]): row for row in rows}
    norm, back = by["Inductor", "residual + norm"], by["Inductor", "residual + norm, backward"]
    assert norm["kernels"] == 1
    assert norm["moved"] - norm["ideal"] < 0.02 * norm["ideal"]
    assert back["loops"] == 1
    assert back["moved"] < 1.4 * back["ideal"]
    assert all(code["spills"] == 0 for row in rows for code in row["code"])


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["--d-model 4096", "--d-model 5120 --kv-heads 8 --hidden 27648"])
def test_a_step(shape):
    """All functions between the products of a 7B and a 32B: no kernel spills, and ours move less than Inductor's."""
    rows = table(*shape.split())
    assert all(code["spills"] == code["stack"] == 0 for row in rows for code in row["code"])
    by = {(row["by"], row["name"]): row for row in rows}
    for (way, name), row in by.items():
        if way.startswith("our"):
            assert row["moved"] < by["Inductor", name]["moved"]
    elsewhere = [row for row in rows if row["by"] == "Inductor" and ("our sm_90", row["name"]) not in by]
    assert all(row["moved"] < 1.51 * row["ideal"] for row in elsewhere)  # a row of a norm is read twice, once from a cache


def table(*flags: str) -> list[dict]:
    """What ``benchmarks/kernels.py`` prints."""
    run = subprocess.run([sys.executable, str(BENCHMARK), "--json", *flags], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
