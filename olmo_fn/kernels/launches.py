"""Triton's kernels where only shapes are known: what traces a step notes their launches, and launches nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from olmo_fn.kernels import _has_triton


@contextmanager
def noted_launches(note: Callable[[str, Sequence[Tensor]], None]) -> Iterator[None]:
    """Inside, ``note(name, tensors)`` is called instead of a launch, and a GPU that is not there has an H100's processors."""
    if not _has_triton():
        yield
        return
    from triton.runtime.jit import JITFunction

    def run(self: Any, *args: Any, **kwargs: Any) -> None:
        note(self.__name__, [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)])

    before, properties = JITFunction.run, torch.cuda.get_device_properties
    absent: Any = SimpleNamespace(multi_processor_count=132, major=9, minor=0)
    JITFunction.run = run
    if not torch.cuda.is_available():
        torch.cuda.get_device_properties = lambda device=None: absent
    try:
        yield
    finally:
        JITFunction.run, torch.cuda.get_device_properties = before, properties
