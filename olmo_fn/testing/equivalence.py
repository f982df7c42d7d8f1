"""Does a layout change the model? Whole steps on real ranks beside the same steps in one process: law 2, as a function."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from olmo_fn import tree
from olmo_fn.core.chain import Batch
from olmo_fn.core.gradients import Execution, Gradients
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import Step
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import ONE_BY_ONE, shard
from olmo_fn.spec import init
from olmo_fn.testing.pool import Pool
from olmo_fn.tree import Tree

Name: TypeAlias = tuple[int, str]  # of a step, and of what was seen in it: "gradient blocks.0.attention.w_q"
Sharding: TypeAlias = Callable[..., Transform]  # of a connection, specs, rules, and for a pipeline how it is cut


class Layout(NamedTuple):
    """A mesh, the rules by which parameters lie on it, and how it is a pipeline if it is one."""

    mesh: Mesh
    rules: Rules = DEFAULT
    pipeline: Pipeline = ONE_BY_ONE

    def __str__(self) -> str:
        degrees = ", ".join(f"{axis}={degree}" for axis, degree in self.mesh.degrees.items() if degree > 1)
        more = [str(x) for x, usual in ((self.rules, DEFAULT), (self.pipeline, ONE_BY_ONE)) if x != usual]
        return ", ".join([f"Mesh({degrees})", *more])


class Difference(NamedTuple):
    """How far a rank is from the single process in one leaf: the largest |difference|, and what it is divided by."""

    step: int
    name: str
    size: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference over the scale."""
        return self.size / self.scale if self.size else 0.0


def assert_equivalent(
    recipe: Callable[[], Step],
    specs: Tree,
    layouts: Iterable[Layout | tuple[Mesh, Rules]],
    batches: Sequence[Batch],
    *,
    reference: Callable[[], Step] | None = None,
    sharding: Sharding = shard,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-10,
    pool: Pool | None = None,
) -> list[float]:
    """One step a batch, in this process and on the ranks of each layout: every number must be the same.

    Compared are the loss and all other metrics, every gradient as the optimizer gets it, in every step, and the whole state
    after the last one, each rank's own part of every leaf with that part of the single process's leaf. A leaf ``x`` passes if

        max |x - x'| <= tolerance · the largest |entry| of all leaves of its kind

    ``x'`` being the single process's, of the same dtype and step; NaN equals NaN; gradients, parameters, each slot and each
    metric are a kind. (Not of the leaf alone: one whose terms cancel is in fp32 itself more than 1e-5 away from fp64, in one
    process.) Returns the largest such ratio for each layout.
    AssertionError otherwise, naming layout, step, leaf, rank, difference and tolerance of the first step that differs.
    ValueError for a recipe that computes in another dtype than ``dtype``.

    ``recipe`` makes the step, without `olmo_fn.parallel.shard.shard`. It travels to other processes by pickle, as do ``specs``
    and ``sharding``, so it is a function at the top of a module, or a ``functools.partial`` of one; a Step itself holds
    closures and cannot travel. ``dtype`` is that of the parameters; what the step computes in is the recipe's business, so
    give ``grad(dtype=torch.float64)`` for the tight default. In fp32 state 1e-5, and use an optimizer that does not divide
    by the gradient: AdamW turns the rounding of an entry whose gradient is nearly 0 into a whole step of it.

    To verify your own *transform*, put it into the recipe: it must come out the same on every layout. If it should be
    invisible, give the recipe without it as ``reference``; ``Mesh()``, one rank, will then do. To verify your own *layout*,
    give what you use in place of `shard` as ``sharding``. A ``pool`` that is kept makes the second call much faster.

    >>> from functools import partial
    >>> from olmo_fn.models import transformer
    >>> from olmo_fn.models.config import dense
    >>> from olmo_fn.train.config import Config, Recipe
    >>> from olmo_fn.train.schedules import Cosine
    >>> from olmo_fn.train.recipe import recipe
    >>> model = dense(d_model=6, n_layers=1, n_heads=2, head_dim=2, hidden_size=5, vocab_size=7)
    >>> config = Config(model, schedule=Cosine(warmup=0), recipe=Recipe(compile=False))
    >>> double = partial(recipe, config, torch.float64)
    >>> ids = torch.arange(12).view(2, 6) % 7
    >>> batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    >>> layouts = [Layout(Mesh(dp_shard=2)), Layout(Mesh(dp_replicate=2), Rules(keep_gathered=True))]
    >>> max(assert_equivalent(double, transformer.specs(model), layouts, [batch] * 2)) < 1e-12
    True
    """
    try:
        pickle.dumps((recipe, specs, sharding))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"recipe, specs and sharding travel to the ranks by pickle, and {error}; give a function at the top of a module "
            "that can be imported, its arguments bound by functools.partial"
        ) from None
    if pool is None:
        with Pool() as own:
            options: Any = {"reference": reference, "sharding": sharding, "seed": seed, "dtype": dtype}
            return assert_equivalent(recipe, specs, layouts, batches, tolerance=tolerance, pool=own, **options)
    wanted = {name: leaf for name, (leaf, _) in record((reference or recipe)(), init(specs, seed, dtype), batches).items()}
    wide = torch.promote_types(dtype, torch.float32)
    for (_, name), leaf in wanted.items():
        if name.startswith("gradient") and leaf.dtype != wide:
            raise ValueError(
                f"{name} is {leaf.dtype}, and the parameters are {dtype}: give grad(dtype={dtype}) in the recipe, or "
                f"assert_equivalent(..., dtype={leaf.dtype}) with the tolerance of that"
            )
    scales = largest_by_kind(wanted)
    worst = []
    for layout in (Layout(*layout) for layout in layouts):
        given = (recipe, specs, layout, sharding, batches, seed, dtype, wanted, scales)
        worst.append(_judge(layout, pool.run(_compare, *given, mesh=layout.mesh), wanted, tolerance))
    return worst


def record(step: Step, params: Tree, batches: Sequence[Batch]) -> dict[Name, tuple[Tensor, Any]]:
    """Run a step on each batch. What was seen, this rank's part of it, each with a DTensor that says which part, or None."""
    found: dict[Name, tuple[Tensor, Any]] = {}
    state = step.init(params)
    places = tree.flatten(state.params)
    n = 0

    def gradients(params: Tree, batch: Batch, execution: Execution) -> Gradients:
        done = step.grads.fn(params, batch, execution).finished(execution)
        found.update({(n, f"gradient {path}"): (g.clone(), places[path]) for path, g in tree.items(done.tree)})
        return done

    watched = replace(step, grads=replace(step.grads, fn=gradients))
    for n, batch in enumerate(batches):
        state, metrics = watched(state, batch)
        found.update({(n, f"metric {name}"): (value.clone(), None) for name, value in metrics.items()})
    for path, leaf in tree.items({"step": state.step, "parameter": state.params, "slot": state.slots}):
        local = leaf.to_local() if isinstance(leaf, DTensor) else leaf
        found[n, path.replace(".", " ", 1)] = (local, leaf)
    return found


def _compare(
    connection: Connection,
    recipe: Callable[[], Step],
    specs: Tree,
    layout: Layout,
    sharding: Sharding,
    batches: Sequence[Batch],
    seed: int,
    dtype: torch.dtype,
    wanted: Mapping[Name, Tensor],
    scales: Mapping[Name, float],
) -> list[Difference]:
    """On a rank: the steps, and how far everything is from what is wanted."""
    pipeline = (layout.pipeline,) if layout.mesh.pp > 1 else ()
    step = sharding(connection, specs, layout.rules, *pipeline)(recipe())
    found = record(step, init(specs, seed, dtype), batches)
    differences = []
    for (n, name), (leaf, place) in found.items():
        want = wanted.get((n, name))
        scale = max(scales.get((n, kind(name)), 0.0), torch.finfo(torch.float64).tiny)
        differences.append(Difference(n, name, _distance(leaf, want, place), scale))
    return differences


def _distance(leaf: Tensor, want: Tensor | None, place: Any) -> float:
    """The largest difference of a rank's part from that part of ``want``; infinite if they are not alike at all."""
    if want is None:
        return torch.inf
    if isinstance(place, DTensor):
        shape, offset = compute_local_shape_and_global_offset(place.shape, place.device_mesh, place.placements)
        for dim, (start, length) in enumerate(zip(offset, shape, strict=True)):
            want = want.narrow(dim, min(start, want.shape[dim]), length)
    if leaf.shape != want.shape or leaf.dtype != want.dtype:
        return torch.inf
    same = (leaf == want) | (leaf.isnan() & want.isnan())
    far = (leaf.double() - want.double()).abs().nan_to_num(torch.inf).where(~same, 0.0)
    return float(far.max()) if far.numel() else 0.0


def largest_by_kind(wanted: Mapping[Name, Tensor]) -> dict[Name, float]:
    """The largest finite |entry| of all leaves of each kind, by step."""
    scales: dict[Name, float] = {}
    for (n, name), leaf in wanted.items():
        largest = float(leaf.detach().double().abs().nan_to_num(0.0, 0.0, 0.0).max()) if leaf.numel() else 0.0
        scales[n, kind(name)] = max(scales.get((n, kind(name)), 0.0), largest)
    return scales


def kind(name: str) -> str:
    """``gradient``, ``parameter``, ``slot adamw_m``; metrics are a kind each."""
    return name.split(".")[0] if name.startswith("slot") else name if name.startswith("metric") else name.split()[0]


def _judge(layout: Layout, ranks: list[list[Difference]], wanted: Mapping[Name, Tensor], tolerance: float) -> float:
    """The largest ratio on any rank; AssertionError if it is too large, or if something was on no rank."""
    missing = {*wanted} - {(found.step, found.name) for differences in ranks for found in differences}
    if missing:
        n, name = min(missing)
        raise AssertionError(f"{layout}: step {n}, {name} is on no rank ({len(missing)} leaves are missing)")
    every = [(found, rank) for rank, differences in enumerate(ranks) for found in differences]
    wrong = [(found, rank) for found, rank in every if not found.relative <= tolerance]
    if wrong:
        first = min(found.step for found, _ in wrong)
        found, rank = max((pair for pair in wrong if pair[0].step == first), key=lambda pair: pair[0].relative)
        names = {found.name for found, _ in wrong if found.step == first}
        raise AssertionError(
            f"{layout}: step {first}, {found.name} on rank {rank} differs by {found.size:.3g}, which is "
            f"{found.relative:.3g} of {found.scale:.3g}; the tolerance is {tolerance:g} "
            f"({len(names)} leaves of this step differ)"
        )
    return max(found.relative for found, _ in every)
