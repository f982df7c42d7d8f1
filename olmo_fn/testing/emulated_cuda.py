"""A CUDA device whose memory is the CPU's: tensors say that they are on ``cuda``, keep to its rules, and have values.

In a process of `olmo_fn.testing.FakeCuda` whole commands run on it: they train, save, load and generate, and what they say can
be compared with what they say on a CPU. An operation on tensors of both devices fails as it would on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

from olmo_fn.testing.trace import DeviceMismatch, place

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {aten.copy_.default, aten._foreach_copy_.default, aten._to_copy.default}
"""What may have tensors of both devices."""
JOINED = {aten.cat.default, aten.stack.default}
"""What takes no number from the CPU either, which others do."""
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
"""What takes indices from the CPU."""


class CudaTensor(Tensor):
    """A tensor on ``cuda`` with the values of ``host``, a tensor on the CPU with the same shape and strides."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> CudaTensor:
        made = Tensor._make_wrapper_subclass(
            cls, host.size(), host.stride(), host.storage_offset(), dtype=host.dtype, layout=host.layout, device=CUDA
        )
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return run(func, *args, **(kwargs or {}))

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __repr__(self, **kwargs: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({self.host!r})"

    def __format__(self, spec: str) -> str:
        return format(self.item() if self.ndim == 0 else repr(self), spec)

    def data_ptr(self) -> int:
        """The address of the values, by which tensors on the same memory know each other."""
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The memory of the values."""
        return self.host.untyped_storage()

    def record_stream(self, stream: Any) -> None:
        """Nothing: memory here is not taken again while something uses it."""

    def tolist(self) -> Any:
        """The values, copied to the CPU."""
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """TypeError, as a GPU's tensors raise."""
        raise TypeError(f"{place()}: a tensor on cuda:0 gives no NumPy array; it takes Tensor.cpu() first")


def run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that makes tensors on the device, or is given some: on their hosts."""
    given = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
    ours = {id(x.host): x for x in given if isinstance(x, CudaTensor)}
    if ours and func not in COPIES:
        check(func, args, kwargs)
    wanted = kwargs.get("device")
    device = CUDA if wanted is None and ours else torch.device(wanted or CPU)
    found = func(*tree_map(to_host, args), **{name: tree_map(to_host, x) for name, x in kwargs.items()})
    theirs = {id(x) for x in given}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor) or id(x) in theirs:
            return x
        return ours[id(x)] if id(x) in ours else CudaTensor(x) if device.type == "cuda" else x

    return tree_map(wrap, found)


def check(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """`DeviceMismatch` for tensors of the CPU beside those of the device; numbers, 0-d, may be, and indices."""
    rest = (args[0], *args[2:]) if func in INDEXED else args
    for x in tree_iter((rest, kwargs)):
        if isinstance(x, Tensor) and not isinstance(x, CudaTensor) and (x.ndim or func in JOINED):
            raise DeviceMismatch(f"{place()}: {func} gets a tensor of shape {tuple(x.shape)} on cpu beside those on cuda:0")


def to_host(x: Any) -> Any:
    """What stands on the CPU for an argument."""
    if isinstance(x, CudaTensor):
        return x.host
    return CPU if isinstance(x, torch.device) and x.type == "cuda" else x


@cache
def emulate() -> torch.library.Library:
    """From now on, and for the life of the process, ``device="cuda"`` is this device; what is returned keeps it so."""
    library = torch.library.Library("_", "IMPL")
    library.fallback(run, "CUDA")
    inference = torch.inference_mode  # its tensors cannot be wrapped
    torch.inference_mode = lambda mode=True: torch.no_grad() if mode is True else inference(mode)  # type: ignore
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(…, device="cuda") is made on the CPU and copied
    return library
