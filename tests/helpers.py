"""What several tests need."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import settings

from olmo_fn import tree
from olmo_fn.checkpoint import load, read_index, save
from olmo_fn.core.chain import IGNORE, Aux, Backend, Batch, Chain, Stage
from olmo_fn.core.gradients import Gradients, Grads
from olmo_fn.core.pipe import Transform
from olmo_fn.core.step import State, Step
from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.spec import abstract, init
from olmo_fn.train.session import stored_part, with_new_slots
from olmo_fn.tree import Tree


def examples(n: int, **more) -> settings:
    """As many examples; many times as many in the profile ``nightly`` (see conftest.py)."""
    return settings(max_examples=n * (20 if settings.get_current_profile_name() == "nightly" else 1), **more)


@dataclass(frozen=True)
class BatchContext:
    """The context of a chain whose stages look at the batch itself."""

    backend: Backend
    batch: Batch


def one_stage(loss, *names):
    """A loss ``(params, batch) -> (sum, metrics)`` of parameters with these names as a chain of one stage."""

    def fn(p, x, ctx):
        total, _ = loss(p, ctx.batch)
        return None, Aux(total)

    stage = Stage("all", tuple((name, name) for name in names), fn)
    return Chain(lambda batch, backend: BatchContext(backend, batch), (stage,))


def batch_of(vocab_size: int, rows: int = 4, length: int = 8, seed: int = 0, masked: Sequence[float] = (0.0,)) -> Batch:
    """Random tokens and the next ones as labels; row i has about ``masked[i % len(masked)]`` of its labels masked, not all."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (rows, length + 1), generator=generator)
    parts = torch.tensor([masked[i % len(masked)] for i in range(rows)])[:, None]
    hidden = torch.rand(rows, length, generator=generator) < parts
    hidden[:, -1] = False
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].masked_fill(hidden, IGNORE)}


def params_of(cfg: Model, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tree:
    """A transformer's parameters."""
    return init(transformer.specs(cfg), seed, dtype)


def caught(law, *args) -> None:
    """The law fails."""
    with pytest.raises(AssertionError):
        law(*args)


def mean_of_means(n: int) -> Transform[Grads, Grads]:
    """A mutant of `accumulate`: every part divides by its own tokens."""

    def apply(inner):
        def gradients(params, batch, execution):
            parts = [{k: v.chunk(n)[i] for k, v in batch.items() if v.ndim} for i in range(n)]
            own = [{**part, "loss_tokens": (part["labels"] != IGNORE).sum()} for part in parts]
            grads, metrics, _ = zip(*(inner.fn(params, part, execution).finished() for part in own), strict=True)
            mean = lambda *x: sum(x) / n  # noqa: E731
            return Gradients(tree.map(mean, *grads), tree.map(mean, *metrics))

        return Grads(gradients)

    return Transform("mean_of_means", Grads, Grads, apply)


def late_copy() -> Transform[Step, Step]:
    """A mutant of `donate`: the parameter is overwritten before the moments are computed from it."""

    def apply(step):
        def leaf(path):
            plain = step.leaf(path)

            def update(p, g, slots, s):
                p.copy_(plain.update(p, g, slots, s)[0])
                return plain.update(p, g, slots, s)

            return plain._replace(update=update)

        return replace(step, leaf=leaf)

    return Transform("late_copy()", Step, Step, apply)


def through_a_checkpoint(step: Step, state: State, specs: Tree, dtype: torch.dtype = torch.float32):
    """What a run does that finds a checkpoint: the state, and the names of the slots that begin anew."""
    with tempfile.TemporaryDirectory() as folder:
        path = save(state._asdict(), folder, step=int(state.step))
        whole = step.init(abstract(specs, dtype))._asdict()
        like, select = stored_part(whole, read_index(path))
        found, _ = load(path, like, select=select)
    return with_new_slots(step, found, whole["slots"])


def same_bits(a, b) -> bool:
    """Whether two tensors, or trees of tensors, have the same paths, shapes, dtypes and bits."""
    a, b = (tree.flatten({"": x} if isinstance(x, torch.Tensor) else dict(x)) for x in (a, b))
    return a.keys() == b.keys() and all(_same(a[path], b[path]) for path in a)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = partial(torch.clone, memory_format=torch.contiguous_format)  # also of what is empty, or has a stride
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (flat(x.detach().resolve_neg().reshape(-1)).view(torch.uint8) for x in (a, b))
    return alike and torch.equal(a, b)


class Broken:
    """A pool in whose ranks something is another function."""

    def __init__(self, pool, target: str, mutant) -> None:
        self.pool, self.mutant = pool, (target, mutant)

    def run(self, fn, *args, mesh):
        return self.pool.run(run_broken, self.mutant, fn, args, mesh=mesh)


def run_broken(connection, mutant, fn, args):
    with patch(*mutant):
        return fn(connection, *args)
