"""What has to be right before torch is imported: what libraries read from the environment, and the device's name."""

from __future__ import annotations

import os
import re
import sys

SETTINGS = {
    "GOMP_SPINCOUNT": "50000",  # waiting threads spin for tens of microseconds, then sleep;
    "OMP_WAIT_POLICY": "passive",  # and not at all while there are more threads than processors (`olmo_fn.train.neighbours`)
    # A GPU's memory grows in place, where a step's many sizes would leave holes; host memory for copies of more than 4 MB is
    # not rounded up to a power of two, which could double what a checkpoint on its way takes.
    "PYTORCH_ALLOC_CONF": "expandable_segments:True,pinned_max_round_threshold_mb:4",
}
OLDER = {"PYTORCH_ALLOC_CONF": "PYTORCH_CUDA_ALLOC_CONF"}
"""Older names of variables, by which they may have been set; torch refuses both at once."""


def prepare_environment() -> None:
    """Set what is not set yet; call it before torch is imported, or it does nothing."""
    if "torch" not in sys.modules:
        for name, value in SETTINGS.items():
            if OLDER.get(name, "") not in os.environ:
                os.environ.setdefault(name, value)


def check_device(flag: str, name: str) -> None:
    """ValueError, with the flag, for the name of no device that can compute.

    >>> check_device("--device", "meta")
    Traceback (most recent call last):
    ValueError: --device 'meta' is no device to compute on; take auto, cpu, cuda, or cuda:N for the GPU number N
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"{flag} {name!r} is no device to compute on; take auto, cpu, cuda, or cuda:N for the GPU number N")
