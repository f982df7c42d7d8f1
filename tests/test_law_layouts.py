"""Law 2: loss, gradients and whole steps are the same under any mesh and any rules, on real processes.

The mutants that this law catches are in test_law_layouts_mutants.py.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import Case, batches_of, cases

from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.optim import adamw
from olmo_fn.optim.base import optimizer
from olmo_fn.parallel.check import check_layout
from olmo_fn.step import Leaf, Step, Transform, accumulate, clip, ema, grad, pipe, skip_spikes
from olmo_fn.testing import Layout, Pool, assert_equivalent

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def momentum(lr: float) -> Transform:
    """SGD with momentum, each update divided by its norm over the whole parameter: not elementwise, as Muon is not."""

    def update(p, g, slots, s):
        m = 0.9 * slots["momentum"] + g
        return p - s["lr"] * m / (m.norm() + 1), {"momentum": m}

    leaf = Leaf(lambda p: {"momentum": torch.zeros_like(p)}, update, elementwise=False)
    return optimizer("momentum", lambda path: leaf, lr)


def recipe(
    model: Model, dtype: torch.dtype, engine: str = "tape", remat: str = "none", parts: int = 1, optim: str = "adamw"
) -> Step:
    """A step with everything in it."""
    return pipe(
        transformer.loss(model, z_loss=1e-2),
        grad(engine, remat, dtype),
        accumulate(parts),
        clip(0.5),
        adamw(1e-2) if optim == "adamw" else momentum(0.1),
        skip_spikes(),
        ema(0.9),
    )


def check(pool: Pool, case: Case, dtype: torch.dtype, steps: int = 2) -> float:
    """The largest difference that the case's layout makes, after its check on paper."""
    check_layout(case.model, case.mesh, case.rules, case.rows, case.length, case.accumulate)
    optim = "adamw" if dtype == torch.float64 and case.seed % 2 else "momentum"
    return assert_equivalent(
        partial(recipe, case.model, dtype, case.engine, case.remat, case.accumulate, optim),
        transformer.specs(case.model),
        [Layout(case.mesh, case.rules)],
        batches_of(case, steps),
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        pool=pool,
    )[0]


EXAMPLES = {2: 16, 3: 3, 4: 14, 8: 5}  # ranks: examples; a world of processes is started once


def law_2(pool: Pool, ranks: int, examples: int) -> None:
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

    @settings(deadline=None, max_examples=examples, derandomize=True, suppress_health_check=quiet)
    @given(cases(ranks), st.sampled_from([torch.float64, torch.float64, torch.float32]))
    def law(case: Case, dtype: torch.dtype) -> None:
        check(pool, case, dtype)

    law()


@pytest.mark.parametrize("ranks", EXAMPLES)
def test_law_2_layouts(pool: Pool, ranks: int) -> None:
    law_2(pool, ranks, EXAMPLES[ranks])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("ranks", [2, 3, 4, 6, 8])
def test_law_2_layouts_for_long(pool: Pool, ranks: int) -> None:
    law_2(pool, ranks, 150)
