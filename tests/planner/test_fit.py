"""A run that cannot fit is refused before anything is allocated, and what the message names does fit."""

import re
from dataclasses import replace

import pytest
import tyro
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from programs import python

from configs import CONFIGS
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models.config import dense
from olmo_fn.planner import formulas
from olmo_fn.planner.estimate import PROCESS, estimate
from olmo_fn.planner.fit import check_memory, need
from olmo_fn.planner.plan_input import PlanInput
from olmo_fn.train.accelerators import ACCELERATORS
from olmo_fn.train.config import Config, Recipe

GB = 1e9


def test_the_command_says_so_in_one_line(tmp_path):
    found = python("train.py", "olmo2-32b", "--run.folder", tmp_path / "run")  # no machine has that
    assert found.returncode == 2
    assert found.stderr.count("\n") == 1
    assert re.match(r"error: a step needs (about )?\d{3}(\.\d)? GiB, for a sequence of 4,096 at once; there are ", found.stderr)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "memory", "flags"),
    [
        ("olmo2-30m", 32 * GB, r"--recipe\.accumulate \d+"),
        ("olmo2-1b", 25 * GB, r"--recipe\.accumulate \d+ --recipe\.remat full --optim\.moments bfloat16"),
    ],
)
def test_what_the_message_names_fits(name, memory, flags):
    """And with half of the accumulation it would not."""
    with pytest.raises(ValueError, match="This fits: ") as refused:
        check_memory(CONFIGS[name], Mesh(), "bfloat16", memory)
    named = str(refused.value).partition("This fits: ")[2]
    assert re.fullmatch(flags, named)
    cfg = tyro.cli(Config, args=named.split(), default=CONFIGS[name])
    check_memory(cfg, Mesh(), "bfloat16", memory)
    less = replace(cfg, recipe=replace(cfg.recipe, accumulate=cfg.recipe.accumulate // 2))
    with pytest.raises(ValueError, match="This fits: "):
        check_memory(less, Mesh(), "bfloat16", memory)


@pytest.mark.slow
def test_what_can_never_fit_is_told_how_far_it_is():
    with pytest.raises(
        ValueError, match=r"Even --recipe.accumulate 128 .* needs 7\.\d: take a smaller model or shorter sequences, or more"
    ):
        check_memory(CONFIGS["olmo2-1b"], Mesh(dp_shard=4), "bfloat16", 6 * GB)


@examples(12)
@given(st.data())
def test_what_is_not_traced_fits(data):
    """Where the formulas spare a run its trace, the trace would have let it through."""
    draw = data.draw
    heads = draw(st.sampled_from((1, 2, 4)))
    model = dense(
        heads * draw(st.sampled_from((8, 64))),
        draw(st.integers(1, 4)),
        heads,
        draw(st.sampled_from((16, 700))),
        vocab_size=draw(st.sampled_from((64, 50_000))),
        head_dim=draw(st.sampled_from((None, 128))),
    )
    recipe = Recipe(draw(st.sampled_from((1, 4, 32))), draw(st.sampled_from((16, 512))), ema=draw(st.sampled_from((0.0, 0.9))))
    recipe = replace(recipe, dtype=draw(st.sampled_from(("float32", "bfloat16"))))
    cfg = replace(CONFIGS["olmo2-tiny"], model=model, recipe=recipe)
    cfg = replace(cfg, optim=replace(cfg.optim, name=draw(st.sampled_from(("adamw", "muon", "adafactor", "soap")))))
    plan = PlanInput(cfg, Mesh(), "cpu")
    assert need(plan) <= PROCESS + formulas.WITHIN * formulas.memory(plan)


LAYOUTS = [
    ("olmo2-1b", Mesh(dp_shard=8), {"batch_size": 16}),
    ("olmo2-1b", Mesh(dp_shard=8), {"batch_size": 16, "remat": "full"}),
    ("olmo2-7b", Mesh(dp_shard=4, tp=8), {"batch_size": 16}),
    ("olmo2-7b", Mesh(dp_shard=8, cp=2), {"batch_size": 8, "sequence_length": 8192}),
    ("olmo2-7b", Mesh(pp=4, dp_shard=8), {"batch_size": 64, "pp_microbatches": 8}),
    ("olmo2-7b", Mesh(pp=4, dp_shard=8), {"batch_size": 64, "pp_schedule": "interleaved", "pp_chunks": 2}),
    ("olmo2-32b", Mesh(dp_shard=128, tp=2), {"batch_size": 128, "remat": "full"}),
    ("olmoe-1b-7b", Mesh(dp_shard=8), {"batch_size": 8}),
    ("olmoe-1b-7b", Mesh(dp_shard=8, ep=8), {"batch_size": 8}),
    ("olmoe-1b-7b", Mesh(dp_shard=16, ep=4), {"batch_size": 16, "remat": "full"}),
    ("qwen3-30b-a3b", Mesh(pp=4, dp_shard=8, ep=8), {"batch_size": 64, "pp_microbatches": 8}),
]


@pytest.mark.parametrize(("name", "mesh", "changes"), LAYOUTS)
def test_formulas_order_as_traces_do(name, mesh, changes):
    """Memory within a factor of 2, and seconds within a factor of 1.5, of what the trace says."""
    found = estimate(PlanInput(CONFIGS[name], mesh).changed(mesh=mesh, **changes))
    assert 1 / formulas.WITHIN < formulas.memory(found.plan) / found.largest.total < formulas.WITHIN
    assert 1 / 1.5 < formulas.seconds(found.plan, ACCELERATORS["h100"]) / found.clock.seconds < 1.5
