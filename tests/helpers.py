"""What several tests need."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from unittest.mock import patch

import torch
from hypothesis import settings

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE, Aux, Backend, Batch, Chain, Stage


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


def same_bits(a, b) -> bool:
    """Whether two tensors, or trees of tensors, have the same paths, shapes, dtypes and bits."""
    a, b = (tree.flatten({"": x} if isinstance(x, torch.Tensor) else dict(x)) for x in (a, b))
    return a.keys() == b.keys() and all(_same(a[path], b[path]) for path in a)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    alike = (a.dtype, a.shape) == (b.dtype, b.shape)
    a, b = (x.detach().resolve_neg().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
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
