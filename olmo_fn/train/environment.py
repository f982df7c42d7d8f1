"""What has to be right before torch is imported: what libraries read from the environment, and the device's name."""

from __future__ import annotations

import os
import re
import sys

SETTINGS = {
    "GOMP_SPINCOUNT": "50000",  # waiting threads spin for tens of microseconds, then sleep;
    "OMP_WAIT_POLICY": "passive",  # and not at all while there are more threads than processors (`olmo_fn.train.neighbours`)
}


def prepare_environment() -> None:
    """Set what is not set yet; call it before torch is imported, or it does nothing."""
    if "torch" not in sys.modules:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)


def check_device(flag: str, name: str) -> None:
    """ValueError, with the flag, for the name of no device that can compute.

    >>> check_device("--device", "meta")
    Traceback (most recent call last):
    ValueError: --device 'meta' is no device to compute on; take auto, cpu, cuda, or cuda:N for the GPU number N
    """
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,4})?", name):
        raise ValueError(f"{flag} {name!r} is no device to compute on; take auto, cpu, cuda, or cuda:N for the GPU number N")
