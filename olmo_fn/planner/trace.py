"""Watch what a piece of a program does: bytes that live, by purpose; FLOPs; bytes moved; collectives by axis.

On meta tensors, which have a shape and no memory, nothing is computed and nothing sent: the program itself says what it
would do at any size and on any mesh. On real tensors the same eyes measure.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = {aten.mm.default: 0, aten.mm.out: 0, aten.bmm.default: 0, aten.bmm.out: 0, aten.addmm.default: 1}
PRODUCTS |= {aten.addmm.out: 1, aten.addmm_.default: 1, aten.baddbmm.default: 1}
"""Matrix products, and which argument is the first factor."""
EMPTY = {aten.new_empty.default, aten.empty_like.default, aten.empty.memory_format}
"""What allocates, and moves nothing."""
KINDS = {
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


Traffic: TypeAlias = "Counter[tuple[str, str, str]]"
"""By process group, kind of collective, and "calls" or "bytes": those of the whole tensor, gathered or yet to be scattered."""


@dataclass
class Seen:
    """What happened: bytes by purpose at the start and at the largest moment, and sums of everything else."""

    start: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    linear: int = 0  # FLOPs of products of matrices
    batched: int = 0  # FLOPs of batched products: attention
    moved: int = 0  # bytes that elementwise operations read and write
    traffic: Traffic = field(default_factory=Counter)


class Trace(TorchDispatchMode):
    """A mode to run a program in. Every storage has a purpose: that of the innermost `purpose` when it was made."""

    def __init__(self) -> None:
        super().__init__()
        self.live: Counter[str] = Counter()
        self.seen = Seen()
        self._purpose = "activations"
        self._known: dict[int, tuple[weakref.ref[Any], str, int]] = {}
        self._fused: list[Tensor] | None = None  # inside one kernel: what it keeps although it is no result
        self._on_chip = False
        self._sent: dict[int, Tensor] = {}  # what a gather reads until somebody waits for its result
        self._results: dict[Any, tuple[Any, int]] = {}  # of kernels: the number of an input, or a tensor like a new one

    # --- what is live -------------------------------------------------------------------------------------------------

    @contextmanager
    def purpose(self, name: str) -> Iterator[None]:
        """What is made inside is for this."""
        before, self._purpose = self._purpose, name
        try:
            yield
        finally:
            self.refresh()
            self._purpose = before

    def is_for(self, name: str, tensors: Any) -> None:
        """Give these tensors a purpose, whoever made them."""
        for tensor in leaves(tensors):
            self._add(tensor, name)

    def refresh(self) -> None:
        """Notice storages that were resized, which torch does not report."""
        for key, (ref, purpose, size) in list(self._known.items()):
            storage = ref() if purpose == "weights" else None
            if storage is not None and storage.nbytes() != size:
                self._known[key] = (ref, purpose, storage.nbytes())
                self._count(purpose, storage.nbytes() - size)

    def cut(self) -> Seen:
        """What has happened since the last cut."""
        seen, self.seen = self.seen, Seen(Counter(self.live), Counter(self.live))
        return seen

    def _add(self, tensor: Tensor, purpose: str) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            ref, old, size = self._known[key]
            self._known[key] = (ref, purpose, size)
            self.live[old] -= size
            self.live[purpose] += size
            return

        def gone(_: Any) -> None:
            _, purpose, size = self._known.pop(key)
            self.live[purpose] -= size

        self._known[key] = (weakref.ref(storage, gone), purpose, size)
        self._count(purpose, size)

    def _count(self, purpose: str, size: int) -> None:
        self.live[purpose] += size
        if self.live.total() > self.seen.peak.total():
            self.seen.peak = Counter(self.live)

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._purpose == "weights":
            self.refresh()
        if func.namespace == "_c10d_functional":
            return self._collective(func, args, kwargs or {})
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # a number that data would decide; sizes do not depend on it
        out = func(*args, **(kwargs or {}))
        if func.is_view:
            return out
        product = func in PRODUCTS
        if product:
            flops = 2 * out.numel() * args[PRODUCTS[func]].shape[-1]
            if out.ndim == 3:
                self.seen.batched += flops
            else:
                self.seen.linear += flops
        if self._fused is None:
            if not product and func not in EMPTY:
                self._moved(args, out)
            self._made(out)
        elif product:
            self._fused.append(out)
            self._made(out)
        return out

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, x = func._schema.name.split("::")[1], args[0]
        if name == "wait_tensor":
            self._sent.pop(x.untyped_storage()._cdata, None)
            return x if x.is_meta else func(*args)
        group = args[-1]
        kind = "ring_shift" if name == "all_to_all_single" and 0 in args[2] else KINDS[name]
        if not x.is_meta:
            out = func(*args, **kwargs)
        elif kind == "all_gather":
            out = kwargs["out"]
        elif name == "reduce_scatter_tensor":
            out = x.new_empty(x.shape[0] // args[2], *x.shape[1:])
        elif name == "all_to_all_single":
            out = x.new_empty(sum(args[1]), *x.shape[1:])
        else:
            out = torch.empty_like(x)
        self.seen.traffic[group, kind, "calls"] += 1
        self.seen.traffic[group, kind, "bytes"] += (out if kind == "all_gather" else x).nbytes
        self._made(out)
        if kind == "all_gather":
            self._sent[out.untyped_storage()._cdata] = x
        if self._fused is not None:
            self._fused.append(out)
        return out

    def _made(self, out: Any) -> None:
        for tensor in leaves(out):
            if tensor.untyped_storage()._cdata not in self._known:
                self._add(tensor, self._purpose)

    def _moved(self, inputs: Any, outputs: Any) -> None:
        if not self._on_chip:
            self.seen.moved += nbytes(inputs) + nbytes(outputs)

    @contextmanager
    def on_chip(self, inputs: Any) -> Iterator[None]:
        """Only ``inputs`` count as moved, whatever is done inside."""
        self._moved(inputs, ())
        before, self._on_chip = self._on_chip, True
        try:
            yield
        finally:
            self._on_chip = before

    # --- fused kernels ------------------------------------------------------------------------------------------------

    @contextmanager
    def _kernel(self) -> Iterator[list[Tensor]]:
        before, self._fused = self._fused, []
        try:
            yield self._fused
        finally:
            self._fused = before

    def kernel(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as one compiled kernel: what it makes on its way to its results takes no memory.

        On meta tensors it is run once for arguments of the same shapes.
        """

        def run(*args: Any) -> Any:
            inputs = leaves(args)
            key = (fn, *((x.shape, x.stride(), x.dtype) for x in inputs))
            if key not in self._results:
                before = self.seen.linear
                with self._kernel():
                    out = fn(*args)
                    at = {x.untyped_storage()._cdata: i for i, x in enumerate(inputs)}
                    like = rebuild(out, lambda x: at.get(x.untyped_storage()._cdata, torch.empty_like(x)))
                if all(x.is_meta for x in leaves(out)):
                    self._results[key] = like, self.seen.linear - before
            else:
                like, flops = self._results[key]
                self.seen.linear += flops
                out = _again(like, inputs)
            self._moved(inputs, out)
            self._made(out)
            return out

        return run

    def stage(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as a compiled stage: Inductor keeps its inputs, and results of products and of collectives; the rest is
        computed again in the backward kernel.
        """

        def run(*args: Any) -> Any:
            flat = [x for x in leaves(args) if x.requires_grad]
            structure: list[Any] = []

            def inner(*tensors: Tensor) -> tuple[Tensor, ...]:
                found = iter(tensors)
                out = fn(*rebuild(args, lambda x: next(found) if x.requires_grad else x))
                structure.append(out)
                return leaves(out)

            results = iter(_Stage.apply(self, inner, *flat))
            return rebuild(structure[0], lambda x: next(results))

        return run


class _Stage(Function):
    """Both sweeps of a compiled stage; the graph of its inside is kept, and takes no memory but for `Trace._fused`."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        with torch.enable_grad(), trace._kernel() as kept:
            inside = tuple(x.detach().requires_grad_() for x in tensors)
            results = fn(*inside)
        ctx.graph = trace, inside, results, kept
        trace._moved(tensors, results)
        trace._made(results)
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        trace, inside, results, kept = ctx.graph
        del ctx.graph
        with trace._kernel():
            grads = torch.autograd.grad(results, inside, cotangents)
        trace._moved((cotangents, inside, kept), grads)
        trace._made(grads)
        return None, None, *grads


def leaves(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return ()
    return tuple(x for part in value for x in leaves(part))


def rebuild(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """The same nest with every tensor replaced by ``f`` of it, in the order of `leaves`."""
    if isinstance(value, Tensor):
        return f(value)
    if isinstance(value, Mapping):
        return {key: rebuild(part, f) for key, part in value.items()}
    return type(value)(rebuild(part, f) for part in value) if isinstance(value, (tuple, list)) else value


def _again(like: Any, inputs: tuple[Tensor, ...]) -> Any:
    """A nest of inputs, given by number, and new tensors."""
    if isinstance(like, int):
        return inputs[like]
    if isinstance(like, Tensor):
        return torch.empty_like(like)
    if isinstance(like, Mapping):
        return {key: _again(part, inputs) for key, part in like.items()}
    return type(like)(_again(part, inputs) for part in like) if isinstance(like, (tuple, list)) else like


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a nest."""
    return sum(x.nbytes for x in leaves(value))
