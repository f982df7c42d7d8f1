"""Watch what a piece of a program does: bytes that live, by purpose; FLOPs; bytes moved; collectives by axis.

On meta tensors, which have a shape and no memory, nothing is computed and nothing sent: the program itself says what it
would do at any size and on any mesh.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only
from torch.utils.flop_counter import flop_registry

from olmo_fn.core.offload import Link
from olmo_fn.planner.accelerators import tiled

aten = torch.ops.aten
SCALED = (aten._scaled_mm, aten._scaled_mm_v2)  # in float8


def _grouped_flops(a: Tensor, b: Tensor, *args: Any, **options: Any) -> int:
    """Of the rows of groups, (R, D) by (E, D, F), or of sums over these rows, (D, R) by (R, F)."""
    return 2 * a.numel() * b.shape[-1]


PRODUCTS = {
    **flop_registry,
    aten.addmm_: flop_registry[aten.addmm],
    aten._scaled_mm_v2: flop_registry[aten.mm],
    aten._grouped_mm: _grouped_flops,
}
"""How many FLOPs an operation has, of those that are counted: products of matrices, attention, convolutions."""
GROUPED = (aten._grouped_mm, aten.bmm)
PLAIN = (aten.mm, aten.addmm, aten.addmm_)
EMPTY = {aten.new_empty.default, aten.empty_like.default, aten.empty.memory_format}
"""What allocates, and moves nothing."""
KINDS = {
    "all_gather_into_tensor_out": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}


Traffic: TypeAlias = Counter[tuple[str, str, str]]
"""By process group, kind of collective, and "calls" or "bytes": those of the whole tensor, gathered or yet to be scattered."""


@dataclass
class Seen:
    """What happened: bytes by purpose at the start and at the largest moment, and sums of everything else."""

    start: Counter[str] = field(default_factory=Counter)
    peak: Counter[str] = field(default_factory=Counter)
    products: int = 0  # FLOPs of products of matrices, without attention's
    tiled: int = 0  # the same, filled up to whole rounds of tiles
    fp8: int = 0  # of these, FLOPs of products in 8 bits
    grouped: int = 0  # and of groups of rows, each by a matrix of its own, as experts have them
    fed: int = 0  # bytes that these read and write
    attention: Counter[str] = field(default_factory=Counter)  # FLOPs of pairs that see each other, "forward" and "backward"
    moved: int = 0  # bytes that elementwise operations read and write
    launches: Counter[str] = field(default_factory=Counter)  # "eager" kernels, and calls of "compiled" functions
    traffic: Traffic = field(default_factory=Counter)
    beyond: Traffic = field(default_factory=Counter)  # bytes of exchanges in which more comes than goes, of what is more
    host: int = 0  # bytes copied to host memory or back


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
        self._results: dict[
            Any, tuple[Any, tuple[int, int]]
        ] = {}  # of kernels: the number of an input, or a tensor like a new one

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

    @property
    def link(self) -> Link:
        """The way to a host whose memory is nobody's, and back: what is copied is counted."""

        def host(x: Tensor) -> Tensor:
            with _disable_current_modes():
                return torch.empty_like(x)

        def copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> Callable[[], None]:
            self.seen.host += nbytes(source)
            return lambda: None

        return Link(host, copy)

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
        count = PRODUCTS.get(func._overloadpacket)
        if count is not None and not self._on_chip:
            given = leaves(args) if func._overloadpacket in PLAIN else args  # some forms of these are given a dtype, too
            flops = count(*given, **(kwargs or {}), out_val=out)
            self._product(func._overloadpacket, flops, out, *groups_of(func._overloadpacket, out, args, kwargs or {}))
            if func._overloadpacket in GROUPED:
                self.seen.fed += nbytes((args, kwargs, out))
        if self._fused is None:
            self.seen.launches["eager"] += not self._on_chip and func not in EMPTY
            if count is None and func not in EMPTY:
                self._moved(args, out)
            self._made(out)
        elif count is not None:
            self._fused.append(out)
            self._made(out)
        return out

    def _product(self, kind: Any, flops: int, out: Tensor, groups: int, rows: int) -> None:
        full = tiled(flops, rows, out.shape[-1], groups)
        self.seen.products, self.seen.tiled = self.seen.products + flops, self.seen.tiled + full
        self.seen.fp8 += full if kind in SCALED else 0
        self.seen.grouped += full if kind in GROUPED else 0

    def _collective(self, func: Any, args: Any, kwargs: Any) -> Any:
        name, x = func._schema.name.split("::")[1], args[0]
        if name == "wait_tensor":
            self._sent.pop(x.untyped_storage()._cdata, None)
            return x
        group, kind = args[-1], KINDS[name]
        if kind == "all_gather":
            out = kwargs["out"]
        elif kind == "reduce_scatter":
            out = x.new_empty(x.shape[0] // args[2], *x.shape[1:])
        elif kind == "all_to_all":
            out = x.new_empty(sum(args[1]), *x.shape[1:])
            if sum(map(bool, args[2])) == 1:  # all of it goes to one rank, as in `olmo_fn.mesh.collectives.ring_shift`
                kind = "ring_shift"
        else:
            out = torch.empty_like(x)
        self.seen.traffic[group, kind, "calls"] += 1
        self.seen.traffic[group, kind, "bytes"] += (out if kind == "all_gather" else x).nbytes
        if kind == "all_to_all":
            self.seen.beyond[group, kind, "bytes"] += max(0, out.nbytes - x.nbytes)
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
    def on_chip(self, moved: int) -> Iterator[None]:
        """Only so many bytes count as moved, whatever is done inside."""
        self.seen.moved += 0 if self._on_chip else moved
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
        """``fn`` as one compiled kernel, run once for the same shapes: only its results take memory."""

        def run(*args: Any) -> Any:
            inputs = leaves(args)
            key = (fn, *((x.shape, x.stride(), x.dtype) for x in inputs))
            if key not in self._results:
                before = self.seen.products, self.seen.tiled
                with self._kernel():
                    out = fn(*args)
                    at = {x.untyped_storage()._cdata: i for i, x in enumerate(inputs)}
                    like = rebuild(out, lambda x: at.get(x.untyped_storage()._cdata, torch.empty_like(x)))
                self._results[key] = like, (self.seen.products - before[0], self.seen.tiled - before[1])
            else:
                like, flops = self._results[key]
                self.seen.products, self.seen.tiled = self.seen.products + flops[0], self.seen.tiled + flops[1]
                out = tree_map(lambda x: inputs[x] if isinstance(x, int) else x if x is None else torch.empty_like(x), like)
            self._called(inputs, out)
            self._made(out)
            return out

        return run

    def _called(self, inputs: Any, outputs: Any) -> None:
        self.seen.launches["compiled"] += not self._on_chip
        self._moved(inputs, outputs)

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
        trace._called(tensors, results)
        trace._made(results)
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        trace, inside, results, kept = ctx.graph
        del ctx.graph
        with trace._kernel():
            grads = torch.autograd.grad(results, inside, cotangents)
        trace._called((cotangents, inside, kept), grads)
        trace._made(grads)
        return None, None, *grads


class OnGpu(TorchFunctionMode):
    """Meta tensors say that they are on a GPU, by which a step chooses what it does; what is to be made there, is meta.

    Autograd leaves the mode during a backward: `inside` makes a function that is in it anyway.

    >>> with OnGpu():
    ...     torch.empty(2, device="cuda").device
    device(type='cuda', index=0)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == Tensor.device.__get__ and args[0].is_meta:
            return torch.device("cuda", 0)
        if func == Tensor.is_cuda.__get__ and args[0].is_meta:  # type: ignore[attr-defined]
            return True
        if func is Tensor.to:
            args = tuple("meta" if _is_cuda(x) else x for x in args)
        if _is_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)

    def inside(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn``, in this mode."""

        def run(*args: Any) -> Any:
            with self:
                return fn(*args)

        return run


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, torch.device) and device.type == "cuda") or (isinstance(device, str) and device[:4] == "cuda")


def groups_of(kind: Any, out: Tensor, args: Any, kwargs: Any) -> tuple[int, int]:
    """How many groups a product has, and rows in each of them; those of experts are taken to be even."""
    if kind not in GROUPED:
        return 1, math.prod(out.shape[:-1])
    groups = len(args[2] if len(args) > 2 else kwargs["offs"]) if kind == aten._grouped_mm else len(out)
    return groups, out.shape[1] if out.ndim == 3 else -(-len(out) // groups)


def leaves(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, lists and dicts."""
    return tuple(x for x in tree_leaves(value) if isinstance(x, Tensor))


def rebuild(value: Any, f: Callable[[Tensor], Any]) -> Any:
    """The same nest with every tensor replaced by ``f`` of it, in the order of `leaves`."""
    return tree_map_only(Tensor, f, value)


def nbytes(value: Any) -> int:
    """Bytes of all tensors in a nest."""
    return sum(x.nbytes for x in leaves(value))
