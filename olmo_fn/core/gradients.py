"""From a loss to its gradients: what a gradient function is given and gives, and the engine that is ``torch.func``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, NoReturn, TypeAlias, get_args

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Backend, Batch, Chain, LossFunction, Metric, Metrics, bind, loss_tokens, per_token, wide
from olmo_fn.core.check import check_batch, check_loss, check_tensors
from olmo_fn.core.layout import SINGLE, Layout, arrive
from olmo_fn.core.offload import Stash, no_stash
from olmo_fn.core.primitive import primitive
from olmo_fn.kernels import Function, Kernel, identity
from olmo_fn.kernels.attention_table import Choose, choose_auto
from olmo_fn.tree import Tree

Engine: TypeAlias = Literal["tape", "func"]
ENGINES = get_args(Engine)


def everything(path: str) -> bool:
    """True: every gradient is wanted."""
    return True


@dataclass(frozen=True)
class Execution:
    """How a step is carried out, never what it computes.

    ``primitive``, ``fuse``, ``kernel`` and ``attention`` go to the chain's `Backend`; ``donate`` lets an update write into the
    memory of the state it replaces; ``layout`` says where things are; ``dtype`` is that of matrices and activations. ``wants``
    says of a path whether its gradient is asked for; the tree of gradients has no others. ``differentiable`` keeps what a
    derivative of the whole step needs. ``together``: the most elementwise updates in one call, see `updates_a_call`. ``stash``
    makes, for each sweep, what keeps the inputs of segments that run twice. ``step`` () is the number of steps before this one,
    None where gradients are taken outside of a step: what a transform needs to do something else at each, such as noise
    (`olmo_fn.core.random.normal`).
    """

    primitive: Callable[..., Any] = primitive
    fuse: Callable[..., Function] = bind
    kernel: Kernel = identity
    attention: Choose = choose_auto
    donate: bool = False
    layout: Layout = SINGLE
    dtype: torch.dtype = torch.float32
    wants: Callable[[str], bool] = everything
    differentiable: bool = False
    together: int | None = None
    stash: Callable[[], Stash] = no_stash
    step: Tensor | None = None

    def updates_a_call(self, device: torch.device) -> int:
        """``together``, or what suits the device: on a GPU to call a compiled update takes longer than its kernel does."""
        return self.together or (16 if device.type == "cuda" else 1)

    def backend(self, tokens: Tensor | None = None) -> Backend:
        """What the tape hands to a chain; ``tokens``: the loss tokens of the batch, if there will be a backward."""
        sharing = self.layout.sharing
        weight = None if tokens is None else of_mean(tokens, self.dtype)
        how = self.primitive, sharing.axes, sharing.cp_method, self.dtype, self.fuse, self.kernel, self.attention
        return Backend(*how, loss_weight=weight)


EAGER = Execution()


def of_mean(tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The cotangent of the summed loss, so that the gradient is that of the mean: 1 / ``tokens``, in at least fp32."""
    return 1.0 / tokens.to(torch.promote_types(dtype, torch.float32))


class Signals(NamedTuple):
    """What transforms tell the update, beside the metrics that they tell people. All are 0-d tensors, or None.

    ``scale``: a factor that the gradients still lack. ``skip``: make no update. ``lr_scale``: a factor of the learning rate.
    """

    scale: Tensor | None = None
    skip: Tensor | None = None
    lr_scale: Tensor | None = None

    def skipping(self, when: Tensor) -> Signals:
        """These signals, and no update ``when`` (a bool) is true."""
        return self._replace(skip=when if self.skip is None else self.skip | when)


class Gradients(NamedTuple):
    """What a gradient function gives: a tree in the dtype of the computation, which may lack ``signals.scale``; and metrics."""

    tree: Tree
    metrics: Metrics
    signals: Signals = Signals()

    def finished(self, execution: Execution = EAGER) -> Gradients:
        """The same gradients in at least fp32, with nothing lacking. Consumes them, unless ``execution.differentiable``."""
        grads, scale = tree.map(wide, self.tree), self.signals.scale
        if scale is not None:
            scaled = torch.mul if execution.differentiable else Tensor.mul_
            grads = tree.map(lambda g: scaled(g, scale), grads)
        return Gradients(grads, self.metrics, self.signals._replace(scale=None))


def reported(metrics: Metrics, gradients: Iterable[str], batch: Batch, declared: Mapping[str, Metric]) -> Metrics:
    """Metrics as people see them: in a batch without a label means are 0, of 0 tokens, and not NaN.

    ``gradients`` are the names of those that came with the gradients.
    """
    if "loss_tokens" not in batch:
        return metrics
    none = batch["loss_tokens"] == 0
    means = {"grad_norm", *(name for name in gradients if declared.get(name, Metric()).how == "mean")}
    return {name: value.masked_fill(none, 0) if name in means else value for name, value in metrics.items()}


def pipe_of(names: Iterable[str]) -> str:
    """What was typed, from the names of a pipe's transforms.

    >>> pipe_of(["grad('tape')", "clip(1.0)"])
    "pipe(loss, grad('tape'), clip(1.0))"
    """
    return f"pipe({', '.join(['loss', *names])})"


GradFunction: TypeAlias = Callable[[Tree, Batch, Execution], Gradients]


@dataclass(frozen=True, repr=False)
class Grads:
    """A gradient function. ``fn(params, batch, execution) -> Gradients`` is what transforms work on: ``params`` are local
    shards and ``batch`` has its ``loss_tokens``. Called by a user it is ``(params, batch) -> (gradients, metrics)``, finished.
    """

    fn: GradFunction
    chain: Chain | None = None
    """The loss, if it is a chain: a pipeline cuts it."""
    names: tuple[str, ...] = ()
    """Those of the transforms that made it."""

    @property
    def declared(self) -> Mapping[str, Metric]:
        """How its metrics are put together; those that are not named are means over tokens."""
        return self.chain.metrics if self.chain else {}

    def check_parameters(self, params: Tree) -> None:
        """ValueError for parameters that are not the loss's, if it is one that knows its own."""
        check_tensors(params)
        if self.chain:
            self.chain.check_parameters(params)

    def check_batch(self, batch: Batch) -> None:
        """ValueError for a batch that the loss cannot use."""
        (self.chain.takes if self.chain else check_batch)(batch)

    def __call__(self, params: Tree, batch: Batch, execution: Execution = EAGER) -> tuple[Tree, Metrics]:
        self.check_batch(batch)
        if execution.layout is SINGLE:  # elsewhere they are shards
            self.check_parameters(params)
        batch = execution.layout.sharing.with_tokens(batch)
        done = self.fn(params, batch, execution).finished(execution)
        return done.tree, reported(done.metrics, done.metrics, batch, self.declared)

    def __repr__(self) -> str:
        return pipe_of(self.names)

    def init(self, params: Tree) -> NoReturn:
        """ValueError: only a `olmo_fn.core.step.Step` has a state."""
        raise ValueError(f"{self!r} gives gradients and has no state; put an optimizer such as adamw(1e-3) last in the pipe")


def func_gradients(loss: LossFunction, dtype: torch.dtype) -> GradFunction:
    """``torch.func.grad_and_value`` of the whole loss: short, and the reference for the tape engine."""
    chain = loss if isinstance(loss, Chain) else None
    declared = chain.metrics if chain else {}

    def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
        layout, tokens = execution.layout, loss_tokens(batch)
        axes, cp_method = layout.sharing.axes, layout.sharing.cp_method
        if chain is None:
            Chain(lambda batch, backend: None, ()).check(axes, cp_method)  # a plain loss is written for no axes
        else:
            chain.check(axes, cp_method)
        backend = Backend(axes=axes, cp_method=cp_method, dtype=dtype)

        def scaled(wanted: Tree, frozen: Tree, part: Batch) -> tuple[Tensor, Metrics]:
            both = tree.combine(wanted, frozen) if frozen else wanted
            total, metrics = check_loss(loss(both, part)) if chain is None else chain.sum(both, part, backend)
            return total / tokens, {name: value.to(total.dtype) for name, value in {"loss": total, **metrics}.items()}

        wanted, frozen = tree.split(layout.weights.fetch(params, tuple(params), dtype).ready(), execution.wants)
        grads, (_, sums) = torch.func.grad_and_value(scaled, has_aux=True)(wanted, frozen, layout.sharing.local_batch(batch))
        flat = layout.weights.finish(arrive(layout.weights.reduce(tree.flatten(grads))))
        return in_order(params, flat, per_token(layout.sharing.total(sums, declared), tokens, declared))

    return gradients


def in_order(params: Tree, flat: Mapping[str, Tensor], metrics: Metrics) -> Gradients:
    """Gradients by path as a tree, in the order of the parameters."""
    return Gradients(tree.unflatten((path, flat[path]) for path, _ in tree.items(params) if path in flat), metrics)


def with_wants(execution: Execution, trains: Callable[[str], bool]) -> Execution:
    """The execution that asks for the gradients of fewer parameters."""
    wanted = execution.wants
    return replace(execution, wants=lambda path: trains(path) and wanted(path))
