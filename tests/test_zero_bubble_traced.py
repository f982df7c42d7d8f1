"""The backward of a compiled stage in two parts: the same numbers and products as in one, and less memory between."""

from contextlib import nullcontext
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from test_zero_bubble import BLOCK, DOUBLE, Products, like

from olmo_fn import tree
from olmo_fn.grad import fuse, subtrees
from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.parallel.pipeline import traced
from olmo_fn.parallel.pipeline.traced import in_parts, trace
from olmo_fn.spec import init


def block(cfg, rows=2, length=7, seed=0, layer=0):
    """A block's function and its arguments."""
    chain = transformer.loss(cfg)
    stage = fuse(chain.stages)[1 + layer]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(cfg.vocab_size, (rows, length), generator=generator)
    x = torch.randn(rows, length, cfg.d_model, dtype=DOUBLE, generator=generator)
    params = subtrees(init(transformer.specs(cfg), seed, DOUBLE), stage)
    return stage.fn, (params, x, chain.context({"input_ids": ids, "labels": ids, "documents": ids // 9}))


def in_one(fn, params, x, context):
    """Output, gradients of the leaves and of x, and the matrix products of the backward."""
    leaves = []

    def leaf(p):
        leaves.append(p.detach().requires_grad_())
        return leaves[-1]

    inputs, x = tuple(tree.map(leaf, p) for p in params), x.detach().requires_grad_()
    out = fn(*inputs, x, context)
    with Products() as products:
        grads = torch.autograd.grad(out, [*leaves, x], like(out))
    return [out.detach(), *grads], products.count


def law_parts(run, fn, args):
    """The numbers of one backward from two; returns the products of both parts, and of the one."""
    expected, whole = in_one(fn, *args)
    out, split = run(*args)
    with Products() as first:
        dx = split.input_grad(like(out))
    with Products() as second:
        grads = split.weight_grad()
    for a, b in zip(expected, [out, *grads, dx], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    return first.count, second.count, whole


@pytest.mark.parametrize("layer", [0, 1])
def test_block_of_olmo2(layer):
    fn, args = block(BLOCK, layer=layer)
    assert law_parts(in_parts(fn), fn, args) == (7 + 4, 7, 18)


def test_one_trace_serves_all_values_of_a_shape():
    fn, args = block(BLOCK)
    run = in_parts(fn)
    with patch.object(traced, "trace", side_effect=trace) as tracing:
        law_parts(run, fn, args)
        law_parts(run, fn, block(BLOCK, seed=3)[1])
        assert tracing.call_count == 1
        law_parts(run, fn, block(BLOCK, length=9)[1])
        assert tracing.call_count == 2


def test_micro_batches_in_flight():
    fn, args = block(BLOCK)
    run = in_parts(fn)
    others = [block(BLOCK, seed=k)[1] for k in range(3)]
    begun = [run(*other) for other in others]
    dx = [split.input_grad(like(out)) for out, split in begun]
    for k, other in enumerate(others):
        expected, _ = in_one(fn, *other)
        for a, b in zip(expected, [begun[k][0], *begun[k][1].weight_grad(), dx[k]], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def kept(parts, params, x, context, cotangent):
    """Bytes that the three parts hand on, weights and context aside: forward to I, and I to W."""
    leaves = [leaf for p in params for _, leaf in tree.items(p)]
    own = {t.untyped_storage().data_ptr() for t in (*leaves, *context.values())}
    _, *saved = parts.forward(*leaves, x, *context.values())
    given = [*saved, cotangent]
    rest = parts.input_grad(*given)[1 + len(parts.early) :]

    def size(tensors):
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
        return sum(nbytes for pointer, nbytes in storages.items() if pointer not in own)

    return size(saved), size([*(given[i] for i in parts.needs), *rest])


def test_memory_goes_down_after_the_first_part():
    fn, args = block(Model(64, 1, 4, 192, vocab_size=17), length=64)
    parts = trace(fn, *args)
    before, between = kept(parts, *args, torch.ones_like(args[1]))
    assert between < 0.75 * before


def swapped(fn, *args):
    """A mutant: two gradients in each other's place."""
    parts = trace(fn, *args)
    return parts._replace(early=(parts.early[1], parts.early[0], *parts.early[2:]))


def unneeded(fn, *args):
    """A mutant: W is given other saved tensors than those it was traced with."""
    parts = trace(fn, *args)
    return parts._replace(needs=tuple(reversed(parts.needs)))


@pytest.mark.parametrize("mutant", [swapped, unneeded])
def test_mutants_are_caught(mutant):
    fn, args = block(replace(BLOCK, n_kv_heads=None))
    with patch.object(traced, "trace", mutant), pytest.raises((AssertionError, RuntimeError)):
        law_parts(in_parts(fn), fn, args)


class Uncounted(nullcontext):
    count = 0

    def __enter__(self):
        return self


@pytest.mark.slow
def test_compiled():
    fn, _ = block(BLOCK)
    run = in_parts(fn, lambda part: torch.compile(part, fullgraph=True, dynamic=False))
    with patch(f"{__name__}.Products", Uncounted):  # compiled functions do not run in a dispatch mode
        for seed in range(2):
            law_parts(run, fn, block(BLOCK, seed=seed)[1])
