"""What accelerators can do: peaks from their makers' data sheets, and how much of them programs get. Imports no torch.

None of the shares has been measured by this project. Each is from the one place that is named beside it.
"""

from __future__ import annotations

from typing import NamedTuple


class Accelerator(NamedTuple):
    """One device of a machine of eight. Rates are peaks, links are one way."""

    name: str
    peak: float  # FLOP/s of dense bf16 products
    memory: float  # bytes
    bandwidth: float  # bytes/s to its memory
    link: float  # bytes/s to the other devices of its machine
    network: float  # bytes/s to other machines
    node: int = 8  # devices in a machine


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


def tiled(flops: int, rows: int, columns: int) -> int:
    """FLOPs of a product, and of the multiprocessors that idle in its last round of tiles.

    >>> tiled(100, 8192, 4096)  # 15.5 rounds
    103
    >>> tiled(100, 512, 1024)  # a quarter of the multiprocessors has something to do
    412
    """
    tiles = max(1, -(-rows // TILE) * -(-columns // TILE))
    return round(flops * -(-tiles // PROCESSORS) * PROCESSORS / tiles)


ACCELERATORS = {
    # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: HDR 200 Gb/s a GPU
    "a100": Accelerator("A100 80GB SXM", 312e12, 80e9, 2.039e12, 300e9, 25e9),
    # NVIDIA H100 SXM data sheet: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: one NDR 400 Gb/s a GPU
    "h100": Accelerator("H100 80GB SXM", 989.4e12, 80e9, 3.35e12, 450e9, 50e9),
    # NVIDIA H200 SXM data sheet: 1,979 TFLOPS sparse, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways; DGX H200: NDR 400 Gb/s a GPU
    "h200": Accelerator("H200 141GB SXM", 989.4e12, 141e9, 4.8e12, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s for 8 GPUs, NVLink 14.4 TB/s for 8 both ways, ConnectX-7 400 Gb/s a GPU;
    # Blackwell architecture brief: 2.25 PFLOPS dense bf16
    "b200": Accelerator("B200 180GB", 2250e12, 180e9, 8e12, 900e9, 50e9),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS, 192 GB, 5.3 TB/s, seven Infinity Fabric links of 128 GB/s both ways;
    # MI300X platform with one 400 Gb/s NIC a GPU
    "mi300x": Accelerator("MI300X 192GB", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9),
}
