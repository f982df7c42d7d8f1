"""A step as a CUDA graph: recorded once, and from then on one launch, where a small model's host is slower than its GPU.

A graph repeats what was launched on the same addresses. A step with `donate` has its state at fixed ones, but for the small
slots of transforms, which are copied back inside the graph; the batch is copied into tensors of the graph's own before it runs,
and the metrics out of it afterwards. All else that changes from step to step is a tensor already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metrics
from olmo_fn.core.offload import no_stash
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import State, Step, check_state, spend
from olmo_fn.core.update import same_memory

WARM = 2
"""Steps of every shape of a batch that are done as ever before one is recorded: they compile, and make what libraries keep."""


class Graph(Protocol):
    """What `capture` wants of a graph: `CudaGraph` is one."""

    def recording(self) -> AbstractContextManager[Any]:
        """Inside, what would be done is recorded, and not done. RuntimeError for what waits for a result."""

    def replay(self) -> None:
        """Do all of it, on the same memory."""


class CudaGraph:
    """A CUDA graph. Those of one ``pool`` share memory for what lives within them: they never run at the same time."""

    def __init__(self, pool: Any) -> None:
        self.graph, self.pool = torch.cuda.CUDAGraph(), pool

    def recording(self) -> AbstractContextManager[Any]:
        """On a stream of its own; other threads, which bring batches and watch over NCCL, go on."""
        return torch.cuda.graph(self.graph, pool=self.pool, capture_error_mode="thread_local")

    def replay(self) -> None:
        """Launch it on the current stream."""
        self.graph.replay()


def cuda_graphs() -> Callable[[], Graph]:
    """Makes graphs that share a pool."""
    pool: list[Any] = []

    def make() -> Graph:
        pool[:] = pool or [torch.cuda.graph_pool_handle()]
        return CudaGraph(*pool)

    return make


def capture(graphs: Callable[[], Callable[[], Graph]] = cuda_graphs, device: str = "cuda") -> Transform[Step, Step]:
    """Record the step as a CUDA graph, one for each shape of a batch, and replay it: invisible but for speed. Goes last.

    It needs `donate`; what reads a number on the host cannot be recorded, such as `olmo_fn.optim.soap`, nor can a pipeline.
    The first `WARM` steps of a shape are done as ever. ValueError, in one line, for what cannot be recorded. ``graphs`` gives
    what makes a `Graph` of work on a kind of ``device``.

        step = pipe(transformer.loss(model), grad(), adamw(1e-3), donate(), compile(), capture())
    """

    def apply(step: Step) -> Step:
        if not step.execution.donate:
            raise ValueError("capture() repeats a step on the same memory, which needs donate() before it in the pipe")
        if step.execution.stash is not no_stash:
            raise ValueError("capture() cannot record copies to host memory; leave out offload() (--recipe.no-offload)")
        if step.execution.layout.sweep is not None:
            raise ValueError("capture() cannot record a pipeline, whose ranks wait for each other: leave it out (--mesh.pp)")
        return Captured(**{f.name: getattr(step, f.name) for f in fields(step)}, graphs=graphs(), device=device)

    return Transform("capture()", Step, Step, apply, frozenset({"captures"}), {"captures": "would record a recorded step"})


@dataclass(frozen=True, repr=False)
class Captured(Step):
    """A step that is recorded when it is called; changed by another transform, it is recorded anew."""

    graphs: Callable[[], Graph] = field(default_factory=cuda_graphs)
    device: str = "cuda"
    memory: Memory = field(default_factory=lambda: Memory(), init=False, compare=False)

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        check_state(state)
        self.grads.check_batch(batch)
        if (there := state.step.device.type) != self.device:
            raise ValueError(f"capture() makes a graph for {self.device}, and this state is on {there}; leave capture() out")
        memory, shape = self.memory, tuple(sorted((name, x.dtype, x.shape) for name, x in batch.items()))
        memory.take(state)
        if shape not in memory.recorded and memory.warm[shape] < WARM:
            memory.warm[shape] += 1
            new, metrics = super().__call__(state, batch)
            self.settle(state, new)
            return memory.state(), metrics
        if shape not in memory.recorded:
            memory.recorded[shape] = self.record(batch)
        spend(state)
        return memory.state(), memory.recorded[shape].run(batch)

    def record(self, batch: Batch) -> Recorded:
        """A graph of the step from the state in memory and a batch of this shape. Nothing is done yet."""
        graph = self.graphs()
        fixed = {name: x.clone() for name, x in batch.items()}
        try:
            with graph.recording():
                before = self.memory.state()
                new, metrics = super().__call__(before, fixed)
                self.settle(before, new)
                packed = pack(metrics)
        except RuntimeError as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"capture() cannot record this step ({why}); leave out --recipe.capture") from error
        form = {name: (x.dtype, x.shape) for name, x in metrics.items()}
        return Recorded(graph, fixed, packed, form)

    def settle(self, old: State, new: State) -> None:
        """Bring a new state into the memory of the old one, as far as it is not there."""
        local = self.execution.layout.placement.to_local
        here, there = (leaves(State(s.step, local(s.params), local(s.slots))) for s in (old, new))
        own = {x.untyped_storage()._cdata for x in here}
        moved = [(x, y) for x, y in zip(here, there, strict=True) if not same_memory(x, y)]
        apart = [y.clone() if y.untyped_storage()._cdata in own else y for _, y in moved]
        with torch.no_grad():
            for (x, _), y in zip(moved, apart, strict=True):
                x.copy_(y)


class Memory:
    """The state that graphs were recorded for, and those graphs by the batch's shape."""

    def __init__(self) -> None:
        self.own: State | None = None
        self.held: list[Tensor] = []
        self.recorded: dict[Shape, Recorded] = {}
        self.warm: Counter[Shape] = Counter()

    def take(self, state: State) -> None:
        """Go on with this state: with the graphs, if it is the one that they are for, else without any."""
        found = leaves(state)
        known = len(found) == len(self.held) and all(x is y for x, y in zip(found[1:], self.held[1:], strict=True))
        if not (known and same_memory(found[0], self.held[0])):
            self.own, self.held, self.recorded, self.warm = state, found, {}, Counter()

    def state(self) -> State:
        """The state, with a ``step`` that is not marked as spent."""
        assert self.own is not None
        return self.own._replace(step=self.own.step.detach())


@dataclass(frozen=True)
class Recorded:
    """A graph, the batch that it reads, and the metrics that it writes: ``form`` is their names, dtypes and shapes."""

    graph: Graph
    batch: Batch
    metrics: Tensor
    form: Mapping[str, tuple[torch.dtype, torch.Size]]

    def run(self, batch: Batch) -> Metrics:
        """Replay it for another batch; the metrics are a copy, for the next replay writes over its own."""
        for name, x in batch.items():
            self.batch[name].copy_(x, non_blocking=True)
        self.graph.replay()
        return unpack(self.metrics.clone(), self.form)


Shape: TypeAlias = tuple[Any, ...]
ALIGN = 8


def pack(metrics: Metrics) -> Tensor:
    """All metrics as bytes, so that one copy takes them out of a graph."""
    return torch.cat([_padded(x.contiguous().view(-1).view(torch.uint8)) for x in metrics.values()])


def unpack(data: Tensor, form: Mapping[str, tuple[torch.dtype, torch.Size]]) -> Metrics:
    """The inverse of `pack`.

    >>> unpack(pack({"n": torch.tensor([3, 4]), "x": torch.tensor(0.5)}), {"n": (torch.int64, (2,)), "x": (torch.float32, ())})
    {'n': tensor([3, 4]), 'x': tensor(0.5000)}
    """
    found, start = {}, 0
    for name, (dtype, shape) in form.items():
        size = torch.Size(shape).numel() * dtype.itemsize
        found[name] = data[start : start + size].view(dtype).view(shape)
        start += size + -size % ALIGN
    return found


def _padded(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -len(x) % ALIGN))


def leaves(state: State) -> list[Tensor]:
    """All tensors of a state, ``step`` first."""
    parts: Iterable[Any] = (state.step, state.params, state.slots)
    return [leaf for part in parts for _, leaf in tree.items(part)]
