"""Fast forms of single operations, each a plain function of tensors; they know nothing of chains and steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

from torch import Tensor

Function: TypeAlias = Callable[..., Any]
Kernel: TypeAlias = Callable[[Function], Function]
"""Compiles an elementwise function of tensors of any shape."""


def identity(fn: Function) -> Function:
    """The function itself."""
    return fn


def on_triton(kernel: Kernel, x: Tensor) -> bool:
    """Whether a kernel of our own is to compute what ``x`` goes into: where functions are compiled, on an NVIDIA GPU."""
    return x.is_cuda and kernel is not identity and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None
