"""A step is shallow: a reader with a debugger is soon where the numbers are."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from helpers import batch_of
from torch.utils._python_dispatch import TorchDispatchMode

import olmo_fn
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, warmup_cosine
from olmo_fn.spec import init

MOST = 16
PACKAGE = Path(olmo_fn.__file__).parent
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default}


class FirstProduct(TorchDispatchMode):
    """Keeps which functions of the package were on the stack at the first product of matrices, the outermost first."""

    def __init__(self) -> None:
        super().__init__()
        self.frames: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in PRODUCTS and not self.frames:
            frame = sys._getframe()
            while frame is not None:
                code = frame.f_code
                comprehension = code.co_name in ("<genexpr>", "<listcomp>")  # part of its function, as from Python 3.12 on
                if Path(code.co_filename).is_relative_to(PACKAGE) and not comprehension:
                    place = f"{Path(code.co_filename).relative_to(PACKAGE)}:{frame.f_lineno}"
                    self.frames.insert(0, f"{place} {code.co_qualname}")
                frame = frame.f_back
        return func(*args, **(kwargs or {}))


def test_the_step_of_the_readme_is_shallow() -> None:
    """From ``step(state, batch)`` to the queries, keys and values of the first block."""
    model = dense(d_model=64, n_layers=2, n_heads=4, hidden_size=128, vocab_size=256)
    step = pipe(
        transformer.loss(model, z_loss=1e-5),
        grad(remat="full"),
        accumulate(2),
        clip(1.0),
        adamw(warmup_cosine(3e-3, 10, 100)),
        skip_spikes(sigma=6),
        ema(0.999),
        donate(),
    )
    state = step.init(init(transformer.specs(model), seed=0))
    with FirstProduct() as seen:
        step(state, batch_of(256, rows=4, length=32))
    print("\n".join(seen.frames))
    assert "attention" in seen.frames[-1] or "linear" in seen.frames[-1]
    assert len(seen.frames) <= MOST, "\n".join([f"{len(seen.frames)} functions to the first product:", *seen.frames])
