"""Pipelines on real processes: every schedule computes the same bits as one process."""

import sys
import time
from functools import partial
from unittest.mock import patch

import pytest
import torch

from olmo_fn.mesh.axis import Axis
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.parallel.pipeline.execute import execute
from olmo_fn.parallel.pipeline.transfers import rank_programs
from olmo_fn.testing import Pool, RankFailed

WIDTH, ROWS = 5, 3
DOUBLE = torch.float64


def inputs(microbatch):
    """Micro-batches of different lengths."""
    generator = torch.Generator().manual_seed(microbatch)
    return torch.randn(ROWS + microbatch % 3, WIDTH, generator=generator, dtype=DOUBLE)


def weights(stages, tied):
    """One matrix a virtual stage; tied: the last is the first."""
    generator = torch.Generator().manual_seed(99)
    made = [torch.randn(WIDTH, WIDTH, generator=generator, dtype=DOUBLE) for _ in range(stages)]
    return [*made[:-1], made[0]] if tied and stages > 1 else made


class Toy:
    """A chain of ``tanh(x @ w)`` with the loss at its end, and what the callbacks of one rank keep."""

    def __init__(self, weights):
        self.weights, self.stages = weights, len(weights)
        self.saved, self.grads, self.losses, self.late = {}, {}, {}, {}

    def forward(self, stage, microbatch, carry):
        x = (inputs(microbatch) if stage == 0 else carry).detach().requires_grad_()
        w = self.weights[stage].detach().requires_grad_()
        out = torch.tanh(x @ w)
        if stage == self.stages - 1:
            out = (out**2).sum()
            self.losses[microbatch] = out.detach()
        self.saved[stage, microbatch] = x, w, out
        return out.detach()

    def backward(self, stage, microbatch, cotangent):
        x, w, out = self.saved.pop((stage, microbatch))
        self.grads[stage, microbatch], found = torch.autograd.grad(out, (w, x), cotangent)
        return found if stage else None

    def backward_input(self, stage, microbatch, cotangent):
        x, w, out = self.saved.pop((stage, microbatch))
        self.late[stage, microbatch] = w, out, cotangent
        return torch.autograd.grad(out, x, cotangent, retain_graph=True)[0] if stage else None

    def backward_weight(self, stage, microbatch):
        w, out, cotangent = self.late.pop((stage, microbatch))
        self.grads[stage, microbatch] = torch.autograd.grad(out, w, cotangent)[0]


def alone(stages, microbatches, tied):
    """Losses by micro-batch and gradients by (stage, micro-batch) of one process."""
    toy = Toy(weights(stages, tied))
    for k in range(microbatches):
        carry = None
        for stage in range(stages):
            carry = toy.forward(stage, k, carry)
        cotangent = None
        for stage in reversed(range(stages)):
            cotangent = toy.backward(stage, k, cotangent)
    return toy.losses, toy.grads


def pipelined(connection, kind, microbatches, chunks, tied):
    """What one rank of the pipeline computes, and how many saved activations it had at the most."""
    axis = connection.axes.pp
    toy = Toy(weights(axis.size * chunks, tied))
    mine = rank_programs(kind, axis.size, microbatches, chunks)[axis.index]
    peak = 0

    def by_chunk(callback, chunk, microbatch, *value):
        nonlocal peak
        out = callback(mine.stage(chunk), microbatch, *value)
        peak = max(peak, len(toy.saved) + len(toy.late))
        return out

    callbacks = [partial(by_chunk, fn) for fn in (toy.forward, toy.backward, toy.backward_input, toy.backward_weight)]
    execute(mine, *callbacks, empty=lambda stage, k: torch.full_like(inputs(k), torch.nan), axis=axis)
    assert kind == "forward" or not (toy.saved or toy.late)
    return toy.losses, toy.grads, peak


def compare(results, kind, stages, microbatches, tied):
    losses, grads = alone(stages, microbatches, tied)
    found = {k: v for one, _, _ in results for k, v in one.items()}
    assert found.keys() == losses.keys()
    assert all(torch.equal(found[k], losses[k]) for k in losses)
    if kind == "forward":
        return
    found = {key: g for _, one, _ in results for key, g in one.items()}
    assert found.keys() == grads.keys()
    assert all(torch.equal(found[key], grads[key]) for key in grads)
    if tied:  # each owner has its part; their sum is the gradient of the shared matrix
        shared = weights(stages, True)[0].requires_grad_()
        chain = [shared, *weights(stages, True)[1:-1], shared]
        total = sum((_through(chain, inputs(k)) ** 2).sum() for k in range(microbatches))
        owned = sum(found[stage, k] for stage in (0, stages - 1) for k in range(microbatches))
        torch.testing.assert_close(owned, torch.autograd.grad(total, shared)[0], rtol=1e-13, atol=1e-13)


def _through(chain, x):
    for w in chain:
        x = torch.tanh(x @ w)
    return x


CASES = [
    (kind, microbatches, chunks)
    for kind, chunks in (("gpipe", 1), ("gpipe", 2), ("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zero_bubble", 1))
    for microbatches in (1, 6)
] + [("forward", 5, 1), ("forward", 3, 2)]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("kind", "microbatches", "chunks"), CASES)
def test_same_bits_as_one_process(pool, ranks, kind, microbatches, chunks):
    tied = chunks == 2
    results = pool.run(pipelined, kind, microbatches, chunks, tied, mesh=Mesh(pp=ranks), timeout=60)
    compare(results, kind, ranks * chunks, microbatches, tied)
    if kind in ("1f1b", "zero_bubble"):  # what really is kept is what the simulator says
        bound = [min(ranks - rank if kind == "1f1b" else ranks, microbatches) for rank in range(ranks)]
        assert [peak for *_, peak in results] == bound


def test_pipeline_beside_another_axis(pool):
    """Two pipelines of two ranks: transfers go by the axis, not by the rank in the world."""
    results = pool.run(pipelined, "1f1b", 4, 1, False, mesh=Mesh(pp=2, dp_shard=2), timeout=60)
    for pipeline in (results[0::2], results[1::2]):
        compare(pipeline, "1f1b", 2, 4, False)


def pipelined_unwaited(connection, *args):
    """A mutant: no transfer is waited for, and the first rank is slow."""
    module = sys.modules[execute.__module__]
    with patch.object(module, "_wait", lambda work: None), patch.object(Toy, "forward", slow(connection.rank)):
        return pipelined(connection, *args)


def slow(rank, forward=Toy.forward):
    def slowly(*args):
        time.sleep(0.05 * (rank == 0))
        return forward(*args)

    return slowly


def test_mutant_of_the_executor_is_caught():
    # processes of its own: transfers that nobody waits for would reach another test's
    with Pool() as own, pytest.raises((AssertionError, RankFailed)):
        compare(own.run(pipelined_unwaited, "1f1b", 4, 1, False, mesh=Mesh(pp=2), timeout=60), "1f1b", 2, 4, False)


@pytest.mark.parametrize(("kind", "chunks"), [("gpipe", 3), ("1f1b", 1), ("interleaved", 2), ("zero_bubble", 1)])
def test_one_rank_needs_no_processes(kind, chunks):
    toy = Toy(weights(chunks, False))
    (mine,) = rank_programs(kind, 1, 3, chunks)
    callbacks = (toy.forward, toy.backward, toy.backward_input, toy.backward_weight)  # chunk is stage
    execute(mine, *callbacks, empty=lambda stage, k: inputs(k))
    compare([(toy.losses, toy.grads, 0)], kind, chunks, 3, False)


def test_refused_before_anything_runs():
    def never(*args):
        raise AssertionError

    first, _ = rank_programs("zero_bubble", 2, 2)
    with pytest.raises(ValueError, match="needs the callback backward_input and backward_weight"):
        execute(first, never, empty=never)
    with pytest.raises(ValueError, match="a program for rank 0 of 2 cannot run on rank 1 of an axis of 2"):
        execute(first, never, never, never, never, empty=never, axis=Axis("pp", 2, 1, "any"))


def test_a_wrong_carry_is_named():
    (mine,) = rank_programs("forward", 1, 1, 2)
    with pytest.raises(ValueError, match=r"the carry of F\(chunk 0, microbatch 0\) on rank 0 is \(4,\) .* \(5,\)"):
        execute(mine, lambda chunk, k, carry: torch.zeros(4), empty=lambda stage, k: torch.zeros(5))
