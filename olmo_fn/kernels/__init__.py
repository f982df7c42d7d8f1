"""Fast forms of single operations, each a plain function of tensors; they know nothing of chains and steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

Function: TypeAlias = Callable[..., Any]
Kernel: TypeAlias = Callable[[Function], Function]
"""Compiles an elementwise function of tensors of any shape."""


def identity(fn: Function) -> Function:
    """The function itself."""
    return fn
