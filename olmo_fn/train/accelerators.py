"""What accelerators can do, from their makers' data sheets. Imports no torch."""

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
    reports: tuple[str, ...]  # the names by which CUDA knows it
    node: int = 8  # devices in a machine


ACCELERATORS = {
    # NVIDIA A100 80GB SXM data sheet (2021): 312 TFLOPS, 2,039 GB/s, NVLink 600 GB/s both ways; DGX A100: HDR 200 Gb/s a GPU
    "a100": Accelerator(
        "A100 80GB SXM", 312e12, 80e9, 2.039e12, 300e9, 25e9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100-SXM4-40GB")
    ),
    # NVIDIA H100 SXM data sheet: 1,979 TFLOPS sparse, 3.35 TB/s, NVLink 900 GB/s both ways; DGX H100: one NDR 400 Gb/s a GPU
    "h100": Accelerator("H100 80GB SXM", 989.4e12, 80e9, 3.35e12, 450e9, 50e9, ("NVIDIA H100 80GB HBM3",)),
    # NVIDIA H200 SXM data sheet: 1,979 TFLOPS sparse, 141 GB, 4.8 TB/s, NVLink 900 GB/s both ways; DGX H200: NDR 400 Gb/s a GPU
    "h200": Accelerator("H200 141GB SXM", 989.4e12, 141e9, 4.8e12, 450e9, 50e9, ("NVIDIA H200",)),
    # NVIDIA DGX B200 data sheet: 1,440 GB and 64 TB/s for 8 GPUs, NVLink 14.4 TB/s for 8 both ways, ConnectX-7 400 Gb/s a GPU;
    # Blackwell architecture brief: 2.25 PFLOPS dense bf16
    "b200": Accelerator("B200 180GB", 2250e12, 180e9, 8e12, 900e9, 50e9, ("NVIDIA B200",)),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS, 192 GB, 5.3 TB/s, seven Infinity Fabric links of 128 GB/s both ways;
    # MI300X platform with one 400 Gb/s NIC a GPU
    "mi300x": Accelerator("MI300X 192GB", 1307.4e12, 192e9, 5.3e12, 448e9, 50e9, ("AMD Instinct MI300X",)),
}


def peak_of(reported: str) -> float:
    """FLOP/s of dense bf16 products of a device with this name, by its maker; 0 if it is not known.

    >>> peak_of("NVIDIA H100 80GB HBM3"), peak_of("NVIDIA H100 PCIe")
    (989400000000000.0, 0.0)
    """
    return next((one.peak for one in ACCELERATORS.values() if reported in one.reports), 0.0)
