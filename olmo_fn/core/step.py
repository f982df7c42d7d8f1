"""A training step as one pure function, ``(state, batch) -> (state, metrics)``, and the state that it moves.

What is remembered from one step to the next is in the `State`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metrics
from olmo_fn.core.gradients import EAGER, Execution, Gradients, Grads, Signals, pipe_of, reported
from olmo_fn.core.layout import SINGLE
from olmo_fn.kernels import Function
from olmo_fn.tree import Tree

Scalars: TypeAlias = dict[str, Tensor]
Slots: TypeAlias = dict[str, Tensor]


class State(NamedTuple):
    """Everything that training remembers; nothing else exists.

    ``step`` () int64, counted from 0; ``params``; ``slots``: by name, either a tree with the parameters' paths, or some of
    them (``adamw_m``, ``muon_momentum``, ``ema``), or a small tree of its own (``skip_spikes``).
    """

    step: Tensor
    params: Tree
    slots: Tree


def refuse_compile() -> None:
    """ValueError inside of ``torch.compile``: whether it traces this, or runs it and would trace what is called."""
    if torch.compiler.is_compiling() or callable(get_eval_frame_callback()):
        raise ValueError("torch.compile takes no step, which compiles its own parts: put compile() at the end of the pipe")


def check_state(state: Any) -> None:
    """ValueError for what is no state, and for one that a step with `donate` has written the next one into."""
    if not isinstance(state, State):
        raise ValueError(f"a step takes (state, batch), and this is a {type(state).__name__}: step.init(params) first")
    if hasattr(state.step, "spent"):
        raise ValueError(
            "this state is spent: a step with donate() has written the next state into its memory; use that one, "
            "or leave donate() out of the pipe"
        )


def spend(state: State) -> None:
    """Mark a state that is about to be overwritten, with all others that share its ``step``, for `check_state`."""
    state.step.spent = True  # type: ignore[attr-defined]


class Leaf(NamedTuple):
    """An optimizer of one parameter: a pair of pure functions.

    ``init(param) -> slots``; ``update(param, grad, slots, scalars) -> (param, slots)``. ``elementwise`` updates may
    see the parameter flattened; all others see it whole. Slots are shaped like the parameter and lie where it lies, but for
    those named in ``unlike``, which are of any shape and on every rank. ``scalars`` are this leaf's own, on top of the step's;
    of those it sees the ones without a group, and its ``group``'s. ``point(param, slots)`` is where the gradient is taken, if
    not at the parameter.
    """

    init: Callable[[Tensor], Slots]
    update: Callable[[Tensor, Tensor, Slots, Scalars], tuple[Tensor, Slots]]
    elementwise: bool = True
    scalars: Mapping[str, float] = {}
    group: str = ""
    point: Callable[[Tensor, Slots], Tensor] | None = None
    unlike: tuple[str, ...] = ()


Control: TypeAlias = Callable[[State, Signals, Metrics], tuple[Tree, Scalars, Metrics]]
"""From what the gradients and the transforms say: the control slots after this step, its scalars, and what to report."""


@dataclass(frozen=True, repr=False)
class Step:
    """How training starts, ``init(params) -> state``, and how it moves, ``(state, batch) -> (state, metrics)``.

    Three parts, so that transforms can work on any of them: ``grads``; ``control``, which turns signals and metrics into the
    scalars of this step (learning rate, whether to skip); and ``leaf``, the update of one parameter.
    """

    grads: Grads
    init_control: Callable[[], Tree]
    control: Control
    leaf: Callable[[str], Leaf]
    execution: Execution = EAGER
    names: tuple[str, ...] = ()
    """Those of the transforms that made it."""

    def __repr__(self) -> str:
        return pipe_of(self.names)

    def init(self, params: Tree) -> State:
        """The state before the first step. Its parameters are the ones given, if they are contiguous and whole: a copy only
        where `donate` lets steps write into them.

        Under `shard` whole parameters are cut; ``layout.placement.init`` makes them in parts. ValueError for parameters that
        are not the loss's.
        """
        placement = self.execution.layout.placement
        if self.execution.layout is SINGLE:  # or else the placement knows them
            self.grads.check_parameters(params)
        params = placement.shard(params)
        if self.execution.donate:
            params = tree.map(lambda p: p if p.is_meta else p.clone(), params)
        slots: dict[str, dict[str, Tensor]] = {}
        for path, p in tree.items(placement.to_local(params)):
            leaf = self.leaf(path)
            seen = p if leaf.elementwise else placement.full_tensor(path, p)
            for name, value in leaf.init(seen).items():
                assert name in leaf.unlike or value.shape == seen.shape, f"slot {name} of {path}: name it in Leaf.unlike"
                if name not in leaf.unlike:
                    value = placement.store(path, value if leaf.elementwise else placement.local_shard(path, value))
                slots.setdefault(name, {})[path] = value
        control = self.init_control()
        if clash := slots.keys() & control.keys():
            raise ValueError(f"{min(clash)!r} is a slot of parameters and one of its own; rename one, such as {min(clash)}_m")
        shaped = {name: tree.unflatten(values) for name, values in slots.items()}
        device = next((p.device for _, p in tree.items(params)), None)
        if device is None:
            raise ValueError("there are no parameters; init(transformer.specs(model), seed=0) makes those of a model")
        own = tree.map(lambda value: value.to(device), {"step": torch.tensor(0), "slots": control})
        return State(own["step"], params, {**own["slots"], **shaped})

    def __call__(self, state: State, batch: Batch) -> tuple[State, Metrics]:
        refuse_compile()
        check_state(state)
        self.grads.check_batch(batch)
        placement, batch = self.execution.layout.placement, self.execution.layout.sharing.with_tokens(batch)
        local = State(state.step, placement.to_local(state.params), placement.to_local(state.slots))
        gradients = self.grads.fn(self.point(local), batch, replace(self.execution, step=state.step))
        if self.execution.donate:
            spend(state)
        new, metrics = self.update(local, gradients)
        params, slots = placement.to_stored(new.params, state.params), placement.to_stored(new.slots, state.slots)
        return State(new.step, params, slots), reported(metrics, gradients.metrics, batch, self.grads.declared)

    @torch.no_grad()
    def point(self, state: State) -> Tree:
        """Where the gradient is taken: at the parameters, but for optimizers that say otherwise (schedule-free)."""
        leaves = {path: self.leaf(path) for path, _ in tree.items(state.params)}
        if all(leaf.point is None for leaf in leaves.values()):
            return state.params
        slots = {name: tree.flatten(slot) for name, slot in state.slots.items()}

        def at(path: str, p: Tensor) -> Tensor:
            find = leaves[path].point
            return p if find is None else find(p, {name: values[path] for name, values in slots.items() if path in values})

        return tree.map_with_path(at, state.params)

    def update(self, state: State, gradients: Gradients) -> tuple[State, Metrics]:
        """The second half of a step: from gradients to the next state, all of it local shards. Consumes the gradients.

        A factor that they still lack is applied by each update on its way.
        """
        with torch.set_grad_enabled(self.execution.differentiable):
            return self._update(state, gradients)

    def _update(self, state: State, gradients: Gradients) -> tuple[State, Metrics]:
        grads, metrics, signals = gradients
        if "grad_norm" not in metrics:
            metrics = {**metrics, "grad_norm": self.execution.layout.sharing.norm(grads)}
        control, scalars, metrics = self.control(state, signals, metrics)
        lacking = {} if signals.scale is None else {"grad_scale": signals.scale}
        before = {name: tree.flatten(slot) for name, slot in state.slots.items() if name not in control}
        params, flat = tree.flatten(state.params), tree.flatten(grads)
        grads.clear()  # so that each gradient is freed as soon as it is used
        packed: dict[Any, tuple[tuple[str, ...], Tensor]] = {}  # the leaves' scalars, by what they depend on
        after: dict[str, dict[str, Tensor]] = {name: dict(values) for name, values in before.items()}
        leaves = {path: self.leaf(path) for path in params if path in flat}  # the others are frozen

        def task(path: str) -> Task:
            leaf, p = leaves[path], params[path]
            key = leaf.group, *leaf.scalars.items(), p.dtype
            if key not in packed:
                packed[key] = pack_scalars(leaf, {**scalars, **lacking}, p.dtype)
            names, numbers = packed[key]
            run = self.execution.kernel(_guarded(leaf.update, self.execution.donate, names))
            slots = {name: values[path] for name, values in before.items() if path in values}
            return Task(leaf, run, p, flat.pop(path), slots, numbers)

        def keep(path: str, new_p: Tensor, new_slots: Slots) -> None:
            params[path] = new_p
            for name, value in new_slots.items():
                after[name][path] = value

        for path, leaf in leaves.items():
            if leaf.elementwise:
                keep(path, *_flattened(task(path)))
        whole = [path for path, leaf in leaves.items() if not leaf.elementwise]
        for path, new_p, new_slots in self.execution.layout.owners.update(whole, task):
            keep(path, new_p, new_slots)
        shaped = {name: tree.unflatten(values) for name, values in after.items()}
        return State(state.step + 1, tree.unflatten(params), {**control, **shaped}), metrics


class Task(NamedTuple):
    """The update of one parameter, ready to run."""

    leaf: Leaf
    run: Function
    p: Tensor
    g: Tensor
    slots: Slots
    numbers: Tensor  # its scalars


def _flattened(task: Task) -> tuple[Tensor, Slots]:
    """An elementwise update, of flat tensors, so that one compiled function serves all shapes, and parts of them."""
    p = task.p
    new_p, new = task.run(p.view(-1), task.g.reshape(-1), {k: v.view(-1) for k, v in task.slots.items()}, task.numbers)
    return new_p.view(p.shape), {k: v.view(p.shape) for k, v in new.items()}


def pack_scalars(leaf: Leaf, scalars: Scalars, dtype: torch.dtype) -> tuple[tuple[str, ...], Tensor]:
    """Names and values of what the update of ``leaf`` sees, in the dtype that a parameter of ``dtype`` is computed in.

    One vector and not in fp64, so that calling a compiled update costs little, and converts nothing for every few entries.
    """
    wide, device = torch.promote_types(dtype, torch.float32), scalars["skip"].device
    own = {k: torch.full((), v, dtype=wide, device=device) for k, v in leaf.scalars.items()}  # a copy would wait
    found = {**of_group(scalars, leaf.group), **own}
    return tuple(found), torch.stack([value.to(wide) for value in found.values()])


def of_group(scalars: Scalars, group: str) -> Scalars:
    """The scalars without a group, and those of ``group``, without its name.

    >>> of_group({"skip": 0, "matrix/lr": 1, "default/lr": 2}, "matrix")
    {'skip': 0, 'lr': 1}
    """
    shared = {name: value for name, value in scalars.items() if "/" not in name}
    own = {name.removeprefix(f"{group}/"): value for name, value in scalars.items() if name.startswith(f"{group}/")}
    return {**shared, **{name: value for name, value in own.items() if "/" not in name}}


@cache
def _guarded(update: Function, donate: bool, names: tuple[str, ...]) -> Function:
    """The update of a leaf with what holds for every one; its scalars are given as one vector.

    A factor that the gradient lacks is applied, a skipped step changes nothing, dtypes stay what they are, donation writes
    in place.
    """

    def guarded(p: Tensor, g: Tensor, slots: Slots, numbers: Tensor) -> tuple[Tensor, Slots]:
        scalars = dict(zip(names, numbers.unbind(), strict=True))
        scalars["skip"] = scalars["skip"] > 0
        if "grad_scale" in scalars:
            g = g.to(numbers.dtype) * scalars.pop("grad_scale")
        new_p, new_slots = update(p, g, slots, scalars)
        new_p = torch.where(scalars["skip"], p, new_p.to(p.dtype))
        new_slots = {k: torch.where(scalars["skip"], slots[k], v.to(slots[k].dtype)) for k, v in new_slots.items()}
        if not donate:
            return new_p, new_slots
        return p.copy_(new_p), {k: slots[k].copy_(v) for k, v in new_slots.items()}

    return guarded
