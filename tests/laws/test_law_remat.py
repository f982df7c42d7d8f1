"""Law 5, of what the tape keeps: which results of a block that runs twice, and where; with mutants."""

from collections import Counter

import pytest
import torch
from helpers import batch_of, params_of, same_bits
from torch.utils._python_dispatch import TorchDispatchMode

from olmo_fn.core.pipe import grad, pipe
from olmo_fn.core.primitive import Once
from olmo_fn.models import transformer
from olmo_fn.models.config import dense

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


def gradients(remat, *transforms):
    return pipe(transformer.loss(MODEL, z_loss=1e-2), grad(dtype=DOUBLE, remat=remat), *transforms)


def law_invisible(remat):
    batch = batch_of(MODEL.vocab_size)
    expected, found = (gradients(how)(params_of(MODEL), batch) for how in ("none", remat))
    assert same_bits(*(one[0] for one in (expected, found)))
    assert same_bits(*(one[1] for one in (expected, found)))


def test_selective_runs_attention_once():
    def products(remat):
        with Products() as seen:
            gradients(remat)(params_of(MODEL), batch_of(MODEL.vocab_size))
        return seen.counts

    none, selective, full = map(products, ("none", "selective", "full"))
    assert none[0] < selective[0] == full[0]
    assert none[1] == selective[1] < full[1]


def test_selective_catches_results_of_another_block(monkeypatch):
    """A mutant: what attention gave is kept for all blocks together, and given back to the wrong one."""
    kept, init = [], Once.__init__

    def together(self, primitive):
        init(self, primitive)
        self.kept = kept

    law_invisible("selective")
    monkeypatch.setattr(Once, "__init__", together)
    with pytest.raises(AssertionError):
        law_invisible("selective")


def test_selective_catches_inputs_of_the_first_run(monkeypatch):
    """A mutant: the pullback's inputs are not filled in again."""

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
