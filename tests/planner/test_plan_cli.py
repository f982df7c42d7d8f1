"""The dry run and the search as a user sees them."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import train
from configs import CONFIGS
from olmo_fn.cli import main as cli
from olmo_fn.cli import training
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models.config import dense
from olmo_fn.models.count import num_params
from olmo_fn.models.settings.moe import MoE
from olmo_fn.planner import tables
from olmo_fn.planner.estimate import estimate
from olmo_fn.planner.fit import remedy
from olmo_fn.planner.plan_input import PlanInput, flags, plan_input
from olmo_fn.planner.search import layouts, search
from olmo_fn.train.accelerators import ACCELERATORS
from olmo_fn.train.config import Config, Recipe, Run

GOLDEN = Path(__file__).parents[1] / "golden" / "plan-olmo2-32b.txt"
PAGE = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
DRY_RUN = "olmo2-32b --dry-run --mesh.dp-shard 64 --mesh.tp 8 --mesh.pp 2"
COUNTS = "\n\nparameters  "
SMALL = Config(dense(64, 8, 4, 160, vocab_size=512), recipe=Recipe(batch_size=32, sequence_length=64), run=Run(steps=5000))


def test_dry_run_of_32b(capsys):
    """The issue's command: its sharding, memory and traffic tables are the golden ones, and the counts are exact."""
    assert train.main(shlex.split(DRY_RUN)) == 0
    printed = capsys.readouterr().out
    assert f"{num_params(CONFIGS['olmo2-32b'].model):,}" in printed
    plan = f"{printed.partition(COUNTS)[0]}\n"
    assert plan == GOLDEN.read_text(), (
        f"if this is meant: python train.py {DRY_RUN}, what comes before the counts, into {GOLDEN}"
    )


def test_dry_run_of_experts(capsys):
    """What the page shows is what its command says, for even loads and for twice as many of them."""
    (command,) = re.findall(r"^    python train\.py (qwen3-30b-a3b .*)$", PAGE, re.M)
    for more in ("", " --skew 2"):
        assert train.main(shlex.split(command + more)) == 0
        lines = capsys.readouterr().out.partition("\n100,000 steps")[0].splitlines()
        shown = [line for line in lines if line.startswith(("at its peak", "computing", "waiting for others", "a step"))]
        if not more:
            shown = lines[[line.startswith("GiB a rank") for line in lines].index(True) :]
        assert len(shown) >= 4
        assert not [line for line in shown if f"{line}\n" not in PAGE]


def test_what_does_not_fit_names_the_flag_that_helps(capsys):
    """And typing it does help."""
    command = "olmo2-1b --dry-run --mesh.dp-shard 8 --recipe.batch-size 128 --recipe.accumulate 1"
    assert train.main(shlex.split(command)) == 0
    words = re.search(r"^try (--.*), which takes", capsys.readouterr().out, re.M)
    assert words is not None
    assert train.main(shlex.split(f"{command} {words[1]}")) == 0  # of a flag given twice the last counts
    assert "\nfits: " in capsys.readouterr().out


def test_hopeless_and_impossible(capsys):
    assert train.main(shlex.split("olmo2-7b --dry-run")) == 0  # a sequence at once, which no single device can hold
    told = r"^even --recipe.remat full --optim.moments bfloat16 takes .*; search: olmo-fn plan"
    assert re.search(told, capsys.readouterr().out, re.M)
    assert train.main(shlex.split("olmo2-7b --dry-run --recipe.engine func")) == 2
    assert "plan with --recipe.engine tape" in capsys.readouterr().err
    assert train.main(shlex.split("olmo2-7b --dry-run --mesh.tp 3")) == 2
    assert "--mesh.tp 3 does not divide" in capsys.readouterr().err
    assert train.main(shlex.split("olmo2-7b --dry-run --gpus 12 --mesh.tp 8")) == 2
    assert "does not divide the 12 processes" in capsys.readouterr().err
    assert train.main(shlex.split("olmo2-7b --dry-run --mesh.pp 2 --mesh.pp-microbatches 3")) == 2
    assert "--mesh.pp-microbatches" in capsys.readouterr().err


def test_remedies_are_smaller():
    """Whatever is tried takes less memory than what does not fit; the first that fits is taken, the smallest is told."""
    cfg = replace(SMALL, recipe=replace(SMALL.recipe, accumulate=2), mesh=MeshConfig(dp_shard=2, weights="zero-2"))
    plan, tried = plan_input(cfg), {}

    def size(other):
        return tried.setdefault(flags(other.cfg, cfg), estimate(other).largest.total)

    largest = size(plan)
    assert remedy(plan, lambda other: size(other) < 0)[0] is None
    assert len(tried) == 6
    assert max(tried.values()) == largest
    for bytes in list(tried.values()):
        fitting, _ = remedy(plan, lambda other, bytes=bytes: size(other) <= bytes)
        assert size(fitting) <= bytes


@pytest.mark.slow
def test_search_finds_the_best_of_all_layouts():
    """Against an exact estimate of every layout: nothing that fits is more than 5 % faster than the first one found."""
    cfg = replace(CONFIGS["olmo2-370m"], gpu="a100", recipe=Recipe(batch_size=8, sequence_length=256))
    found = search(cfg, 4, best=3)
    assert [one.clock.seconds for one in found] == sorted(one.clock.seconds for one in found)
    exact = []
    for one in layouts(cfg, 4):
        try:
            exact.append(estimate(one))
        except ValueError:
            continue
    assert len(exact) > 10
    fastest = min(one.clock.seconds for one in exact if one.fits)
    assert found[0].clock.seconds <= 1.05 * fastest
    assert all(one.fits and one.plan.mesh.size == 4 and one.gpu is ACCELERATORS["a100"] for one in found)


def test_the_flags_of_a_layout_are_the_layout():
    """Typed into train.py, what the search prints gives the job that it estimated."""
    for one in search(SMALL, 8, best=2):
        words = shlex.split(flags(one.plan.cfg, SMALL))
        recipe = ["--recipe.batch-size", "32", "--recipe.sequence-length", "64"]
        typed = plan_input(training.parse(["olmo2-7b", *recipe, *words], CONFIGS, "train.py"))
        assert typed.mesh == one.plan.mesh
        assert (typed.rows, typed.microbatches, typed.cfg.recipe.remat) == (
            one.plan.rows,
            one.plan.microbatches,
            one.plan.cfg.recipe.remat,
        )


def test_layouts_share_experts_as_far_as_these_go():
    """And what the search prints of them is what it estimated, as for all layouts."""
    six = replace(SMALL.model, block=replace(SMALL.model.block, feed_forward=MoE(num_experts=6, top_k=2, expert_size=32)))
    assert {one.mesh.ep for one in layouts(SMALL, 4)} == {1}
    assert {one.mesh.ep for one in layouts(replace(SMALL, model=six), 4)} == {1, 2}
    base = CONFIGS["olmoe-tiny"]
    cfg = replace(base, recipe=replace(base.recipe, batch_size=32, sequence_length=64))
    found = next(one for one in layouts(cfg, 8) if one.mesh.ep == 4 and one.mesh.dp_shard == 8)
    words = [*shlex.split(flags(found.cfg, cfg)), "--recipe.batch-size", "32", "--recipe.sequence-length", "64"]
    assert plan_input(training.parse(["olmoe-tiny", *words], CONFIGS, "train.py")).mesh == found.mesh
    assert search(cfg, 4, best=1)[0].fits


def test_search_on_the_command_line(tmp_path, capsys):
    picture = tmp_path / "plan.png"
    small = ["--batch-size", "16", "--sequence-length", "128"]
    assert (
        cli.main(["plan", "olmo2-14m", "--gpus", "2", "--gpu", "a100", "--best", "2", "--picture", str(picture), *small]) == 0
    )
    printed = capsys.readouterr().out
    assert "2 x A100" in printed
    assert "--mesh.dp-" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert cli.main(["plan", "olmoe-tiny", "--gpus", "2", "--best", "1", "--skew", "2", *small]) == 0
    assert "--mesh.dp-" in capsys.readouterr().out
    assert cli.main(["plan", "olmo2-14m", "--gpus", "2", "--skew", "2", *small]) == 2
    assert "--skew 2 is of the tokens for experts" in capsys.readouterr().err
    assert cli.main(["plan", "olmo2-14", "--gpus", "8"]) == 2
    assert "neither a preset nor a config.yaml" in capsys.readouterr().err
    assert cli.main(["plan", "olmo2-32b", "--gpus", "1", "--gpu", "a100"]) == 2
    assert "no layout of 1 x A100" in capsys.readouterr().err


def test_tables_of_one_process():
    text = tables.report(SMALL)
    assert "one process" in text
    assert "no traffic" in text
    assert PlanInput(SMALL, Mesh()).rows == 32
