"""Memory for the largest tensors of a step: on a processor under Linux, in huge pages."""

from __future__ import annotations

import ctypes
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

LARGE = 1 << 25  # bytes: what the allocator takes from the system each time, and gives back
HUGE_PAGE = 1 << 21


def new_large(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised tensor of ``like``'s device, and dtype unless one is given, that costs fewer page faults if it is large.

    200 MB in pages of 4 kB are 50,000 faults, which take as long as reading and writing it five times. A hint, which the
    system need not follow; nothing elsewhere.

    >>> new_large(torch.ones(1), 2, 3).shape
    torch.Size([2, 3])
    """
    x = like.new_empty(shape, dtype=dtype)
    if x.nbytes >= LARGE and x.device.type == "cpu" and sys.platform.startswith("linux"):
        start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        length = (x.data_ptr() + x.nbytes - start) // HUGE_PAGE * HUGE_PAGE
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_HUGEPAGE)
    return x


def to_large(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x.to(dtype)``, into such memory; under functorch's transforms, which know no memory, just that."""
    small = x.numel() * dtype.itemsize < LARGE or x.device.type != "cpu"
    if x.dtype == dtype or small or torch._C._are_functorch_transforms_active():
        return x.to(dtype)
    return new_large(x, *x.shape, dtype=dtype).copy_(x)
