"""A backward in two parts: the same bits and the same products as in one, and memory that goes down after the first."""

import gc
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from olmo_fn import tree
from olmo_fn.grad import fuse, subtrees
from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.parallel.pipeline import zero_bubble
from olmo_fn.parallel.pipeline.zero_bubble import Saved, split_pullback
from olmo_fn.spec import init

DOUBLE = torch.float64
BLOCK = Model(16, 2, 4, 24, vocab_size=17, n_kv_heads=2, window_pattern=(3, -1), init_std=0.3)


def block(cfg=BLOCK, rows=2, length=7, layer=0):
    """A block of OLMo 2: a function of nothing that runs it, its leaves and its input."""
    chain = transformer.loss(cfg)
    stage = fuse(chain.stages)[1 + layer]
    ids = torch.randint(cfg.vocab_size, (rows, length), generator=torch.Generator().manual_seed(0))
    context = chain.context({"input_ids": ids, "labels": ids, "documents": ids // 9})
    leaves = []

    def leaf(p):
        leaves.append(p.detach().requires_grad_())
        return leaves[-1]

    params = init(transformer.specs(cfg), 0, DOUBLE)
    inputs = tuple(tree.map(leaf, p) for p in subtrees(params, stage))
    x = torch.randn(rows, length, cfg.d_model, dtype=DOUBLE, generator=torch.Generator().manual_seed(1)).requires_grad_()
    return lambda: stage.fn(*inputs, x, context), leaves, x


def like(out, seed=2):
    return torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(seed))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.aten.addmm)
        return func(*args, **(kwargs or {}))


def law_split(run, leaves, x, saved):
    """The bits of one backward from two, and no more matrix products; returns the products of both parts."""
    out = run()
    cotangent = like(out)
    with Products() as whole:
        expected = torch.autograd.grad(out, [*leaves, x], cotangent)
    with saved or nullcontext():
        out = run()
    input_grad, weight_grad = split_pullback(out, leaves, x, saved)
    with Products() as first:
        dx = input_grad(cotangent)
    with Products() as second:
        grads = weight_grad()
    assert all(torch.equal(a, b) for a, b in zip(expected, [*grads, dx], strict=True))
    assert first.count + second.count == whole.count
    return first.count, second.count


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("make", [Saved, lambda: None])
def test_block_of_olmo2(layer, make):
    """7 matrices: one product each for the input and for the weights; attention's 4 are all for the input."""
    assert law_split(*block(layer=layer), make()) == (7 + 4, 7)


def whole_twice(root, leaves, x, saved):
    """A mutant: both parts by torch.autograd.grad from the root, as one would write it at first."""
    kept = []

    def input_grad(cotangent):
        kept.append(cotangent)
        return torch.autograd.grad(root, x, cotangent, retain_graph=True)[0]

    return zero_bubble.Split(input_grad, lambda: torch.autograd.grad(root, leaves, kept.pop()))


def first_fork_only(group, edges, arrived, original=zero_bubble._from_forks):
    """A mutant: of the forks of a weight that is used twice, one is forgotten."""
    return original(group._replace(forks=group.forks[:1]), edges, arrived)


def unclamped(group, edges, arrived, original=zero_bubble._from_forks):
    """A mutant: what comes to a fork by way of another one counts again."""
    singles = [original(group._replace(forks=[fork]), edges, arrived) for fork in group.forks]
    return tuple(sum(parts) for parts in zip(*singles, strict=True))


def test_mutant_that_works_twice_is_caught():
    with patch(f"{__name__}.split_pullback", whole_twice), pytest.raises(AssertionError):
        law_split(*block(), None)


def tied():
    """A weight used twice on the path, and another one between."""
    w, v = (torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    x = torch.ones(2, 3, dtype=DOUBLE).requires_grad_()
    return lambda: torch.tanh(torch.tanh(x @ w) @ (v * 2)) @ w.T + x, [w, v], x


def test_a_weight_used_twice():
    run, leaves, x = tied()
    out = run()
    expected = torch.autograd.grad(out, [*leaves, x], like(out))
    for make in (Saved, lambda: None):
        saved = make()
        with saved or nullcontext():
            out = run()
        split = split_pullback(out, leaves, x, saved)
        dx = split.input_grad(like(out))
        for a, b in zip(expected, [*split.weight_grad(), dx], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("mutant", [first_fork_only, unclamped])
def test_mutants_of_a_weight_used_twice_are_caught(mutant):
    with patch.object(zero_bubble, "_from_forks", mutant), pytest.raises((AssertionError, RuntimeError)):
        test_a_weight_used_twice()


def test_without_an_input_the_weights_do_everything():
    w = torch.randn(3, 3, dtype=DOUBLE).requires_grad_()
    out = torch.tanh(w @ w)
    split = split_pullback(out, [w], None)
    assert split.input_grad(like(out)) is None
    assert torch.equal(split.weight_grad()[0], torch.autograd.grad(torch.tanh(w @ w), w, like(out))[0])


class Scale(torch.autograd.Function):
    """Computes both gradients at once, as every Python Function does."""

    calls = 0

    @staticmethod
    def forward(x, w):
        return x * w

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        Scale.calls += 1
        x, w = ctx.saved_tensors
        return g * w, g * x


def test_an_opaque_function_runs_once():
    w, v = (torch.randn(3, 3, dtype=DOUBLE, generator=torch.Generator().manual_seed(i)).requires_grad_() for i in range(2))
    x = torch.ones(3, 3, dtype=DOUBLE).requires_grad_()
    run = lambda: torch.tanh(Scale.apply(torch.tanh(x @ v), w))  # noqa: E731
    expected = torch.autograd.grad(run(), [w, v, x], like(run()))
    Scale.calls = 0
    with Saved() as saved:
        out = run()
    split = split_pullback(out, [w, v], x, saved)
    dx = split.input_grad(like(out))
    assert all(torch.equal(a, b) for a, b in zip(expected, [*split.weight_grad(), dx], strict=True))
    assert Scale.calls == 1


def test_a_compiled_stage_does_all_in_the_first_part():
    _, leaves, x = tied()
    compiled = torch.compile(lambda w, v, x: torch.tanh(torch.tanh(x @ w) @ v), fullgraph=True, backend="aot_eager")
    out = compiled(*leaves, x)
    expected = torch.autograd.grad(out, [*leaves, x], like(out))
    out = compiled(*leaves, x)
    split = split_pullback(out, leaves, x)
    with Products() as first:
        dx = split.input_grad(like(out))
    with Products() as second:
        grads = split.weight_grad()
    assert all(torch.equal(a, b) for a, b in zip(expected, [*grads, dx], strict=True))
    assert (first.count, second.count) == (4, 0)


def storages(values):
    found = (t.untyped_storage() for t in tree_leaves(values) if isinstance(t, torch.Tensor))
    return [(storage._cdata, storage) for storage in found]


class Live(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still there."""

    def __init__(self):
        super().__init__()
        self.given, self.made = set(), {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.given |= {key for key, _ in storages((args, kwargs)) if key not in self.made}
        out = func(*args, **(kwargs or {}))
        for key, storage in storages(out):
            if key not in self.given:
                self.made[key] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self):
        return sum(size for ref, size in self.made.values() if not ref.expired())


def test_memory_goes_down_after_the_first_part():
    """ZB-H1 keeps no more than 1F1B only if a micro-batch between I and W holds less than before I."""
    run, leaves, x = block(Model(64, 1, 4, 192, vocab_size=17), length=64)
    after_input = {}
    gc.disable()  # a cycle of references would keep memory until some later time
    try:
        for make in (Saved, lambda: None):
            with Live() as live:
                saved = make()
                with saved or nullcontext():
                    out = run()
                before = live.bytes()
                input_grad, weight_grad = split_pullback(out, leaves, x, saved)
                cotangent = like(out)
                released = saved is not None
                del out, saved
                input_grad(cotangent)
                del input_grad, cotangent
                after_input[released] = live.bytes() / before
                grads = weight_grad()
                del weight_grad
                assert live.bytes() == sum(g.nbytes for g in grads)
                del grads
                assert live.bytes() == 0
    finally:
        gc.enable()
    assert after_input[True] < 0.55, after_input
    assert after_input[False] > 1.2, "the law would not notice if nothing were freed"


def test_micro_batches_in_flight():
    """I of the next ones before W of the first."""
    splits, expected = [], []
    for k in range(3):
        run, leaves, x = block(length=5 + k)
        out = run()
        expected.append(torch.autograd.grad(out, [*leaves, x], like(out, k)))
        with Saved() as saved:
            out = run()
        splits.append((split_pullback(out, leaves, x, saved), like(out, k)))
    dx = [split.input_grad(cotangent) for split, cotangent in splits]
    for k, (split, _) in enumerate(splits):
        assert all(torch.equal(a, b) for a, b in zip(expected[k], [*split.weight_grad(), dx[k]], strict=True))
