"""Alike updates in one call, which is how a GPU does them, have the bits of one after the other."""

from __future__ import annotations

from unittest.mock import patch

import pytest
import torch
from helpers import caught, same_bits
from optimizers import NORMAL, OPTIMIZERS, exact, metrics, step_of, wrap_with

from olmo_fn import tree
from olmo_fn.core import step as step_module
from olmo_fn.core.gradients import Gradients
from olmo_fn.core.layout import SINGLE, norms
from olmo_fn.core.pipe import donate, ema, skip_spikes, with_execution
from olmo_fn.core.update import together
from olmo_fn.optim import adamw
from olmo_fn.spec import Spec, init

SPECS = {
    "embed": Spec((6, 4), ("vocab", "embed"), NORMAL),
    "blocks": {
        str(i): {
            "w": Spec((4, 6), ("embed", "mlp"), NORMAL),
            "w_out": Spec((6, 4), ("mlp", "embed"), NORMAL),
            "norm": Spec((6,), ("mlp",), NORMAL),
        }
        for i in range(3)
    },
    "bias": Spec((6,), ("mlp",), NORMAL),
}


def drive(step, dtype=torch.float32, n=3):
    state = step.init(init(SPECS, 0, dtype))
    for i in range(n):
        scale = torch.tensor(0.5)  # a factor that clip has left to the update
        grads = Gradients(init(SPECS, i + 100, dtype), metrics(1.0 + 0.01 * i))
        state, _ = step.update(state, grads._replace(signals=grads.signals._replace(scale=scale)))
    return state


def law_together(step, most, dtype=torch.float32, kernel=None):
    plain = with_execution(step, together=1)
    many = with_execution(step, together=most, **({"kernel": kernel} if kernel else {}))
    assert same_bits(drive(plain, dtype)._asdict(), drive(many, dtype)._asdict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_in_one_call(name):
    step = step_of(OPTIMIZERS[name](0.01, specs=SPECS), skip_spikes(sigma=6, window=8), ema(0.9), donate())
    law_together(step, 4)


@pytest.mark.parametrize("most", [2, 3, 16])
def test_of_any_number(most):
    law_together(step_of(adamw(0.01)), most, torch.bfloat16)


def test_the_law_catches():
    """Leaves of one size with other scalars: a weight decay that embeddings and norms do not have."""

    def of_one_size(paths, kind, most):
        return together(paths, lambda path: kind(path)[2], most)

    with patch.object(step_module, "together", of_one_size):
        caught(law_together, step_of(adamw(0.01)), 4)


def test_few_compilations(monkeypatch):
    """One for each number of leaves in a call, whatever their sizes are."""
    kernel, made = wrap_with("eager"), []
    step = with_execution(step_of(adamw(0.01), donate()), together=4, kernel=lambda fn: made.append(fn) or kernel(fn))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    drive(step)
    kinds = {fn.__name__ for fn in made}
    assert kinds == {"each", "guarded"}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # of 4, 2 and 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if exact(name)])
def test_in_one_call_compiled(name):
    """By Inductor, leaf by leaf and together: the same operations, the same bits."""
    step = step_of(OPTIMIZERS[name](0.01, specs=SPECS), donate())
    step = with_execution(step, kernel=wrap_with("inductor"))
    law_together(step, 4)


def test_norms_in_one_launch():
    """Those of every dtype together are the norm that one process takes part by part."""
    grads = init(SPECS, 0)
    leaves = [g for _, g in tree.items(grads)]
    mixed = [leaves[0], *(g.bfloat16() for g in leaves[1:4]), leaves[4].double()]
    for some in (leaves, mixed):
        found = torch.linalg.vector_norm(norms(some))
        expected = SINGLE.sharing.norm(dict(zip("abcdefghijk", some, strict=False)))
        torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=0)
