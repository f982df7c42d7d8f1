"""Settings that libraries read from the environment once, when they load. Imports no torch: it has to come first."""

from __future__ import annotations

import os
import sys

SETTINGS = {
    "GOMP_SPINCOUNT": "50000",  # waiting threads spin for tens of microseconds, then sleep: quick alone, polite beside others
}


def prepare_environment() -> None:
    """Set what is not set yet; call it before torch is imported, or it does nothing."""
    if "torch" not in sys.modules:
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
