"""A graph on a CPU: a step's operations, recorded where PyTorch hands them to its kernels, and done again on the same memory.

As a CUDA graph does, it runs no Python when it is replayed, writes every result where it was when it was recorded, and leaves
nothing changed by the recording. To record, the operations have to be done; so what they wrote over is put back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::_unique2", "aten::unique_consecutive"}
"""What reads numbers on the host."""


class RecordedGraph:
    """A `olmo_fn.core.capture.Graph` of operations on a CPU."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, operations are done and kept; at the end what they wrote over is put back."""
        with _Recorder(self.calls) as recorder:
            yield
        for storage, before in recorder.overwritten.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        """Do the operations again, on the same memory."""
        for func, args, kwargs, out in self.calls:
            for old, new in zip(_tensors(out), _tensors(func(*args, **kwargs)), strict=True):
                if old is not new:
                    old.copy_(new)


def recorded_graphs() -> Callable[[], RecordedGraph]:
    """As `olmo_fn.core.capture.cuda_graphs`, for `capture` of steps on a CPU.

    >>> x, graph = torch.tensor(1.0), recorded_graphs()()
    >>> with graph.recording():
    ...     y = x.add_(1) * 10
    >>> x, graph.replay(), graph.replay(), x, y
    (tensor(3.), None, None, tensor(3.), tensor(30.))
    """
    return RecordedGraph


class _Recorder(TorchDispatchMode):
    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls
        self.made: set[int] = set()  # memory of results, which are kept and so keep their addresses
        self.overwritten: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), given: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(given or {})
        if func._schema.name in WAITS:
            raise RuntimeError(f"{func._schema.name} waits for its result")
        for argument, value in zip(func._schema.arguments, args, strict=False):
            self._keep(argument, value)
        for argument in func._schema.arguments:
            self._keep(argument, kwargs.get(argument.name))
        out = func(*args, **kwargs)
        if not func.is_view:
            self.calls.append((func, args, kwargs, out))
            self.made |= {x.untyped_storage()._cdata for x in _tensors(out)} - self.overwritten.keys()
        return out

    def _keep(self, argument: Any, value: Any) -> None:
        if argument.alias_info is not None and argument.alias_info.is_write:
            for storage in (x.untyped_storage() for x in _tensors(value)):
                if storage._cdata not in self.made and storage._cdata not in self.overwritten:
                    self.overwritten[storage._cdata] = storage, storage.clone()


def _tensors(x: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
