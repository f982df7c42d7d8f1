"""Law 2: loss, gradients and whole steps are the same under any mesh and any rules, on real processes.

The mutants that this law catches are in test_law_layouts_mutants.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import examples, one_stage
from hypothesis import HealthCheck, Phase, given
from hypothesis import strategies as st
from strategies import Case, batches_of, cases

from olmo_fn.core.chain import Batch
from olmo_fn.core.compile import compile
from olmo_fn.core.pipe import Transform, accumulate, clip, ema, grad, pipe, skip_spikes
from olmo_fn.core.step import Step
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import Model, dense
from olmo_fn.optim import adamw
from olmo_fn.optim.base import Rule, optimizer
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import ONE_BY_ONE
from olmo_fn.spec import Init, Spec, init
from olmo_fn.testing import Layout, Pool, assert_equivalent
from olmo_fn.testing.equivalence import kind, largest_by_kind, record
from olmo_fn.train.check_mesh import check_layout

DOUBLE = torch.float64
TOLERANCE = {DOUBLE: 1e-10, torch.float32: 1e-5}


def momentum(lr: float) -> Transform:
    """An optimizer that sees whole parameters, and does not divide by an entry: rounding stays small."""

    def update(p, g, slots, s):
        v = 0.9 * slots["velocity"] + g
        return s["lr"] * v / (v.norm() + 1), {"velocity": v}

    return optimizer("momentum", Rule(lambda path, p: {"velocity": torch.zeros_like(p)}, update, elementwise=False), lr)


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


def steps_of(case: Case, dtype: torch.dtype) -> Callable[[], Step]:
    optim = "adamw" if dtype == torch.float64 and case.seed % 2 else "momentum"
    return partial(recipe, case.model, dtype, case.engine, case.remat, case.accumulate, optim)


def rounding(case: Case, batches: list[Batch]) -> float:
    """How far one process in fp32 is from itself in fp64, as `assert_equivalent` measures it."""
    narrow, wide = (
        {name: leaf for name, (leaf, _) in record(steps(), init(transformer.specs(case.model), 0, dtype), batches).items()}
        for steps, dtype in ((steps_of(case, torch.float32), torch.float32), (steps_of(case._replace(seed=0), DOUBLE), DOUBLE))
    )
    scales = largest_by_kind(wide)
    return max(float((narrow[n, x] - leaf).abs().max()) / scales[n, kind(x)] for (n, x), leaf in wide.items() if leaf.any())


def check(pool: Pool, case: Case, dtype: torch.dtype, steps: int = 2) -> float:
    """The largest difference that the case's layout makes, after its check on paper."""
    check_layout(case.model, case.mesh, case.rules, case.rows, case.length, case.accumulate)
    batches = batches_of(case, steps)
    if dtype == torch.float32 and rounding(case, batches) > 1e-6:  # a model that amplifies rounding shows nothing in fp32
        dtype = DOUBLE
    return assert_equivalent(
        steps_of(case, dtype),
        transformer.specs(case.model),
        [Layout(case.mesh, case.rules, case.pipeline)],
        batches,
        dtype=dtype,
        tolerance=TOLERANCE[dtype],
        pool=pool,
    )[0]


EXAMPLES = {2: 16, 3: 4, 4: 12, 8: 4}  # ranks: examples; a world of processes is started once


def law_2(pool: Pool, ranks: int, count: int) -> None:
    phases = (Phase.explicit, Phase.reuse, Phase.generate)  # no shrinking, which takes minutes: the message names the case
    quiet = [HealthCheck.too_slow]

    @examples(count, phases=phases, suppress_health_check=quiet)
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


# --- compiled, over many steps, and with what is not a number ---------------------------------------------------------

SMALL = dense(10, 1, 4, 11, vocab_size=19, n_kv_heads=2, head_dim=4, init_std=0.3)


def compiled(model: Model, dtype: torch.dtype) -> Step:
    return compile()(recipe(model, dtype))


def a_case(mesh: Mesh, rules: Rules = DEFAULT, pipeline: Pipeline = ONE_BY_ONE, model: Model = SMALL) -> Case:
    return Case(model, mesh, rules, pipeline, 4, 8, 1, "none", "tape", documents=False, masked=0.3, seed=1)


@pytest.mark.parametrize("layout", [Layout(Mesh(tp=2)), Layout(Mesh(dp_shard=2))], ids=str)
@pytest.mark.slow
def test_compiled_layouts(pool: Pool, layout: Layout) -> None:
    """Collectives are inside compiled stages, weights are gathered around them."""
    batches, specs = batches_of(a_case(*layout), 2), transformer.specs(SMALL)
    eager, fast = (partial(make, SMALL, torch.float64) for make in (recipe, compiled))
    assert_equivalent(fast, specs, [layout], batches, reference=eager, pool=pool)


TRAJECTORIES = [
    (Layout(Mesh(dp_shard=2), Rules(keep_gathered=True)), torch.float64, 1e-10),
    (Layout(Mesh(tp=2)), torch.float32, 1e-4),
    (Layout(Mesh(dp_shard=2, cp=2), Rules(cp_method="ring")), torch.float32, 1e-4),
]


@pytest.mark.parametrize(
    ("layout", "dtype", "tolerance"),
    [
        pytest.param(*TRAJECTORIES[0], id="zero2-fp64"),
        pytest.param(*TRAJECTORIES[1], id="tp-fp32", marks=pytest.mark.slow),
        pytest.param(*TRAJECTORIES[2], id="fsdp-ring-fp32", marks=pytest.mark.slow),
    ],
)
def test_trajectories_of_50_steps(pool: Pool, layout: Layout, dtype: torch.dtype, tolerance: float) -> None:
    """Differences do not grow: every loss and gradient of 50 steps, and the parameters after them."""
    make, specs = partial(recipe, SMALL, dtype, optim="momentum"), transformer.specs(SMALL)
    batches = batches_of(a_case(*layout), 5) * 10  # learnt by heart: the loss falls
    worst = assert_equivalent(make, specs, [layout], batches, dtype=dtype, tolerance=tolerance, pool=pool)
    print(f"{layout}: {worst[0]:.1e}")


def regression(params, batch):
    """Summed squares, 0 where the label is -100."""
    counts = batch["labels"] != -100
    return ((batch["x"] @ params["w"]).tanh().sum(-1) - batch["labels"]).square().where(counts, 0.0).sum(), {}


def of_numbers(engine: str) -> Step:
    loss = one_stage(regression, "w") if engine == "tape" else regression
    return pipe(loss, grad(engine, dtype=torch.float64), adamw(1e-2), skip_spikes(), ema(0.9))


@pytest.mark.parametrize("engine", ["tape", "func"])
def test_nan_on_one_rank_skips_the_step_on_all(pool: Pool, engine: str) -> None:
    """Rank 1's data has a NaN in the second of three steps: on every rank the state keeps its bits, and training goes on."""
    generator = torch.Generator().manual_seed(0)
    x, labels = torch.randn(3, 8, 5, generator=generator, dtype=torch.float64), torch.arange(8)
    x[1, 4, 2] = torch.nan
    batches = [{"x": part, "labels": labels} for part in x]
    specs = {"w": Spec((5, 3), ("embed", "mlp"), Init("normal", 1.0))}
    layouts = [Layout(Mesh(dp_shard=2)), Layout(Mesh(dp_replicate=2)), Layout(Mesh(dp_replicate=2, dp_shard=2))]
    step = partial(of_numbers, engine)
    assert_equivalent(step, specs, layouts, batches, pool=pool)
    before, after = (record(step(), init(specs, 0, torch.float64), batches[:n]) for n in (1, 2))
    assert after[1, "metric skipped"][0] == 1
    assert after[1, "metric loss"][0].isnan()
    for name in ("parameter w", "slot adamw_m.w", "slot ema.w"):
        assert torch.equal(before[0, name][0], after[1, name][0])
