"""What one step does on one rank, piece by piece: the real step, run on meta tensors with a few blocks of each kind.

Nothing here knows what a stage keeps or sends. The recipe's own step says it, under `olmo_fn.planner.trace.Trace`: its tape,
buckets, optimizer and collectives are the ones that train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Chain, Stage, bind
from olmo_fn.core.layout import Layout, Reduction, Sweep, compute_copy
from olmo_fn.core.offload import HostStash
from olmo_fn.core.primitive import primitive
from olmo_fn.core.tape import LOCAL_SWEEP, remat_policy
from olmo_fn.kernels.attention_backend import AttentionBackend, Need
from olmo_fn.kernels.attention_table import Choose
from olmo_fn.mesh.axis import NAMES, Axes, Axis
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.transformer import layers
from olmo_fn.parallel.buckets import row_bytes
from olmo_fn.parallel.owners import MatrixOwners
from olmo_fn.parallel.sharded import RankSharing, ShardedWeights
from olmo_fn.parallel.sharded_placement import ShardedPlacement
from olmo_fn.planner import attention
from olmo_fn.planner.accelerators import ATTENTION as RATES
from olmo_fn.planner.plan_input import Label, by_label, labels, owners
from olmo_fn.planner.trace import OnGpu, Seen, Trace, Traffic, nbytes
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import is_trained, parameters, recipe, rules
from olmo_fn.tree import Tree

ATTENTION = "_attention_vjp"  # the primitive of which, as a kernel does it, only what goes in and out is moved
LAUNCHES = {"forward": 1, "backward": 3}  # of a kernel of attention; backward: row sums, the products, the cast of the queries'


@dataclass(frozen=True)
class Piece:
    """A part of a step: how many bytes of each purpose it leaves behind, what `Seen` saw, relative to its start, and of the
    collectives those of its stages themselves, without what brings weights and takes gradients away.
    """

    grown: Counter[str] = field(default_factory=Counter)
    seen: Seen = field(default_factory=Seen)
    inside: Traffic = field(default_factory=Counter)


class WholeUpdate(NamedTuple):
    """The update of one parameter that sees its whole matrix, by one rank of the axis that it is ``dealt`` out over, or by all
    if that is empty.
    """

    dealt: str
    parts: int  # bytes of a rank's parts that go to the one that updates
    rows: int  # and of what comes back to a rank
    products: int  # FLOPs
    inside: Traffic  # over the axes that shard it in use


@dataclass
class Part:
    """What a step does for one label, on rank 0: a block, or the stages before or behind all blocks. Sizes are bytes."""

    forward: Piece = field(default_factory=Piece)
    backward: Piece = field(default_factory=Piece)
    state: Counter[str] = field(default_factory=Counter)  # at rest, by purpose
    weights: int = 0  # to compute with, beside those at rest
    gradients: int = 0  # at rest, fp32
    swept: int = 0  # as a sweep leaves them: of one process in the dtype of the computation
    whole_gradients: int = 0  # whole but for tensor parallelism
    late_gradients: Counter[tuple[str, ...]] = field(default_factory=Counter)  # summed once all are there, by axes
    gathered: Traffic = field(default_factory=Counter)  # by one gather of its weights
    reduced: Traffic = field(default_factory=Counter)  # by its gradients, once
    whole_updates: list[WholeUpdate] = field(default_factory=list)  # in the order of its parameters


@dataclass(frozen=True)
class Profile:
    """The pieces of a step; ``profile[label]`` is the `Part` of a label, or of the block that stands for it."""

    begin: Piece
    end: Piece
    update: Piece
    parts: dict[Label, Part]
    control: int  # bytes of the state that belong to no parameter
    carry: int  # bytes from one virtual stage to the next
    reports: Counter[str]  # bytes of the metrics of all labels, of sums and of maxima, and of the loss
    alike: dict[Label, Label]  # every label -> the one that stands for it

    def __getitem__(self, label: Label) -> Part:
        return self.parts[self.alike[label]]


def reports(chain: Chain) -> Counter[str]:
    """Bytes of what a sweep reports, in fp32: as many collectives as there are kinds."""
    found: Counter[str] = Counter(sum=4)  # the loss
    for metric in chain.metrics.values():
        found["max" if metric.how == "max" else "sum"] += 4 * prod(metric.shape)
    return found


def extrapolated(few: Any, more: Any, by: float) -> Any:
    """``few + by * (more - few)`` for every number of two profiles: each is a constant plus so much a sequence.

    >>> extrapolated({"bytes": 10}, {"bytes": 12}, by=3)
    {'bytes': 16}
    """
    if isinstance(few, Counter):
        return Counter({key: extrapolated(few[key], more[key], by) for key in {*few, *more}})
    if isinstance(few, dict):
        return {key: extrapolated(few[key], more[key], by) for key in few}
    if is_dataclass(few):
        names = [f.name for f in fields(few)]
        return replace(few, **{name: extrapolated(getattr(few, name), getattr(more, name), by) for name in names})  # type: ignore[type-var]
    return few + round(by * (more - few)) if isinstance(few, int) else few


def alike(cfg: Config, chain: Chain) -> dict[Label, Label]:
    """For every label the one that stands for it.

    The first block and the last two stand for themselves, since what is outside the blocks is gathered and reduced during their
    pieces (more of them if more is gathered ahead); others for all with the same functions, shapes and rematerialisation, and
    with neighbours of the same shapes, which are gathered and reduced during theirs.
    """
    blocks_of, ahead = layers(cfg.model), cfg.mesh.prefetch

    def like(label: Label) -> Any:  # the settings of a block, which may differ by layer in more than shapes
        return (
            tuple(sub.flops(cfg.recipe.sequence_length) for sub in blocks_of[label].sublayers)
            if isinstance(label, int)
            else label
        )

    again, specs, first, found = remat_policy(cfg.recipe.remat), parameters(cfg), dict[Any, Label](), dict[Label, Label]()
    parts = by_label(chain.stages)
    blocks = [label for label in parts if isinstance(label, int)]
    sizes = {}
    for label, stages in parts.items():
        leaves = [leaf for s in stages for path in s.paths for leaf in tree.items(tree.at(specs, path), path)]
        sizes[label] = tuple((spec.shape, is_trained(cfg, path)) for path, spec in leaves)
    for label, stages in parts.items():
        beside = range(label - ahead, label + ahead + 1) if isinstance(label, int) else (label,)
        kind = (tuple(sizes.get(i) for i in beside), like(label), *((s.name, again(s)) for s in stages))
        itself = not isinstance(label, int) or label in (*blocks[:ahead], *blocks[-1 - ahead :])
        found[label] = label if itself else first.setdefault(kind, label)
    return found


def axes_of(mesh: Mesh) -> Axes:
    """The axes of rank 0, each with its own name as its group."""
    sizes = {name: mesh.degree(name) for name in NAMES}
    every: dict[str, Any] = {name: Axis(name, n, 0, name if n > 1 else "") for name, n in sizes.items()}
    return Axes(**every)


@lru_cache(256)
def profile(cfg: Config, mesh: Mesh, rows: int, dtype: torch.dtype, device: str = "cuda", every_block: bool = False) -> Profile:
    """The pieces of a step of ``rows`` sequences a rank, computed at once in ``dtype``, on a mesh without pipeline, and on a
    ``device`` of this type.

    ValueError for a layout that the model's own code refuses. ``every_block`` leaves nothing to likeness, which takes longer.
    """
    planned = replace(cfg.recipe, accumulate=1, noise_scale=0.0, compile=False)
    if device != "cuda":
        planned = replace(planned, attention="auto")  # on meta: by tiles
    step = recipe(replace(cfg, recipe=planned), dtype)
    chain = step.grads.chain
    assert chain is not None, "only a chain of stages can be planned"
    stand_ins = {label: label for label in by_label(chain.stages)} if every_block else alike(cfg, chain)
    watch = Watch(cfg, mesh, rows, chain, frozenset(stand_ins.values()), device)
    trace, parts = watch.trace, watch.parts
    execution = replace(step.execution, layout=watch.layout)
    execution = replace(execution, primitive=watch.primitive, attention=watch.choosing(step.execution.attention))
    if cfg.recipe.offload:
        execution = replace(execution, stash=lambda: HostStash(trace.link))
    if cfg.recipe.compile:
        execution = replace(execution, fuse=lambda fn, *constants: trace.stage(bind(fn, *constants)), kernel=trace.kernel)
    step = replace(step, execution=execution)
    ids = torch.empty(rows, cfg.recipe.sequence_length, dtype=torch.int64, device="meta")
    with trace, watch.on_gpu or nullcontext():
        with trace.purpose("parameters"):
            params = tree.map(lambda shape: torch.empty(shape, device="meta"), watch.shapes())
        with trace.purpose("optimizer"):
            state = step.init(params)
        at_rest = {"parameters": state.params, **state.slots}
        control = trace.live.total()
        del params
        trace.cut()
        batch = watch.layout.sharing.with_tokens({"input_ids": ids, "labels": ids})
        watch.next("begin", None)
        gradients = step.grads.fn(step.point(state), batch, step.execution)
        for path, g in tree.items(gradients.tree):
            parts[watch.owners[path]].swept += g.nbytes
        watch.next("update", None)
        step.update(state, gradients)
        del gradients
        watch.next("over", None)
    ctx = chain.context({"input_ids": ids, "labels": ids}, step.execution.backend())
    carry = 0 if chain.empty is None else chain.empty(replace(ctx, backend=replace(ctx.backend, dtype=dtype))).nbytes
    watch.measure_parameters(dtype)
    for name, slot in at_rest.items():
        purpose = name if name in ("parameters", "ema") else "optimizer"
        for path, leaf in tree.items(slot):
            if path in watch.owners:
                parts[watch.owners[path]].state[purpose] += leaf.nbytes
                control -= leaf.nbytes
    for (way, label), piece in watch.pieces.items():
        if label is not None:
            setattr(parts[label], way, piece)
    count, begin, end, update = (watch.pieces[name, None] for name in ("count", "begin", "end", "update"))
    update.seen.traffic.update(count.seen.traffic)  # once a step, as the update
    end.seen.traffic.subtract(watch.late)  # of all blocks, see `Part.late_gradients`
    end.seen.traffic.subtract(watch.totals)  # see `Profile.reports`
    for whole in (whole for part in parts.values() for whole in part.whole_updates):
        update.seen.traffic.subtract(whole.inside)  # see `olmo_fn.planner.traffic.share`
    return Profile(begin, end, update, parts, control, carry, reports(chain), stand_ins)


class Watch:
    """Cuts the trace of a step where a piece ends, and adds up what is gathered and reduced for each label."""

    def __init__(self, cfg: Config, mesh: Mesh, rows: int, chain: Chain, chosen: frozenset[Label], device: str) -> None:
        self.cfg, self.mesh, self.rows, self.chosen, self.trace = cfg, mesh, rows, chosen, Trace()
        self.on_gpu = OnGpu() if device == "cuda" else None
        self.attends = "tiles"  # the backend that was last chosen
        connection = Connection(mesh, 0, axes_of(mesh), None)  # type: ignore[arg-type]
        specs = parameters(cfg)
        self.owners = owners(chain, specs)
        mine = {path: spec for path, spec in tree.items(specs) if self.owners[path] in chosen}
        placement = WatchedPlacement(connection, tree.unflatten(mine), rules(cfg, mesh))
        sharing = WatchedSharing(connection.axes, cfg.mesh.cp_method, placement, "own", watch=self)
        sweep = Sweep(self.sweep, LOCAL_SWEEP.sums)
        self.layout = Layout(placement, WatchedWeights(placement, self), WatchedOwners(placement, self), sharing, sweep)
        self.chain, self.placement = chain, placement
        self.now: tuple[str, Label | None] = ("count", None)
        self.pieces: dict[tuple[str, Label | None], Piece] = {}
        self.parts = {label: Part() for label in by_label(chain.stages) if label in chosen}
        self.order: list[Label] = []  # of the segments that wait for their backward
        self.late: Traffic = Counter()
        self.totals: Traffic = Counter()
        self.apart: Traffic = Counter()  # since the last piece began: collectives for weights, gradients and metrics

    def shapes(self) -> Tree:
        """Of rank 0's parts of the parameters, which are the largest."""
        return tree.unflatten((path, self.placement.box(path)[1]) for path in self.placement.placed)

    def measure_parameters(self, dtype: torch.dtype) -> None:
        """Sizes of the weights and of the fp32 gradients of every label."""
        for path in self.placement.placed:
            exchanged = path in self.placement.rules.exchanged
            axis = Axis() if exchanged else self.placement.gather_axis(path)
            part, whole = self.parts[self.owners[path]], self.placement.box(path, [axis.name])[1]
            copy = compute_copy(torch.empty(whole, device="meta"), dtype)
            if form := self.chain.float8.get(path):
                part.weights += prod(whole) + 4 * prod(form.scale_shape(whole))
            elif axis.size > 1 or not (copy.dtype == torch.float32 or path in self.chain.uncast):
                part.weights += copy.nbytes
            if is_trained(self.cfg, path):
                part.gradients += 4 * prod(self.placement.box(path)[1])
                part.whole_gradients += 4 * prod(whole)
                if self.placement.axes.fsdp.size > 1 and axis.size == 1 and not exchanged:
                    part.late_gradients[tuple(one.name for one in self.placement.sum_axes(path))] += 4 * prod(whole)

    def next(self, way: str, label: Label | None) -> None:
        """A piece ends, another begins."""
        if (way, label) == self.now:
            return
        assert self.now not in self.pieces, f"the piece {self.now} comes twice"
        seen = self.trace.cut()
        self.pieces[self.now] = Piece(_minus(self.trace.live, seen.start), seen, +_minus(seen.traffic, self.apart))
        self.now, self.apart = (way, label), Counter()

    def sweep(self, chain: Chain, *args: Any) -> Any:
        """The tape's own sweep through the chosen blocks alone, whose stages say when they run."""
        every, again = zip(labels(chain.stages), chain.stages, strict=True), remat_policy(self.cfg.recipe.remat)
        pairs = [(label, stage) for label, stage in every if label in self.chosen]
        self.order = [label for (label, _), _ in groupby(pairs, key=lambda pair: (pair[0], again(pair[1])))]
        marked = replace(chain, stages=tuple(self._marked(stage, label) for label, stage in pairs))
        self.last = pairs[-1][0]
        return LOCAL_SWEEP.gradients(marked, *args)

    def _marked(self, stage: Stage, label: Label) -> Stage:
        def fn(p: Tree, x: Any, ctx: Any) -> Any:
            if self.now[0] in ("begin", "forward"):
                self.next("forward", label)
            return stage.fn(p, x, replace(ctx, backend=replace(ctx.backend, skew=self.cfg.skew)))

        return stage._replace(fn=fn)

    def primitive(self, vjp: Any, weights: Any, inputs: Any, weight_grads: Any = None, *, costly: bool = False) -> Any:
        """A primitive, on chip if it is attention; the last one's backward begins the sweep back."""
        attends = vjp.__qualname__.split(".")[0] == ATTENTION
        on_chip = partial(self._attention, self.attends if attends else "")

        def watched(weights: Any, inputs: Any) -> Any:
            moved = nbytes((weights, inputs))
            # in the second run of a segment that keeps what is costly, its result is there already
            with on_chip("forward", moved) if costly else nullcontext():
                out, pullback = vjp(weights, inputs)

            def back(*cotangents: Any) -> Any:
                if self.now == ("forward", self.last):
                    self.next("backward", self.last)
                with self.on_gpu or nullcontext(), on_chip("backward", moved + nbytes(cotangents)):
                    weight_gradients, input_gradients = pullback(*cotangents)
                return [self.on_gpu.inside(g) if self.on_gpu else g for g in weight_gradients], input_gradients

            return out, back

        return primitive(watched, weights, inputs, weight_grads, costly=costly)

    def choosing(self, choose: Choose) -> Choose:
        """The run's own choice of attention's backend, noted, and what stands for it here."""

        def chosen(need: Need) -> AttentionBackend:
            backend = choose(need._replace(documents=need.documents or self.cfg.data.mask_documents))
            self.attends = attention.rate_of(backend)
            return attention.on_meta(backend)

        return chosen if self.on_gpu else choose

    def _attention(self, backend: str, way: str, moved: int) -> AbstractContextManager[None]:
        """Attention as a kernel does it: counted by what it sees. Tiles, and all else, are counted as they are."""
        block, seen = self.now[1], self.trace.seen
        if not isinstance(block, int) or backend not in RATES:
            return nullcontext()
        flops = attention.flops(self.cfg, self.mesh, block, self.rows) * (attention.BACKWARD if way == "backward" else 1)
        seen.attention[f"{backend} {way}"] += round(flops)
        seen.launches["eager"] += LAUNCHES[way]
        return self.trace.on_chip(moved)

    def reducing(self, grads: dict[str, Tensor]) -> Label:
        """A segment's backward is over but for sending its gradients, which goes on during the next one's."""
        label = self.order.pop()
        self.trace.is_for("gradients", grads)
        self.next(*(("backward", self.order[-1]) if self.order else ("end", None)))
        return label

    @contextmanager
    def adding(self, total: Traffic) -> Iterator[None]:
        """Add the collectives inside, which are no stage's, to these."""
        before = Counter(self.trace.seen.traffic)
        yield
        found = _minus(self.trace.seen.traffic, before)
        total.update(found)
        self.apart.update(found)


class WatchedPlacement(ShardedPlacement):
    """The real placement; state is plain tensors, since DTensors need process groups."""

    def shard(self, params: Tree) -> Tree:
        return params

    def store(self, path: str, local: Tensor) -> Any:
        return local

    def to_stored(self, local: Tree, like: Tree) -> Tree:
        return local


@dataclass(frozen=True, eq=False)
class WatchedWeights(ShardedWeights):
    """The real gathers and reductions, each of which says what it is for."""

    watch: Watch

    def fetch(self, params: Tree, paths: Iterable[str], *how: Any) -> Any:
        paths, watch = tuple(paths), self.watch
        with watch.trace.purpose("weights"), watch.adding(watch.parts[watch.owners[paths[0]]].gathered):
            return _Weights(watch, super().fetch(params, paths, *how))

    def reduce(self, grads: dict[str, Tensor]) -> Reduction:
        watch, label = self.watch, self.watch.reducing(grads)
        if watch.mesh.size == 1:  # nothing to sum, nor to widen for it
            return lambda: grads
        with watch.trace.purpose("gradients"), watch.adding(watch.parts[label].reduced):
            end = super().reduce(grads)

        def watched(reduction: Reduction) -> Reduction:
            def go_on() -> dict[str, Tensor] | Reduction:
                with watch.trace.purpose("gradients"), watch.adding(watch.parts[label].reduced):
                    found = reduction()
                return found if isinstance(found, dict) else watched(found)

            return go_on

        return watched(end)

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        watch = self.watch
        with watch.trace.purpose("gradients"), watch.adding(watch.late):
            return super().finish(grads)


@dataclass(frozen=True, eq=False)
class WatchedOwners(MatrixOwners):
    """Every whole-matrix update, of which `olmo_fn.planner.traffic.share` takes a rank's; exchanges are counted, not made."""

    watch: Watch

    def update(self, paths: Iterable[str], task: Callable[[str], Any]) -> Iterator[tuple[str, Tensor, dict[str, Tensor]]]:
        for path in paths:
            one, place, seen = task(path), self.placement, self.watch.trace.seen
            axis, before = place.gather_axis(path), Counter(seen.traffic)
            dealt, n = axis.size > 1, axis.size
            rest = [name for name, _ in place.placed[path].dims if name != axis.name]
            like = {"": one.p, "g": one.g, **{name: x for name, x in one.slots.items() if name not in one.leaf.unlike}}
            shard = place.bucket_shard(path) if dealt else None
            wholes = {k: place.over(path, x.new_empty(shard.shape) if shard else x, rest) for k, x in like.items()}
            sent = sum(row_bytes(x, shard, n) for x in like.values()) if dealt else 0
            inside, products = _minus(seen.traffic, before), -seen.products
            slots = {name: wholes.get(name, x) for name, x in one.slots.items()}
            new_p, new_slots = one.run(wholes[""], wholes["g"], slots, one.numbers)
            back = {"": one.p, **one.slots}
            rows = sum(row_bytes(x, None if k in one.leaf.unlike else shard, n) for k, x in back.items()) if dealt else 0
            found = WholeUpdate(axis.name if dealt else "", sent, rows, products + seen.products, inside)
            self.watch.parts[self.watch.owners[path]].whole_updates.append(found)
            local = {k: x if k in one.leaf.unlike else place.local_shard(path, x) for k, x in new_slots.items()}
            yield path, place.local_shard(path, new_p), local


@dataclass(frozen=True)
class WatchedSharing(RankSharing):
    """The real sums of metrics, apart: of the chosen blocks alone they are not those of the step."""

    watch: Watch | None = None

    def total(self, *sums: Any) -> Any:
        assert self.watch is not None
        with self.watch.adding(self.watch.totals):
            return super().total(*sums)


class _Weights:
    """`olmo_fn.core.layout.Weights`, each call under its purpose."""

    def __init__(self, watch: Watch, inner: Any) -> None:
        self.watch, self.inner = watch, inner

    def __getattr__(self, name: str) -> Any:
        def call() -> Any:
            with self.watch.trace.purpose("weights"), self.watch.adding(Counter()):
                return getattr(self.inner, name)()

        return call


def _minus(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
    return Counter({name: a[name] - b[name] for name in {*a, *b}})
