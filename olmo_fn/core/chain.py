"""A loss as a chain of stages, and what the stages are given: the contract between models and the engines.

Losses are *sums* over tokens. A gradient is divided once, by ``batch["loss_tokens"]`` or else by the number of labels in
the batch, so that splitting a batch in any way (accumulation, data parallelism) gives the same gradient.

Every stage is ``(p, x, ctx) -> (x, Aux)`` with one tensor x (B, T, D) between stages, so that pipelines, rematerialisation,
sharding and plans may cut anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.check import check_batch, check_shapes, check_tensors
from olmo_fn.core.primitive import WeightGrads
from olmo_fn.kernels import Function, Kernel, identity
from olmo_fn.kernels.attention_table import Choose, choose_auto
from olmo_fn.kernels.float8 import Form
from olmo_fn.mesh.axis import SINGLE_DEVICE, Axes, CPMethod
from olmo_fn.spec import Spec
from olmo_fn.tree import Tree

IGNORE = -100  # the label of a position that has no loss
Batch: TypeAlias = dict[str, Tensor]
Metrics: TypeAlias = dict[str, Tensor]
LossFunction: TypeAlias = Callable[[Tree, Batch], tuple[Tensor, Metrics]]


def loss_tokens(batch: Batch) -> Tensor:
    """What the summed loss is divided by: the batch's ``loss_tokens``, or its labels that are not `IGNORE`. 0-d.

    >>> loss_tokens({"labels": torch.tensor([[5, 7, -100]])})
    tensor(2)
    """
    if "loss_tokens" in batch:
        return batch["loss_tokens"]
    if "labels" not in batch:
        has = ", ".join(batch) or "nothing"
        raise ValueError(f"this batch has {has}; the summed loss is divided by the number of its labels, or by loss_tokens")
    return (batch["labels"] != IGNORE).sum()


class Metric(NamedTuple):
    """How a metric becomes one value for the whole batch, and its shape.

    ``mean``: stages report sums over their tokens, which are added up and divided by the loss tokens of the batch (as the loss
    is); ``sum``: reports are added up; ``max``: the largest is taken, entry by entry.
    """

    how: Literal["mean", "sum", "max"] = "mean"
    shape: tuple[int, ...] = ()


class Aux(NamedTuple):
    """What a stage gives beside x: a term of the loss (0-d, a sum over its tokens, added to all others), and metrics.

    Across data and context parallel ranks each reports for its own tokens. Ranks of ``tp`` all report the same: a stage whose
    tokens are split over ``tp`` sums over it first. Metrics are declared in `Stage.metrics`.
    """

    loss: Tensor | None = None
    metrics: Mapping[str, Tensor] = {}


NOTHING = Aux()


def bind(fn: Function, *constants: Any) -> Function:
    """``fn`` with its first arguments given: how `Backend.fuse` makes a function of tensors, here without compiling it."""

    def bound(*tensors: Tensor) -> Any:
        return fn(*constants, *tensors)

    return bound


@dataclass(frozen=True)
class Backend:
    """How a stage computes; never what. An engine hands it to the chain, which puts it into the stages' context.

    ``primitive`` makes operations with a backward of their own, as `olmo_fn.core.primitive.primitive` does (the tape); None:
    stages use plain operations that can be differentiated any number of times (``torch.func``). ``fuse(fn, *constants)``
    compiles an elementwise function of tensors that autograd goes through, ``kernel(fn)`` one that it does not.
    ``attention(need)`` chooses the backend of attention.
    ``weight_grads(weight, gradient)``, if given, takes from a primitive the gradient of a weight, as a function that computes
    it; False: it is not wanted there. ``loss_weight`` (0-d) is what the engine will multiply the loss by in its backward, a
    hint for primitives that form gradients on their way forward; None where there will be no backward. ``skew``: of rows whose
    number only data decides, such as those for a rank's experts, a plan has so many times the even number.
    """

    primitive: Callable[..., Any] | None = None
    axes: Axes = SINGLE_DEVICE
    cp_method: CPMethod = "gather"
    dtype: torch.dtype | None = None
    fuse: Callable[..., Function] = bind
    kernel: Kernel = identity
    attention: Choose = choose_auto
    weight_grads: WeightGrads | None = None
    loss_weight: Tensor | None = None
    skew: float = 1.0


PLAIN = Backend()


class Stage(NamedTuple):
    """One pure function of a chain, ``fn(p, x, ctx) -> (x, Aux)``.

    ``params`` are pairs (key in p, path in the parameters). The first stage gets None for x, and the last one's x is not used.
    ``block``: the block of the model that it is part of. ``metrics``: those that its `Aux` has.
    """

    name: str
    params: tuple[tuple[str, str], ...]
    fn: Callable[[Tree, Any, Any], tuple[Any, Aux]]
    block: int | None = None
    metrics: Mapping[str, Metric] = {}

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of the subtrees that it uses."""
        return tuple(path for _, path in self.params)

    def select(self, subtrees: Mapping[str, Any]) -> Tree:
        """Its ``p``, out of subtrees by path."""
        return {key: subtrees[path] for key, path in self.params}


def agreed(reporters: Iterable[tuple[str, Mapping[str, Metric]]]) -> dict[str, Metric]:
    """All metrics of reporters, each a name and what it declares. ValueError if two mean different things by a name."""
    found: dict[str, Metric] = {}
    for reporter, declared in reporters:
        for name, metric in declared.items():
            if found.setdefault(name, metric) != metric:
                raise ValueError(f"the metric {name!r} is {found[name]} in one stage and {metric} in {reporter!r}")
    return found


def refuse_axes(axes: Axes, cp_method: CPMethod) -> None:
    """ValueError for tensor and context parallelism: what a chain says whose stages are not written for them."""
    for axis in (axes.tp, axes.cp):
        if axis.size > 1:
            raise ValueError(
                f"--mesh.{axis.name} is {axis.size}, but the loss is not written for it; give a Chain that says how it is "
                "divided (`Chain.check`), or use data parallelism only"
            )


@dataclass(frozen=True)
class Chain:
    """A loss that is a chain of stages; call it as ``(params, batch) -> (sum of losses, metrics)``.

    Called, it is an ordinary pure function for ``torch.func`` and notebooks. The tape engine walks its stages instead.
    """

    context: Callable[[Batch, Backend], Any]
    """What all stages of a batch share: a frozen dataclass with at least a field ``backend``."""
    stages: tuple[Stage, ...]
    empty: Callable[[Any], Tensor] | None = None
    """From the context, an empty tensor like x between two stages; None: it cannot be a pipeline."""
    uncast: frozenset[str] = frozenset()
    """Paths of matrices that the stages take as they are stored, and cast themselves."""
    looked_up: frozenset[str] = frozenset()
    """Paths of tables of which the stages only look up rows, and take a rank's columns for the table (`Rules.exchanged`)."""
    float8: Mapping[str, Form] = field(default_factory=dict, repr=False)
    """Matrices that come into use in float8, by path (`olmo_fn.transforms.float8`); the stages use them in products only."""
    check: Callable[[Axes, CPMethod], None] = refuse_axes
    """ValueError if the stages cannot be divided over these axes."""
    takes: Callable[[Any], None] = check_batch
    """ValueError for a batch that ``context`` makes nothing of."""
    specs: Tree = field(default_factory=dict, repr=False)
    """The parameters that it was made for; none: not known. Stages that were changed may use others."""

    def changed(self, change: Callable[[Stage], Stage]) -> Chain:
        """The chain with every stage changed."""
        return replace(self, stages=tuple(map(change, self.stages)))

    def check_parameters(self, params: Tree) -> None:
        """ValueError for parameters, or specs of them, that are not its own, if it knows its own."""
        if self.specs:
            check_shapes(params, *self._parameters)

    @cached_property
    def _parameters(self) -> tuple[dict[str, Spec], list[str], set[str]]:
        """Those that it was made for, which of them its stages use, and the paths of what they use besides."""
        specs, used = tree.flatten(self.specs), {path for stage in self.stages for path in stage.paths}
        known = {top for path in specs for top in tree.ancestors(path)}
        return specs, [path for path in specs if not used.isdisjoint(tree.ancestors(path))], used - known

    @property
    def metrics(self) -> dict[str, Metric]:
        """All metrics of its stages. ValueError if two stages mean different things by a name."""
        return agreed((stage.name, stage.metrics) for stage in self.stages)

    def __call__(self, params: Tree, batch: Batch, backend: Backend = PLAIN) -> tuple[Tensor, Metrics]:
        check_tensors(params)
        self.check_parameters(params)
        self.takes(batch)
        return self.sum(params, batch, backend)

    def sum(self, params: Tree, batch: Batch, backend: Backend) -> tuple[Tensor, Metrics]:
        """The same, of parameters that are known to be its own."""
        ctx, x, sums = self.context(batch, backend), None, Sums(self.metrics)
        for stage in self.stages:
            x, aux = stage.fn({key: tree.at(params, path) for key, path in stage.params}, x, ctx)
            sums.add(stage, aux)
        return sums.loss(), sums.metrics


class Sums:
    """Adds up what the stages of a chain report: ``loss()``, and ``metrics`` by the rule of each."""

    def __init__(self, declared: Mapping[str, Metric]) -> None:
        self.declared = declared
        self.total: Tensor | None = None
        self.metrics: Metrics = {}

    def add(self, stage: Stage, aux: Aux) -> None:
        """Add one stage's report. ValueError, with its name, for a metric that it has not declared."""
        if aux.loss is not None:
            self.total = wide(aux.loss) if self.total is None else self.total + wide(aux.loss)
        for name, value in aux.metrics.items():
            if name not in stage.metrics:
                declared = ", ".join(stage.metrics) or "none"
                raise ValueError(f"stage {stage.name!r} reports the metric {name!r} and declares {declared}; declare it")
            self.metrics = add_metrics(self.metrics, {name: wide(value.detach())}, self.declared)

    def loss(self) -> Tensor:
        """The sum of all losses."""
        if self.total is None:
            raise ValueError("no stage of the chain gives a loss; the last one must")
        return self.total

    def complete(self, like: Tensor) -> Metrics:
        """``loss`` and every declared metric, in the dtype of ``like``.

        Where nothing was reported, as other ranks of a pipeline do, sums are 0 and maxima -inf: both change nothing.
        """
        every = {"loss": Metric(), **self.declared}
        nothing = {name: like.new_full(m.shape, -torch.inf if m.how == "max" else 0.0) for name, m in every.items()}
        loss = {} if self.total is None else {"loss": self.total.detach()}
        return {**nothing, **{name: value.to(like.dtype) for name, value in {**loss, **self.metrics}.items()}}


def wide(x: Tensor) -> Tensor:
    """A tensor in at least fp32; integers as they are."""
    return x if x.dtype == torch.float64 or not x.is_floating_point() else x.float()


def add_metrics(a: Metrics, b: Metrics, declared: Mapping[str, Metric]) -> Metrics:
    """Metrics of two parts of a batch together: the larger of those declared ``max``, the sum of all others."""
    both = dict(a)
    for name, value in b.items():
        largest = name in declared and declared[name].how == "max"
        both[name] = value if name not in both else torch.maximum(both[name], value) if largest else both[name] + value
    return both


def per_token(metrics: Metrics, tokens: Tensor, declared: Mapping[str, Metric]) -> Metrics:
    """Sums over tokens become means over all tokens that count, but for metrics declared as something else."""
    means = {name for name in metrics if name not in declared or declared[name].how == "mean"}
    return {name: (value / tokens if name in means else value).detach() for name, value in metrics.items()}
