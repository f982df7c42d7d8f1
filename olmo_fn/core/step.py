"""A training step as one pure function, ``(state, batch) -> (state, metrics)``, and the state that it moves.

What is remembered from one step to the next is in the `State`, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch._C._dynamo.eval_frame import get_eval_frame_callback

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Metrics
from olmo_fn.core.gradients import EAGER, Execution, Gradients, Grads, Signals, pipe_of, reported
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.update import Leaf, Scalars, Slots, Task, all_flattened, flattened, guarded, pack_scalars, together
from olmo_fn.tree import Tree

__all__ = ["Control", "Leaf", "Scalars", "Slots", "State", "Step"]


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

        def scalars_of(path: str) -> tuple[Any, ...]:
            leaf = leaves[path]
            return leaf.group, *leaf.scalars.items(), params[path].dtype

        def slots_of(path: str) -> Slots:
            return {name: values[path] for name, values in before.items() if path in values}

        def kind(path: str) -> Any:  # what paths share whose updates are alike
            dtypes = params[path].dtype, flat[path].dtype, *((name, value.dtype) for name, value in slots_of(path).items())
            return leaves[path].update, scalars_of(path), params[path].numel(), dtypes

        def task(path: str) -> Task:
            leaf, p = leaves[path], params[path]
            key = scalars_of(path)
            if key not in packed:
                packed[key] = pack_scalars(leaf, {**scalars, **lacking}, p.dtype)
            names, numbers = packed[key]
            update = guarded(leaf.update, self.execution.donate, names)
            return Task(leaf, update, self.execution.kernel, p, flat.pop(path), slots_of(path), numbers)

        def keep(path: str, new_p: Tensor, new_slots: Slots) -> None:
            params[path] = new_p
            for name, value in new_slots.items():
                after[name][path] = value

        elementwise = [path for path, leaf in leaves.items() if leaf.elementwise]
        most = self.execution.updates_a_call(scalars["skip"].device)
        for path in elementwise if most == 1 else ():
            keep(path, *flattened(task(path)))
        for paths in together(elementwise, kind, most) if most > 1 else ():
            for path, found in zip(paths, all_flattened([task(path) for path in paths]), strict=True):
                keep(path, *found)
        whole = [path for path, leaf in leaves.items() if not leaf.elementwise]
        for path, new_p, new_slots in self.execution.layout.owners.update(whole, task):
            keep(path, new_p, new_slots)
        shaped = {name: tree.unflatten(values) for name, values in after.items()}
        return State(state.step + 1, tree.unflatten(params), {**control, **shaped}), metrics
