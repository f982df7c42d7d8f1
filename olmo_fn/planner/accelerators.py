"""How much of an accelerator's peaks (`olmo_fn.train.accelerators`) programs get. Imports no torch.

None of the shares has been measured by this project. Each is from the one place that is named beside it.
"""

from __future__ import annotations

# H100s of 500 W multiply bf16 matrices of 65536 x 8192 x 7168 at 575 TFLOP/s, and fp8 ones, scaled by row, at 1,083
# (github.com/pytorch/FBGEMM/pull/2546). Products are limited by power, of which a clock takes the third power: with 700 W they
# are 1.12 times as fast. B200: 0.63 of the peak for 8192 x 8192 x 8192 in bf16 (github.com/pytorch/ao/pull/2427).
PRODUCTS, PRODUCTS_FP8 = 0.65, 0.61
"""Shares of the bf16 and the fp8 peak (which is twice that) that large products of matrices reach."""

TILE, PROCESSORS = 128, 132
"""Rows and columns of a product that a multiprocessor computes at a time, and how many of these an H100 has."""

ATTENTION = {"cudnn": (0.61, 0.48), "flash": (0.37, 0.30), "flash3": (0.65, 0.55), "flex": (0.33, 0.25)}
"""Shares of the bf16 peak of attention, forward and backward: causal, heads of 128, sequences of 8,192, on an H100 (Shah et al.
2024, arXiv 2407.08608, figures 5 and 6). FlexAttention has 0.9 and 0.85 of FlashAttention-2's, by its authors' blog of August
2024."""

STREAM = 0.85
"""Share of a memory's bandwidth that elementwise kernels reach; a plain copy on an H100 gets 0.9 of it."""

WIRE = 0.82
"""Share of a link's bandwidth that NCCL's protocol leaves to data: 370 of 450 GB/s, by its maintainers
(github.com/NVIDIA/nccl-tests/issues/212)."""

CHANNELS = {"link": 24, "network": 16}
"""Multiprocessors that a collective occupies while it runs, one for each of NCCL's channels: over NVLink what its log says
(github.com/NVIDIA/nccl-tests/issues/194), over a network an assumption."""

EAGER, COMPILED = 7.5e-6, 55e-6
"""Seconds of Python and driver for a kernel launched eagerly, and for a call of a compiled function: in the middle of 5 to 10
microseconds, and of 50 to 60."""


def tiled(flops: int, rows: int, columns: int, groups: int = 1) -> int:
    """FLOPs of a product, and of the multiprocessors that idle in its last round of tiles; of ``groups`` that are multiplied in
    one call, each of so many rows, also those of the rows that their last tiles lack.

    >>> tiled(100, 8192, 4096)  # 15.5 rounds
    103
    >>> tiled(100, 512, 1024)  # a quarter of the multiprocessors has something to do
    412
    >>> tiled(100, 96, 4096, groups=33)  # 8 rounds, of tiles of which a quarter is empty
    133
    """
    down = -(-rows // TILE)
    tiles = max(1, groups * down * -(-columns // TILE))
    filled = down * TILE / rows if groups > 1 and rows else 1
    return round(flops * filled * -(-tiles // PROCESSORS) * PROCESSORS / tiles)
