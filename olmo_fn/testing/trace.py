"""What a program would do on a GPU, seen on fake tensors: where it mixes devices, waits for the device, and what it launches.

Run it under `torch._subclasses.FakeTensorMode` on ``cuda`` tensors (in `olmo_fn.testing.FakeCuda` where torch has no CUDA) and
inside of a `Trace`. Nothing is computed, so a step of any size takes as long as its Python does.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorDeviceMismatchError
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import olmo_fn
from olmo_fn.core.step import Step

aten = torch.ops.aten
PACKAGE, TORCH = Path(olmo_fn.__file__).parent, Path(torch.__file__).parent
HELPERS = {Path(__file__), PACKAGE / "testing" / "emulated_cuda.py", PACKAGE / "mesh" / "collectives.py"}
"""Files whose lines are no places: what called them is."""
ALLOCATES = {
    aten.empty.memory_format,
    aten.empty_strided.default,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.new_empty_strided.default,
    aten.resize_.default,
    aten.set_.source_Storage_storage_offset,
    aten.lift_fresh.default,
    aten.alias.default,
    aten.detach.default,
    aten._reshape_alias.default,
    aten._unsafe_view.default,
}
"""What launches no kernel, though its schema does not say that it gives a view."""
READS_RESULT = {aten.embedding.default, aten.index.Tensor, aten.gather.default, aten.index_select.default}
"""What reads of its first tensor no more than it gives."""
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default}
"""What the host cannot go on without the values of; so is every ``unique``."""


class DeviceMismatch(RuntimeError):
    """An operation got tensors on different devices; the text says where."""


@dataclass
class Seen:
    """What a `Trace` saw. Places are of the code that called torch: ``nn/embedding.py:56``.

    ``launches``: eager kernels by operation, an operation being counted as one; views and allocations are none. ``calls``:
    those of compiled functions, by name, of a stage both ways. ``syncs``: operation and place of each time the host waits
    for the device. ``collectives``: by kind; ``waited``: kind and place of those that are waited for with nothing launched
    since. ``peak``: bytes of all live storages at the largest moment. ``moved``: bytes that launches read and write, compiled
    ones their arguments and results.
    """

    launches: Counter[str] = field(default_factory=Counter)
    calls: Counter[str] = field(default_factory=Counter)
    syncs: Counter[str] = field(default_factory=Counter)
    collectives: Counter[str] = field(default_factory=Counter)
    waited: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    moved: int = 0

    @property
    def launched(self) -> int:
        """Eager kernels and compiled calls together."""
        return self.launches.total() + self.calls.total()

    def table(self, rows: int = 12) -> str:
        """A few lines to read: sums, and the most frequent of each kind."""
        lines = [
            f"{self.launched:,} launches: {self.launches.total():,} eager, {self.calls.total():,} compiled; "
            f"{self.syncs.total():,} host synchronisations; {self.collectives.total():,} collectives; "
            f"{self.peak / 2**30:.2f} GiB at the peak; {self.moved / 1e9:,.1f} GB moved"
        ]
        for kind in ("launches", "calls", "syncs", "collectives", "waited"):
            lines += [f"  {kind:<12}{n:>8,}  {name}" for name, n in getattr(self, kind).most_common(rows)]
        return "\n".join(lines)


class Trace(TorchDispatchMode):
    """A mode to run a program in; what it saw is ``seen``, ``live`` are the bytes that live now.

    >>> with torch._subclasses.FakeTensorMode(), Trace() as trace:
    ...     x = torch.ones(2, 8)
    ...     y = x.t() * 2
    >>> trace.seen.launched, trace.seen.peak  # on a CPU nothing is launched
    (0, 128)
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.seen = Seen()
        self.live = 0
        self._sizes: dict[int, int] = {}  # of each live storage, by its address
        self._refs: dict[int, weakref.ref[Any]] = {}
        self._inside = 0  # of a compiled call
        self._issued: dict[int, tuple[str, int]] = {}  # by storage: collectives under way, and the launches before each

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:  # torch asks a fake tensor for its device, tens of thousands of times
            return func(*args, **kwargs)
        try:
            out = func(*args, **kwargs)
        except FakeTensorDeviceMismatchError as error:
            devices = " and ".join(sorted({str(device_of(x)) for x in leaves((args, kwargs))}))
            raise DeviceMismatch(f"{place()}: {func} gets tensors on {devices}") from error
        except RuntimeError as error:
            if func in WAITS or "DataDependent" in type(error).__name__:
                raise RuntimeError(f"{place()}: {func} asks a fake tensor for its values") from error
            raise
        if isinstance(func, HigherOrderOperator):  # flex_attention, and its like: a kernel that is compiled
            if not self._inside:
                self.seen.launches[func.name()] += 1
                self._made(args, out)
            return out
        name = func._schema.name
        if func.namespace in ("_c10d_functional", "c10d"):
            self._collective(name.split("::")[1], args, out)
        elif _on_cuda(args, kwargs, out):
            if waits(func, args, kwargs, out):
                self.seen.syncs[f"{name} {place()}"] += 1
            if not self._inside and not func.is_view and func not in ALLOCATES:
                self.seen.launches[name] += 1
                self._moved(args[1:] if func in READS_RESULT else args, out)
        if not func.is_view and not self._inside:
            self.holds(out)
        return out

    def _moved(self, *values: Any) -> None:
        self.seen.moved += sum(map(touched, leaves(values)))

    def _collective(self, kind: str, args: Any, out: Any) -> None:
        keys = [x.untyped_storage()._cdata for x in leaves(out if kind != "wait_tensor" else args)]
        if kind != "wait_tensor":
            self.seen.collectives[kind] += 1
            self._issued.update((key, (kind, self.seen.launched)) for key in keys)
            return
        for key in keys:
            issued, before = self._issued.pop(key, ("", -1))
            if before == self.seen.launched:
                self.seen.waited[f"{issued} {place()}"] += 1

    # --- what is live -------------------------------------------------------------------------------------------------

    def holds(self, tensors: Any) -> None:
        """Count the storages of these tensors as live until they are gone; those that are made in here are anyway."""
        for tensor in leaves(tensors):
            storage = getattr(tensor, "_local_tensor", tensor).untyped_storage()  # a DTensor has no memory but its part's
            key = storage._cdata
            if key not in self._refs:
                self._refs[key] = weakref.ref(storage, partial(self._gone, key))
                self._count(key, storage.nbytes())

    def _count(self, key: int, size: int) -> None:
        self.live += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.seen.peak = max(self.seen.peak, self.live)

    def _gone(self, key: int, _: Any) -> None:
        self.live -= self._sizes.pop(key, 0)
        self._refs.pop(key, None)

    def __enter__(self) -> Self:
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: Any, size: int) -> Any:  # memory is given back and taken again, of which torch tells nobody
            out = resize(storage, size)
            if storage._cdata in self._refs:
                self._count(storage._cdata, size)
            return out

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign,assignment]
        self._eager = torch.compiler.set_stance("force_eager")  # what compiles itself is seen as it is
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        self._eager.__exit__(None, None, None)
        super().__exit__(*exception)

    # --- compiled calls -----------------------------------------------------------------------------------------------

    def compiled(self, step: Step) -> Step:
        """The step as `olmo_fn.core.compile.compile` would make it: each stage and each kernel is one call, both ways."""
        execution = replace(step.execution, fuse=self.stage, kernel=self.kernel)
        return replace(step, execution=execution)

    def kernel(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """``fn`` as one compiled call that autograd does not go through."""

        def run(*args: Any) -> Any:
            with self._call(name_of(fn)):
                out = fn(*args)
            self._made(args, out)
            return out

        return run

    def stage(self, fn: Callable[..., Any], *constants: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            wanted = [x for x in leaves(args) if x.requires_grad]
            results: list[Any] = []

            def inside(*tensors: Tensor) -> tuple[Tensor, ...]:
                found = iter(tensors)
                results.append(fn(*constants, *tree_map_only(Tensor, lambda x: next(found) if x.requires_grad else x, args)))
                return leaves(results[0])

            out = iter(_Stage.apply(self, name_of(fn), inside, *wanted))
            self._made(args, ())
            return tree_map_only(Tensor, lambda x: next(out), results[0])

        return run

    @contextmanager
    def _call(self, name: str) -> Iterator[None]:
        if not self._inside:
            self.seen.calls[name] += 1
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def _made(self, inputs: Any, results: Any) -> None:
        if not self._inside:
            self._moved(inputs, results)
            self.holds(results)


class _Stage(Function):
    """A compiled stage: its inside is one call forward and one backward."""

    @staticmethod
    def forward(ctx: Any, trace: Trace, name: str, fn: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> Any:
        ctx.set_materialize_grads(False)
        with torch.enable_grad(), trace._call(name):
            inside = tuple(x.detach().requires_grad_() for x in tensors)
            results = fn(*inside)
        ctx.graph = trace, name, inside, results
        trace._made((), results)
        return tuple(x.detach() for x in results)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> Any:
        trace, name, inside, results = ctx.graph
        del ctx.graph
        given = [(x, g) for x, g in zip(results, cotangents, strict=True) if g is not None]
        with trace._call(f"{name} backward"):
            grads = torch.autograd.grad([x for x, _ in given], inside, [g for _, g in given], allow_unused=True)
        trace._made((cotangents, inside), grads)
        return None, None, None, *grads


# --- what an operation is ---------------------------------------------------------------------------------------------


def waits(func: Any, args: Any, kwargs: Any, out: Any) -> bool:
    """Whether the host waits for the device: it needs values, or copies between the two in pageable memory."""
    if func in WAITS or "unique" in func._schema.name:
        return True
    if func is aten._to_copy.default:
        return device_of(args[0]).type != device_of(out).type and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return device_of(args[0]).type != device_of(args[1]).type and not (
            args[2] if len(args) > 2 else kwargs.get("non_blocking")
        )
    return False


def leaves(value: Any) -> tuple[Tensor, ...]:
    """The tensors in nested tuples, lists and dicts."""
    return tuple(x for x in tree_leaves(value) if isinstance(x, Tensor))


def device_of(x: Tensor) -> torch.device:
    """Its device; of a fake tensor, without asking torch, which takes long."""
    return x.fake_device if isinstance(x, FakeTensor) else x.device


def touched(x: Tensor) -> int:
    """Bytes of the entries that a tensor has in memory: those that it repeats count once.

    >>> touched(torch.zeros(3, 1).expand(3, 5))
    12
    """
    return math.prod(size for size, stride in zip(x.shape, x.stride(), strict=True) if stride or not size) * x.element_size()


def name_of(fn: Any) -> str:
    """The name of a function, that of what a ``partial`` is of."""
    return getattr(fn, "__name__", None) or name_of(getattr(fn, "func", type(fn)))


def place() -> str:
    """Where the program is: the innermost line that is neither torch's nor of `HELPERS`."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path not in HELPERS and not path.is_relative_to(TORCH) and path.suffix == ".py":
            inside = path.relative_to(PACKAGE) if path.is_relative_to(PACKAGE) else path.name
            return f"{inside}:{frame.f_lineno}"
        frame = frame.f_back
    return "?"


def _on_cuda(*values: Any) -> bool:
    return any(device_of(x).type == "cuda" for x in leaves(values))
