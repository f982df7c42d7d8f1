"""Settings that libraries read from the environment once, when they load. Imports no torch: it has to come first."""

from __future__ import annotations

import os
import sys

SETTINGS = {
    "OMP_WAIT_POLICY": "passive",  # waiting threads sleep: no slower alone, several times faster on a busy machine
    "THP_MEM_ALLOC_ENABLE": "1",  # large tensors in huge pages: fewer misses in the matrix products
}


def prepare_environment() -> None:
    """Set what is not set yet; call it before torch is imported, or it does nothing."""
    if "torch" not in sys.modules:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
