"""Launching a Triton kernel, also where tensors have no memory: in plans and traces it is an operation like another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

H100_PROCESSORS = 132


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Run ``kernel[grid](*arguments, **options)``; of tensors without memory tell only whoever watches operations."""
    tensors = [x for x in arguments if isinstance(x, Tensor)]
    if any(isinstance(x, FakeTensor) or x.is_meta for x in tensors):
        _launched(tensors, kernel.__name__)
    else:
        kernel[grid](*arguments, **options)


def processors_of(x: Tensor) -> int:
    """Multiprocessors of the GPU that ``x`` is on; an H100's where it is on none."""
    if isinstance(x, FakeTensor) or not torch.cuda.is_available():
        return H100_PROCESSORS
    return torch.cuda.get_device_properties(x.device).multi_processor_count


@torch.library.custom_op("olmo_fn::triton", mutates_args=["tensors"])
def _launched(tensors: list[Tensor], name: str) -> None:
    raise AssertionError(f"{name} was launched on tensors that have memory")


@_launched.register_fake
def _(tensors: list[Tensor], name: str) -> None:
    return None
