"""Law 5, of what the tape keeps: which results of a block that runs twice, and where; with mutants."""

import gc
import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from helpers import batch_of, params_of, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_fn.core.capture import capture
from olmo_fn.core.gradients import EAGER
from olmo_fn.core.offload import HostStash, Link, copy_beside, no_stash, pinned
from olmo_fn.core.pipe import donate, grad, offload, pipe
from olmo_fn.core.primitive import Once
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import sgd
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.recipe import recipe

aten, DOUBLE = torch.ops.aten, torch.float64
MODEL = dense(8, 3, 2, 12, vocab_size=17, n_kv_heads=1, window_pattern=(3, -1), init_std=0.3)


class Products(TorchDispatchMode):
    """Counts products with matrices, and batched ones, which are attention's."""

    def __init__(self):
        super().__init__()
        self.made = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made[func._overloadpacket] += 1
        return func(*args, **(kwargs or {}))

    @property
    def counts(self):
        return self.made[aten.mm] + self.made[aten.addmm_], self.made[aten.bmm]


LOSS = transformer.loss(MODEL, z_loss=1e-2)


def gradients(remat, execution=EAGER):
    return grad(dtype=DOUBLE, remat=remat)(LOSS)(params_of(MODEL), batch_of(MODEL.vocab_size), execution)


def law_invisible(remat, stash=no_stash):
    expected, found = gradients("none"), gradients(remat, replace(EAGER, stash=stash))
    assert same_bits(expected[0], found[0])
    assert same_bits(expected[1], found[1])


# --- attention's results are kept -------------------------------------------------------------------------------------


def test_selective_runs_attention_once():
    def products(remat):
        with Products() as seen:
            gradients(remat)
        return seen.counts

    none, selective, full = map(products, ("none", "selective", "full"))
    assert none[0] < selective[0] == full[0]
    assert none[1] == selective[1] < full[1]


def test_selective_catches_results_of_another_block(monkeypatch):
    """A mutant: a block is given what attention gave in the one after it."""
    given, seen = Once.given, []

    def another(self, results):
        seen.append(results)
        given(self, seen[max(0, len(seen) - 2)])

    law_invisible("selective")
    monkeypatch.setattr(Once, "given", another)
    with pytest.raises(AssertionError):
        law_invisible("selective")


def test_selective_catches_inputs_that_are_not_filled_in(monkeypatch):
    """A mutant: the pullback's inputs are zeros."""

    def second(self, vjp, *args, costly=False):
        def run(weights, inputs):
            own, out, pullback = self.kept.pop(0)
            for x, again in zip(own, inputs, strict=True):
                x.data = torch.zeros_like(again)
            return out, pullback

        return self.primitive(run if costly else vjp, *args, costly=costly)

    monkeypatch.setattr(Once, "second", second)
    with pytest.raises(AssertionError):
        law_invisible("selective")


# --- what segments keep is in host memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("remat", ["full", "selective", "feed_forward", "every-2"])
def test_offload_is_invisible(remat):
    """Away from home but for the last, whose memory is not given up: every tensor is copied there and, but for it, back."""
    copies = []

    def copy(to, source):
        copies.append(len(to))
        return copy_beside(to, source)

    if remat != "feed_forward":  # which adds a residual's cotangents in another order, offloaded or not
        law_invisible(remat, lambda: HostStash(Link(pinned, copy)))
        segments = {"full": 3, "selective": 3, "every-2": 2}[remat]
        assert copies == (2 * segments - 1) * [2 if remat == "selective" else 1]
    assert same_bits(gradients(remat)[0], gradients(remat, replace(EAGER, stash=HostStash))[0])


def test_nothing_that_is_kept_stays():
    """Between the sweeps only the last block's input is where it was."""
    stash = HostStash()
    x = [torch.ones(2) for _ in range(3)]
    kept = [weakref.ref(one.untyped_storage()) for one in x]
    for one in x:
        stash([one])
    del x, one
    gc.collect()
    assert [ref() is None for ref in kept] == [True, True, False]


def same_memory():
    """A mutant: one buffer for all blocks."""
    buffers = {}
    return HostStash(Link(lambda x: buffers.setdefault(x.shape, torch.empty_like(x)), copy_beside))


def never_copied_back():
    """A mutant: what came back is used before it is there."""
    ways = []

    def copy(to, source):
        ways.append(to)
        return copy_beside(to, source) if len(ways) <= 3 else lambda: None  # three blocks go out

    return HostStash(Link(pinned, copy))


def first_of_all():
    """A mutant: blocks are given what was kept in the order in which it came, not in reverse."""
    stash, takes = HostStash(), []

    def queue(kept):
        takes.append(stash(kept))
        return lambda: takes.pop(0)()

    return queue


@pytest.mark.parametrize("mutant", [same_memory, never_copied_back, first_of_all])
def test_offload_catches(mutant):
    with pytest.raises(AssertionError):
        law_invisible("full", mutant)


def test_offload_needs_something_to_move():
    with pytest.raises(ValueError, match=r"^offload\(\) needs a grad\(\) with remat, which is nowhere before it in the pipe"):
        pipe(LOSS, grad(), sgd(0.1), offload())
    with pytest.raises(ValueError, match=r"^capture\(\) cannot record copies to host memory; leave out offload\(\)"):
        pipe(LOSS, grad(remat="full"), sgd(0.1), donate(), offload(), capture())
    with pytest.raises(ValueError, match=r"--recipe.offload moves what --recipe.remat keeps .*; add --recipe.remat full$"):
        recipe(Config(MODEL, recipe=Recipe(offload=True)))
    step = recipe(Config(MODEL, recipe=Recipe(offload=True, remat="selective", compile=False), run=Run(steps=5000)))
    assert step.execution.stash is HostStash
