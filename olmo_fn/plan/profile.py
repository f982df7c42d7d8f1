"""What one step does on one rank, piece by piece: the real step, run on meta tensors with a few blocks of each kind.

Nothing here knows what a stage keeps or sends. The recipe's own step says it, under `olmo_fn.plan.trace.Trace`: its tape, buckets,
optimizer and collectives are the ones that train.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from olmo_fn import tree
from olmo_fn.grad import Batch, Chain, Stage
from olmo_fn.layout import SINGLE, compute_copy
from olmo_fn.models import transformer
from olmo_fn.nn import attend
from olmo_fn.parallel.axis import Axes, Axis
from olmo_fn.parallel.connect import Connection
from olmo_fn.parallel.mesh import Mesh
from olmo_fn.parallel.rules import Rules, plan, size
from olmo_fn.parallel.sharded import Sharded
from olmo_fn.plan.job import Label
from olmo_fn.plan.trace import Seen, Trace, Traffic
from olmo_fn.tape import remat_policy, segments
from olmo_fn.train.config import Config
from olmo_fn.train.recipe import recipe
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
    gathered: dict[Label, Traffic]  # by one gather of its weights
    reduced: dict[Label, Traffic]  # by its gradients, once
    tables: int  # bytes that attention keeps from step to step
    alike: dict[int, int]  # every block -> the one that stands for it

    def of(self, label: Label) -> Label:
        """The label that stands for this one."""
        return self.alike[label] if isinstance(label, int) else label


def axes_of(mesh: Mesh) -> Axes:
    """The axes of rank 0, each with its own name as its group."""
    sizes = {field.name: size(mesh, field.name) for field in fields(Axes)}
    return Axes(**{name: Axis(name, n, 0, name if n > 1 else "") for name, n in sizes.items()})


def rules_of(cfg: Config) -> Rules:
    """The rules that a config stands for."""
    return Rules(keep_gathered=cfg.mesh.keep_gathered, cp_method=cfg.mesh.cp_method)


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
    """The pieces of a step of ``rows`` sequences a rank, computed at once in ``dtype``, on the mesh without its ``pp``.

    ValueError for a layout that the model's own code refuses. ``every_block`` leaves nothing to likeness, which takes longer.
    """
    alike = {i: i for i in range(cfg.model.n_layers)} if every_block else kinds(cfg)
    watch = Watch(cfg, mesh, frozenset(alike.values()))
    step = recipe(replace(cfg, recipe=replace(cfg.recipe, accumulate=1, compile=False)), dtype)
    trace = watch.trace
    kernels = {"wrap": trace.stage, "wrap_leaf": trace.kernel} if cfg.recipe.compile else {}
    step = replace(step, execution=replace(step.execution, layout=watch, **kernels))
    attend._bias.cache_clear()  # its tables are part of the memory
    ids = torch.empty(rows, cfg.recipe.sequence_length, dtype=torch.int64, device="meta")
    with trace:
        with trace.purpose("parameters"):
            params = watch.params()
        with trace.purpose("optimizer"):
            state = step.init(params)
        at_rest = {"parameters": state.params, **state.slots}
        del params
        trace.cut()
        grads, metrics = step.grads(state.params, {"input_ids": ids, "labels": ids}, step.execution)
        watch.next("update", None)
        step.update(state, grads, metrics)
        del grads, metrics, ids
        watch.next("over", None)
    one = watch.pieces
    for born, kept in trace.living("activations"):  # what outlives a step is made once: the tables
        list(one.values())[born - 1].grown.update(activations=-kept, tables=kept)
    attend._bias.cache_clear()
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
        _state(at_rest, watch.specs),
        watch.in_use(dtype),
        watch.gathered,
        watch.reduced,
        sum(piece.grown["tables"] for piece in one.values()),
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
    first, _, rest = path.partition(".")
    return int(rest.partition(".")[0]) if first == "blocks" else first


class Watch:
    """A layout that hands everything on to the real one, and cuts the trace where a piece ends."""

    def __init__(self, cfg: Config, mesh: Mesh, blocks: frozenset[int]) -> None:
        self.cfg, self.mesh, self.blocks, self.trace = cfg, mesh, blocks, Trace()
        whole = transformer.specs(cfg.model)
        self.specs = {**whole, "blocks": {key: block for key, block in whole["blocks"].items() if int(key) in blocks}}
        axes = axes_of(mesh)
        self.axes = axes
        connection = Connection(mesh, 0, axes, None)  # type: ignore[arg-type]
        self.inner: Any = SINGLE if mesh.size == 1 else Sharded(connection, self.specs, rules_of(cfg))
        self.now: tuple[str, Label | None] = ("begin", None)
        self.pieces: dict[tuple[str, Label | None], Piece] = {}
        self.order: list[Label] = []  # of the segments
        self.gathered: dict[Label, Traffic] = {}
        self.reduced: dict[Label, Traffic] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def params(self) -> Tree:
        """The parameters of rank 0, whose parts are the largest."""
        placed = plan(self.specs, rules_of(self.cfg), self.mesh)
        fsdp, tp = self.axes.fsdp.size, self.axes.tp.size
        return tree.map_with_path(
            lambda path, _: torch.empty(placed[path].box((0, fsdp), (0, tp))[1], device="meta"), self.specs
        )

    def in_use(self, dtype: torch.dtype) -> dict[Label, int]:
        """Bytes of the weights that a label computes with, unless they are the ones at rest."""
        found: dict[Label, int] = {}
        for path, place in plan(self.specs, rules_of(self.cfg), self.mesh).items():
            shape = place.box((0, 1), (0, self.mesh.tp))[1]
            like = compute_copy(torch.empty(shape, device="meta"), dtype)
            own = self.axes.fsdp.size == 1 and like.dtype == torch.float32
            label = label_of(path)
            found[label] = found.get(label, 0) + (0 if own else like.nbytes)
        return found

    # --- where pieces end ---------------------------------------------------------------------------------------------

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
        ours = self.inner.chain(chain)
        stages = [stage for stage in ours.stages if stage.block is None or stage.block in self.blocks]
        parts = segments(tuple(stages), self.cfg.recipe.remat)
        self.order = [_label(i, part.stages[0]) for i, part in enumerate(parts)]
        return replace(ours, stages=tuple(self._marked(s, _label(i, s), s is stages[-1]) for i, s in enumerate(stages)))

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

    @contextmanager
    def _adding(self, table: dict[Label, Traffic], label: Label) -> Iterator[None]:
        """Add the collectives inside to a label's."""
        before = Counter(self.trace.seen.traffic)
        yield
        table.setdefault(label, Counter()).update(_minus(self.trace.seen.traffic, before))

    # --- the layout -----------------------------------------------------------------------------------------------------

    def part(self, batch: Batch) -> Batch:
        """The batch is this rank's already."""
        return batch

    def adopt(self, params: Tree) -> Tree:
        """They are parts already."""
        return params

    def place(self, path: str, part: Any) -> Any:
        """A part of the state: no DTensor, which would need process groups."""
        return part

    def fetch(self, params: Tree, paths: Iterable[str], dtype: torch.dtype) -> Any:
        """The real layout's weights, under their purpose."""
        paths = tuple(paths)
        label = label_of(paths[0])
        with self.trace.purpose("weights"), self._adding(self.gathered, label):
            return _Weights(self.trace, self.inner.fetch(params, paths, dtype))

    def reduce(self, grads: dict[str, Any]) -> Callable[[], Any]:
        """A segment's backward is over but for sending its gradients, which goes on during the next one's."""
        label = self.order.pop()
        self.trace.is_for("gradients", grads)
        self.next(*(("backward", self.order[-1]) if self.order else ("end", None)))
        with self.trace.purpose("gradients"), self._adding(self.reduced, label):
            end = self.inner.reduce(grads)

        def arriving() -> Any:
            with self.trace.purpose("gradients"), self._adding(self.reduced, label):
                return end()

        return arriving

    def finish(self, grads: dict[str, Any]) -> Any:
        """The real layout's, under its purpose."""
        with self.trace.purpose("gradients"):
            return self.inner.finish(grads)


class _Weights:
    """`olmo_fn.layout.Weights`, each call under its purpose."""

    def __init__(self, trace: Trace, inner: Any) -> None:
        self.trace, self.inner = trace, inner

    def ready(self) -> dict[str, Tree]:
        with self.trace.purpose("weights"):
            return self.inner.ready()  # type: ignore[no-any-return]

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

