"""The kernels of a training step on an H100, read without one: Inductor's beside ours, in launches, loops and bytes; and the
registers and spills in the machine code of each.

    python benchmarks/kernels.py                      # a block, the head and the update of a 7B
    python benchmarks/kernels.py --d-model 5120 --kv-heads 8 --hidden 27648 --only norm

Bytes are of one call: all that a function is given or gives, once (ideal); all that each kernel touches, as often as its loops
go over it (moved). A loop over a row of a few thousand finds it in a cache the second time, one over a row of logits may not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from olmo_fn.core.chain import bind
from olmo_fn.core.compile import CUDA_OPTIONS
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.update import guarded
from olmo_fn.mesh.axis import Axis
from olmo_fn.nn import cross_entropy as head
from olmo_fn.nn.attention import Place, norm_and_rotate
from olmo_fn.nn.feed_forward import ACTIVATIONS
from olmo_fn.nn.norm import Norm, add_normed, norm_stream
from olmo_fn.optim import adamw as adamw
from olmo_fn.testing.generated import Kernel, compile_generated, generate
from olmo_fn.testing.machine_code import MachineCode, compile_triton

BF16, FP32 = torch.bfloat16, torch.float32


class Case(NamedTuple):
    """A function of a step and what it is given."""

    name: str
    fn: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    ideal: tuple[int, int]
    """Bytes, forward and backward, if every tensor that must move moves once."""
    dynamic: bool = False


class Row(NamedTuple):
    """What one way to compute a function costs."""

    name: str
    kernels: int
    loops: int
    moved: int
    ideal: int
    code: list[MachineCode]


def cases(T: int, D: int, N: int, F: int, V: int, rows: int) -> Iterator[Case]:
    """Those of a step over ``T`` tokens: width D, N key/value entries, hidden width F, V vocabulary, ``rows`` a chunk of it."""
    x, gain = partial(torch.empty, 1, T, dtype=BF16, requires_grad=True), partial(torch.empty, dtype=FP32, requires_grad=True)
    cos, sin = torch.empty(T, 64), torch.empty(T, 64)
    wide, narrow, table, gains = 2 * T * D, 2 * T * N, 2 * 4 * T * 64, 4 * D
    norm = bind(norm_stream, Norm(), Axis())
    yield Case("norm", norm, (x(D), gain(D)), (2 * wide + gains, 3 * wide + 2 * gains))
    added = bind(add_normed, Norm(), Axis(), 1.0)
    yield Case("residual + norm", added, (x(D), x(D), gain(D)), (3 * wide + gains, 3 * wide + 2 * gains))
    how = Place(128, 1e-6, tensors=("q_norm", "k_norm", "cos", "sin"))
    given = (x(D), x(N), x(N), gain(D), gain(N), cos, sin)
    both = wide + narrow
    yield Case("norm + rotation", bind(norm_and_rotate, how, Axis()), given, (2 * both + table, 3 * both + table))
    hidden = torch.empty(T, F, dtype=BF16)
    yield Case("SwiGLU", ACTIVATIONS["silu"].gated, (hidden, hidden.clone()), (6 * T * F, 0))
    three = (hidden, hidden.clone(), hidden.clone())
    yield Case("SwiGLU's gradient", ACTIVATIONS["silu"].gradient, three, (12 * T * F, 0))
    logits, column = torch.empty(rows, V, dtype=BF16), torch.empty(rows, 1)
    yield Case("softmax", lambda x, w: head._softmax_times(x, w, 1e-5), (logits, column), (4 * rows * V, 0))
    yield Case("softmax, its sum", lambda x: head._logsumexp(x, FP32), (logits,), (2 * rows * V, 0))
    given_sum = lambda x, lse, w: head._softmax_given(x, lse, w, 1e-5)  # noqa: E731
    yield Case("softmax, of its sum", given_sum, (logits, column, column.clone()), (4 * rows * V, 0))
    p, other = torch.empty(D * F), partial(torch.empty, D * F, dtype=BF16)
    names = ("skip", "count", "lr", "new_m", "new_v", "eps", "step_size", "unbiased", "grad_scale", "weight_decay")
    step = pipe(lambda params, batch: None, grad(engine="func"), adamw(1e-3, moments=BF16))
    update = guarded(step.leaf("w").update, True, names)
    donated = lambda p, g, m, v, numbers: update(p, g, {"adamw_m": m, "adamw_v": v}, numbers)  # noqa: E731
    yield Case("AdamW", donated, (p, other(), other(), other(), torch.empty(len(names))), (18 * D * F, 0), dynamic=True)


def ours(T: int, D: int, N: int, V: int, rows: int, arch: int) -> Iterator[Row]:
    """The kernels of `olmo_fn.kernels` for the same."""
    from olmo_fn.kernels import triton_logits, triton_rotation

    pointers = {"*bf16": "q k q_out k_out d_q_out d_k_out d_q d_k", "*fp32": "q_gain k_gain cos sin q_sums k_sums"}
    types = {name: kind for kind, names in pointers.items() for name in names.split()} | {"eps": "fp32"}
    types |= dict.fromkeys(("rows", "T", "Q", "K", "table", *(f"{x}_stride_{i}" for x in "qk" for i in "bht")), "i32")
    sizes = triton_rotation.block_sizes((D // 128, N // 128), 64, True, True)
    warps, blocks = sizes.pop("num_warps"), triton_rotation.backward_blocks(T)
    both, gains, table, sums = 2 * T * (D + N), 4 * (D + N), 4 * 2 * T * 64, 2 * 4 * blocks * (D + N)
    forward, backward = (
        compile_triton(fn, types, sizes, arch, warps) for fn in (triton_rotation._forward, triton_rotation._backward)
    )
    yield Row("norm + rotation", 1, 0, 2 * both + gains + table, 2 * both + table, [forward])
    yield Row("norm + rotation, backward", 3, 1, 3 * both + 2 * gains + table + sums, 3 * both + table, [backward])
    types = {"logits": "*bf16", "pairs": "*i32", "labels": "*i64", "weight": "*fp32", "losses": "*fp32", "half": "i32"}
    types |= {"z_loss": "fp32", "cap": "fp32", "zero": "i32"}
    piece, kept = triton_logits.PIECE, min(triton_logits.MOST, V // 2 // triton_logits.PIECE)
    sizes = {"CAPPED": False, "PIECES": kept, "PIECE": piece}
    twice = max(0, V - 2 * kept * piece)
    one = compile_triton(triton_logits._logits_gradient, types, sizes, arch, triton_logits.WARPS)
    yield Row("softmax", 2, 1, 2 * rows * (2 * V + twice), 4 * rows * V, [one])


def inductors(case: Case) -> Iterator[Row]:
    """Inductor's kernels, forward and backward."""
    with mock.patch.object(head, "exp", torch.exp), torch._inductor.config.patch(CUDA_OPTIONS):  # type: ignore[attr-defined]
        ways = generate(case.fn, *case.inputs, dynamic=case.dynamic)
    for suffix, kernels, ideal in zip(("", ", backward"), ways, case.ideal, strict=True):
        if kernels:
            yield row(case.name + suffix, kernels, ideal)


def row(name: str, kernels: list[Kernel], ideal: int) -> Row:
    """The sum of kernels."""
    code = [compile_generated(kernel) for kernel in kernels if kernel.source]
    return Row(name, len(kernels), max(k.loops for k in kernels), sum(k.bytes_by_loop for k in kernels), ideal, code)


def line(way: str, row: Row) -> str:
    """A line of the table."""
    registers, spills = max(c.registers for c in row.code), sum(c.spills for c in row.code)
    wide = sum(c.wide for c in row.code) / sum(c.wide + c.narrow for c in row.code)
    size = f"{row.moved / 2**20:9,.0f} {row.ideal / 2**20:9,.0f} {row.moved / row.ideal:6.2f}"
    return f"{row.name:28} {way:9} {row.kernels:7} {row.loops:5} {size} {registers:9} {spills:6} {wide:7.0%}"


def main() -> None:
    """Prints the table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = {"tokens": 8192, "d-model": 4096, "kv-heads": 32, "hidden": 11008, "vocab": 100_352, "logits-rows": 4096}
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--only", default="", help="functions whose names have this in them")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if not args.json:
        print(f"{'function':28} {'by':9} kernels loops MiB moved     ideal  ratio registers spills 16-byte", flush=True)

    def show(way: str, row: Row) -> None:
        as_json = {"by": way, **row._asdict(), "code": [c._asdict() for c in row.code]}
        print(json.dumps(as_json) if args.json else line(way, row), flush=True)

    T, D, N, V, rows = args.tokens, args.d_model, 128 * args.kv_heads, args.vocab, args.logits_rows
    with FakeTensorMode(allow_non_fake_inputs=True):
        for case in cases(T, D, N, args.hidden, V, rows):
            if args.only in case.name:
                for found in inductors(case):
                    show("Inductor", found)
    for arch in (90, 100):
        for found in ours(T, D, N, V, rows, arch):
            if args.only in found.name:
                show(f"our sm_{arch}", found)


if __name__ == "__main__":
    main()
