"""A product of two tiles in Triton, for tests of what reads machine code."""

import triton
import triton.language as tl


@triton.jit
def product(a, b, out, K, M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr):
    i, j, k = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, BLOCK)
    total = tl.zeros((M, N), tl.float32)
    for start in tl.range(0, K, BLOCK):
        total = tl.dot(tl.load(a + i * K + start + k[None, :]), tl.load(b + (start + k[:, None]) * N + j), total)
    tl.store(out + i * N + j, total)
