"""What one step does on one rank, piece by piece: the real step, run on meta tensors with a few blocks of each kind.

Nothing here knows what a stage keeps or sends. The recipe's own step says it, under `olmo_fn.planner.trace.Trace`: its tape,
buckets, optimizer and collectives are the ones that train.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olmo_fn import tree
from olmo_fn.core.chain import Batch, Chain, Stage
from olmo_fn.core.layout import compute_copy
from olmo_fn.core.tape import remat_policy, segments
from olmo_fn.mesh.axis import NAMES, Axes, Axis
from olmo_fn.mesh.connect import Connection
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.parallel.owners import row_bytes
from olmo_fn.parallel.sharded import Sharded
from olmo_fn.planner.job import Label
from olmo_fn.planner.trace import Seen, Trace, Traffic
from olmo_fn.planner.whole import WholeUpdate
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import is_trained, parameters, recipe, rules
from olmo_fn.tree import Tree


class Piece(NamedTuple):
    """A part of a step: how many bytes of each purpose it leaves behind, and what `Seen` saw, relative to its start."""

    grown: Counter[str]
    seen: Seen


@dataclass(frozen=True)
class Profile:
    """The pieces of a step. Tables are by label, one block standing for all of its kind."""

    begin: Piece
    forward: dict[Label, Piece]
    backward: dict[Label, Piece]
    end: Piece
    update: Piece
    state: dict[Label, Counter[str]]  # bytes at rest, by purpose
    in_use: dict[Label, int]  # bytes of the weights to compute with, beside those at rest
    gradients: dict[Label, int]  # bytes at rest
    whole: dict[Label, int]  # bytes of its gradients, whole but for tensor parallelism
    gathered: dict[Label, Traffic]  # by one gather of its weights
    reduced: dict[Label, Traffic]  # by its gradients, once
    finished: dict[Label, int]  # bytes of its gradients that are summed once all are there
    whole_updates: dict[Label, list[WholeUpdate]]  # in the order of its parameters
    control: int  # bytes of the state that belong to no parameter
    alike: dict[int, int]  # every block -> the one that stands for it

    def of(self, label: Label) -> Label:
        """The label that stands for this one."""
        return self.alike[label] if isinstance(label, int) else label


def axes_of(mesh: Mesh) -> Axes:
    """The axes of rank 0, each with its own name as its group."""
    sizes = {name: mesh.degree(name) for name in NAMES}
    every: dict[str, Any] = {name: Axis(name, n, 0, name if n > 1 else "") for name, n in sizes.items()}
    return Axes(**every)


def kinds(cfg: Config) -> dict[int, int]:
    """For every block the one that stands for it.

    The first block and the last two stand for themselves, since the embedding and the head are gathered and reduced during
    their pieces; the others for all of their kind.
    """
    again, last = remat_policy(cfg.recipe.remat), cfg.model.n_layers - 1
    first: dict[tuple[bool, bool, int | None], int] = {}
    found = {}
    for i in range(last + 1):
        block = [again(Stage(name, (), print, block=i)) for name in ("project", "feed_forward")]
        kind = (block[0], block[1], cfg.model.window(i))
        found[i] = i if i in (0, last - 1, last) else first.setdefault(kind, i)
    return found


@lru_cache(256)
def profile(cfg: Config, mesh: Mesh, rows: int, dtype: torch.dtype, every_block: bool = False) -> Profile:
    """The pieces of a step of ``rows`` sequences a rank, computed at once in ``dtype``, on a mesh without pipeline.

    ValueError for a layout that the model's own code refuses. ``every_block`` leaves nothing to likeness, which takes longer.
    """
    alike = {i: i for i in range(cfg.model.n_layers)} if every_block else kinds(cfg)
    watch = Watch(cfg, mesh, frozenset(alike.values()))
    once = replace(cfg.recipe, accumulate=1, compile=False, noise_scale=0.0)
    step, trace = recipe(replace(cfg, recipe=once), dtype), watch.trace
    execution = replace(step.execution, layout=watch.layout)
    if cfg.recipe.compile:
        execution = replace(execution, wrap=trace.stage, wrap_leaf=trace.kernel)
    step = replace(step, execution=execution)
    ids = torch.empty(rows, cfg.recipe.sequence_length, dtype=torch.int64, device="meta")
    with trace:
        with trace.purpose("parameters"):
            params = tree.map(lambda shape: torch.empty(shape, device="meta"), watch.shapes())
        with trace.purpose("optimizer"):
            state = step.init(params)
        at_rest = {"parameters": state.params, **state.slots}
        control = trace.live.total()
        del params
        trace.cut()
        grads, metrics = step.grads.fn(step.point(state), {"input_ids": ids, "labels": ids}, step.execution)
        watch.next("update", None)
        step.update(state, grads, metrics)
        del grads, metrics, ids
        watch.next("over", None)
    one = watch.pieces
    one["end", None].seen.traffic.subtract(watch.finished.get("head", Counter()))  # of all blocks, see `Profile.finished`
    for update in (update for updates in watch.whole_updates.values() for update in updates):
        one["update", None].seen.traffic.subtract(update.over_tp)  # see `olmo_fn.planner.whole.share`
    rest = _state(at_rest, watch.layout.specs)
    control -= sum(part.total() for part in rest.values())
    ways: dict[str, dict[Label, Piece]] = {"forward": {}, "backward": {}}
    for (way, label), piece in one.items():
        if label is not None:
            ways[way][label] = piece
    return Profile(
        one["begin", None],
        ways["forward"],
        ways["backward"],
        one["end", None],
        one["update", None],
        rest,
        watch.in_use(dtype),
        watch.gradients(at_rest=True),
        watch.gradients(at_rest=False),
        watch.gathered,
        watch.reduced,
        watch.kept_whole(),
        watch.whole_updates,
        control,
        alike,
    )


def _state(at_rest: Tree, specs: Tree) -> dict[Label, Counter[str]]:
    """Bytes of parameters, optimizer and ema by label; small control slots are nobody's."""
    found: dict[Label, Counter[str]] = {}
    paths = tree.flatten(specs)
    for name, slot in at_rest.items():
        purpose = name if name in ("parameters", "ema") else "optimizer"
        for path, leaf in tree.items(slot):
            if path in paths:
                found.setdefault(label_of(path), Counter())[purpose] += leaf.nbytes
    return found


def label_of(path: str) -> Label:
    """The part of the model that a parameter belongs to.

    >>> label_of("blocks.3.attention.w_q"), label_of("head.norm")
    (3, 'head')
    """
    names = path.split(".")
    return int(names[names.index("blocks") + 1]) if "blocks" in names else "head" if "head" in names else "embed"


class Watch:
    """Cuts the trace of a step where a piece ends, and adds up what is gathered and reduced for each label."""

    def __init__(self, cfg: Config, mesh: Mesh, blocks: frozenset[int]) -> None:
        self.cfg, self.mesh, self.blocks, self.trace = cfg, mesh, blocks, Trace()
        connection = Connection(mesh, 0, axes_of(mesh), None)  # type: ignore[arg-type]
        mine = {p: s for p, s in tree.items(parameters(cfg)) if not isinstance(label_of(p), int) or label_of(p) in blocks}
        self.layout = Watched(connection, tree.unflatten(mine), rules(cfg), watch=self)
        self.now: tuple[str, Label | None] = ("begin", None)
        self.pieces: dict[tuple[str, Label | None], Piece] = {}
        self.order: list[Label] = []  # of the segments that wait for their backward
        self.stored: set[str] = set()  # paths that are fetched as they are stored
        self.gathered: dict[Label, Traffic] = {}
        self.reduced: dict[Label, Traffic] = {}
        self.finished: dict[Label, Traffic] = {}
        self.whole_updates: dict[Label, list[WholeUpdate]] = {}

    def shapes(self) -> Tree:
        """Of rank 0's parts of the parameters, which are the largest."""
        fsdp, tp = self.layout.axes.fsdp.size, self.mesh.tp
        return tree.unflatten((path, place.box((0, fsdp), (0, tp))[1]) for path, place in self.layout.placed.items())

    def in_use(self, dtype: torch.dtype) -> dict[Label, int]:
        """Bytes of the weights that a label computes with, unless they are the ones at rest."""
        found: dict[Label, int] = {}
        for path, place in self.layout.placed.items():
            like = compute_copy(torch.empty(place.box((0, 1), (0, self.mesh.tp))[1], device="meta"), dtype)
            stored = like.dtype == torch.float32 or path in self.stored
            own = self.layout.axes.fsdp.size == 1 and stored
            found[label_of(path)] = found.get(label_of(path), 0) + (0 if own else like.nbytes)
        return found

    def gradients(self, at_rest: bool) -> dict[Label, int]:
        """Bytes of a label's gradients in fp32: rank 0's part, or whole but for tensor parallelism."""
        fsdp, found = self.layout.axes.fsdp.size if at_rest else 1, dict[Label, int]()
        for path, place in self.layout.placed.items():
            if is_trained(self.cfg, path):
                size = math.prod(place.box((0, fsdp), (0, self.mesh.tp))[1])
                found[label_of(path)] = found.get(label_of(path), 0) + 4 * size
        return found

    def kept_whole(self) -> dict[Label, int]:
        """Bytes of a label's gradients that ``finish`` sums, as their parameters are not sharded over ``fsdp``."""
        found: dict[Label, int] = {}
        if self.layout.axes.fsdp.size > 1:
            for path, place in self.layout.placed.items():
                if place.fsdp is None and is_trained(self.cfg, path):
                    size = math.prod(place.box((0, 1), (0, self.mesh.tp))[1])
                    found[label_of(path)] = found.get(label_of(path), 0) + 4 * size
        return found

    def next(self, way: str, label: Label | None) -> None:
        """A piece ends, another begins."""
        if (way, label) == self.now:
            return
        assert self.now not in self.pieces, f"the piece {self.now} comes twice"
        seen = self.trace.cut()
        self.pieces[self.now] = Piece(_minus(self.trace.live, seen.start), seen)
        self.now = (way, label)

    def chain(self, chain: Chain) -> Chain:
        """The stages of the chosen blocks, which say when they run."""
        stages = [stage for stage in chain.stages if stage.block is None or stage.block in self.blocks]
        parts = segments(tuple(stages), self.cfg.recipe.remat)
        self.order = [_label(i, part.stages[0]) for i, part in enumerate(parts)]
        return replace(chain, stages=tuple(self._marked(s, _label(i, s), s is stages[-1]) for i, s in enumerate(stages)))

    def _marked(self, stage: Stage, label: Label, last: bool) -> Stage:
        on_chip = self.trace.on_chip if stage.name == "attend" else nullcontext

        def begins() -> None:
            if self.now[0] in ("begin", "forward"):
                self.next("forward", label)

        def fn(*args: Any) -> Any:
            begins()
            return stage.fn(*args)

        def vjp(*args: Any) -> Any:
            begins()
            assert stage.vjp is not None
            with on_chip(args):
                out, pullback = stage.vjp(*args)

            def marked(cotangent: Any) -> Any:
                if last:
                    self.next("backward", label)
                with on_chip((args, cotangent)):
                    return pullback(cotangent)

            return out, marked

        return stage._replace(fn=fn, vjp=vjp if stage.vjp else None)

    def reducing(self, grads: dict[str, Tensor]) -> Label:
        """A segment's backward is over but for sending its gradients, which goes on during the next one's."""
        label = self.order.pop()
        self.trace.is_for("gradients", grads)
        self.next(*(("backward", self.order[-1]) if self.order else ("end", None)))
        return label

    @contextmanager
    def adding(self, table: dict[Label, Traffic], label: Label) -> Iterator[None]:
        """Add the collectives inside to a label's."""
        before = Counter(self.trace.seen.traffic)
        yield
        table.setdefault(label, Counter()).update(_minus(self.trace.seen.traffic, before))


class Watched(Sharded):
    """The real layout, every part of which says what it is for. State is plain tensors: DTensors need process groups."""

    watch: Watch

    def __init__(self, connection: Connection, specs: Tree, rules: Rules, watch: Watch) -> None:
        object.__setattr__(self, "watch", watch)
        super().__init__(connection, specs, rules)

    def chain(self, chain: Chain) -> Chain:
        return self.watch.chain(super().chain(chain))

    def part(self, batch: Batch) -> Batch:
        return batch  # is this rank's already

    def adopt(self, params: Tree) -> Tree:
        return params

    def place(self, path: str, part: Tensor) -> Any:
        return part

    def fetch(self, params: Tree, paths: Iterable[str], dtype: torch.dtype, stored: Collection[str] = ()) -> Any:
        paths, watch = tuple(paths), self.watch
        watch.stored.update(stored)
        with watch.trace.purpose("weights"), watch.adding(watch.gathered, label_of(paths[0])):
            return _Weights(watch.trace, super().fetch(params, paths, dtype, stored))

    def reduce(self, grads: dict[str, Tensor]) -> Callable[[], dict[str, Tensor]]:
        watch, label = self.watch, self.watch.reducing(grads)
        with watch.trace.purpose("gradients"), watch.adding(watch.reduced, label):
            end = super().reduce(grads)

        def arriving() -> dict[str, Tensor]:
            with watch.trace.purpose("gradients"), watch.adding(watch.reduced, label):
                return end()

        return arriving

    def rounds(self, paths: Iterable[str]) -> Iterable[tuple[str, ...]]:
        return ((path,) for path in paths)  # all of them, of which `olmo_fn.planner.whole.share` takes a rank's

    def deal(self, parts: Mapping[str, Sequence[Tensor]]) -> tuple[str, list[Tensor]] | None:
        ((path, tensors),) = parts.items()
        seen, n, dealt = self.watch.trace.seen, self.axes.fsdp.size, self.is_dealt(path)
        before = Counter(seen.traffic)
        wholes = [self.over_tp(path, x.new_empty(self.shard(path).shape) if dealt else x) for x in tensors]
        sent = sum(row_bytes(x, self.shard(path), n) for x in tensors) if dealt else 0
        begun = WholeUpdate(dealt, sent, 0, -seen.linear - seen.batched, _minus(seen.traffic, before))
        self.watch.whole_updates.setdefault(label_of(path), []).append(begun)
        return path, wholes

    def collect(
        self, mine: Sequence[Tensor] | None, like: Mapping[str, Sequence[tuple[Tensor, bool]]]
    ) -> dict[str, list[Tensor]]:
        ((path, pairs),) = like.items()
        assert mine is not None
        seen, n, updates = self.watch.trace.seen, self.axes.fsdp.size, self.watch.whole_updates[label_of(path)]
        begun = updates.pop()
        rows = sum(row_bytes(x, self.shard(path) if shaped else None, n) for x, shaped in pairs) if begun.dealt else 0
        updates.append(begun._replace(rows=rows, products=begun.products + seen.linear + seen.batched))
        return {path: [self.own(path, x) if shaped else x for x, (_, shaped) in zip(mine, pairs, strict=True)]}

    def finish(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        watch = self.watch
        with watch.trace.purpose("gradients"), watch.adding(watch.finished, "head"):
            return super().finish(grads)


class _Weights:
    """`olmo_fn.core.layout.Weights`, each call under its purpose."""

    def __init__(self, trace: Trace, inner: Any) -> None:
        self.trace, self.inner = trace, inner

    def ready(self) -> dict[str, Tree]:
        with self.trace.purpose("weights"):
            return self.inner.ready()

    def free(self) -> None:
        with self.trace.purpose("weights"):
            self.inner.free()

    def again(self) -> None:
        with self.trace.purpose("weights"):
            self.inner.again()


def _label(i: int, stage: Stage) -> Label:
    return stage.block if stage.block is not None else "head" if i else "embed"


def _minus(a: Counter[Any], b: Counter[Any]) -> Counter[Any]:
    return Counter({name: a[name] - b[name] for name in {*a, *b}})
