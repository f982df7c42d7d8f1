"""Fast forms of single operations, each a plain function of tensors; they know nothing of chains and steps."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

Function: TypeAlias = Callable[..., Any]
Kernel: TypeAlias = Callable[[Function], Function]
"""Compiles an elementwise function of tensors of any shape."""


def identity(fn: Function) -> Function:
    """The function itself."""
    return fn


def on_triton(kernel: Kernel, x: Tensor) -> bool:
    """Whether a kernel of our own is to compute what ``x`` goes into: where functions are compiled, on an NVIDIA GPU.

    Traces and plans, whose tensors have no memory that a kernel could be given, see the compiled functions in its place.
    """
    return x.is_cuda and kernel is not identity and not (x.is_meta or is_fake(x)) and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def new_op(name: str, schema: str, fn: Function, fake: Function) -> None:
    """Make ``fn`` the operation ``torch.ops.olmo_fn.<name>``, so that what traces a step sees it as one; ``fake`` allocates
    what it returns, and computes nothing.
    """
    torch.library.define(f"olmo_fn::{name}", schema)
    torch.library.impl(f"olmo_fn::{name}", "default", fn)
    torch.library.register_fake(f"olmo_fn::{name}", fake)
