"""What a run says of its experts: metrics that a person reads, the loads of all of them now and then, and a picture."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from programs import context

from olmo_fn.checkpoint import load, newest_whole
from olmo_fn.cli import main as cli
from olmo_fn.data.settings import Data
from olmo_fn.models.config import Attention, Block, Model
from olmo_fn.models.settings.moe import MoE
from olmo_fn.plot_loads import plot_loads
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.schedules import Constant

MOE = MoE(num_experts=4, top_k=2, expert_size=8, balance_rate=0.01, capacity_factor=0.5)
SAME = ("step", "loss", "ce", "router_balance", "router_z", "router_entropy", "load_excess", "dropped", "load/0", "load/1")


def run_of(folder: Path, steps: int = 6) -> Config:
    tokens = folder.parent / "tokens.npy"
    np.random.default_rng(0).integers(1, 64, 20_000, dtype=np.uint8).tofile(tokens)
    return Config(
        model=Model(16, 2, 64, block=Block(mixer=Attention(n_heads=2), feed_forward=MOE)),
        data=Data(paths=(str(tokens),), heldout_fraction=0, dtype="uint8", cache_dir=str(folder.parent / "cache")),
        optim=AdamW(lr=1e-2),
        schedule=Constant(warmup=0),
        recipe=Recipe(batch_size=4, sequence_length=32, compile=False, ema=0.9, accumulate=2, dtype="float32"),
        run=Run(folder=str(folder), steps=steps, checkpoint_every=3, threads=1, sample=""),
    )


def trained(cfg: Config) -> list[dict]:
    from olmo_fn.train.loop import train

    process = context.Process(target=train, args=(cfg,))
    process.start()
    process.join(240)
    assert process.exitcode == 0
    return read_metrics(Path(cfg.run.folder) / "metrics.jsonl")


def test_metrics_biases_and_the_picture(tmp_path: Path) -> None:
    lines = trained(run_of(tmp_path / "run"))
    for line in lines:
        assert {"load_excess", "router_entropy", "router_balance", "router_z", "dropped"} <= line.keys()
        shares = [line["load/0"], line["load/1"]]
        assert all(sum(share) == pytest.approx(1, abs=1e-4) for share in shares)
        assert line["load_excess"] == pytest.approx(max(4 * max(share) for share in shares) - 1, abs=1e-3)
        assert 0 < line["router_entropy"] <= np.log(4) + 1e-6
        assert 0.5 <= line["dropped"] <= 0.75, "each takes 8 of 16 on average: two at least, four at most are full"
        assert "routed" not in line
    state, _ = load(newest_whole(tmp_path / "run" / "checkpoints"))
    for i in range(2):
        bias = state["params"]["blocks"][str(i)]["moe"]["router_bias"]
        assert bias.abs().max() > 0
        assert torch.allclose(bias / 0.01, (bias / 0.01).round(), atol=1e-4), "it moves by whole steps of the rate"
    assert not any("router_bias" in json.dumps([*slot]) for name, slot in state["slots"].items() if name.startswith("adamw"))
    picture = plot_loads(tmp_path / "run")
    assert picture is not None
    assert picture.stat().st_size > 5000


def test_a_run_that_goes_on_has_the_numbers_of_one_that_never_stopped(tmp_path: Path) -> None:
    whole = trained(run_of(tmp_path / "whole"))
    cfg = run_of(tmp_path / "parts")
    trained(replace(cfg, run=replace(cfg.run, steps=3)))
    parts = trained(replace(cfg, run=replace(cfg.run, steps=6)))
    assert [{k: line[k] for k in SAME} for line in parts[3:]] == [{k: line[k] for k in SAME} for line in whole[3:]]


def test_a_dense_run_has_none_of_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cfg = run_of(tmp_path / "run", steps=2)
    dense = MoE(dense_layers=2, dense_size=8)
    lines = trained(replace(cfg, model=replace(cfg.model, block=replace(cfg.model.block, feed_forward=dense))))
    assert not any(name.startswith(("load", "router", "dropped")) for line in lines for name in line)
    assert plot_loads(tmp_path / "run") is None
    assert not caplog.records, "nor is any of its lines said to be left out"


def test_runs_in_one_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        trained(run_of(tmp_path / name))
    runs = [str(tmp_path / name) for name in ("a", "b")]
    for over in ("tokens", "steps", "flops"):
        picture = tmp_path / f"{over}.png"
        assert cli.main(["plot", "runs", *runs, "--over", over, "-o", str(picture)]) == 0
        assert capsys.readouterr().out.strip() == str(picture)
        assert picture.stat().st_size > 5000
    for words, said in (([], "name the folders of runs"), ([str(tmp_path)], "has no step in metrics.jsonl")):
        assert cli.main(["plot", "runs", *words]) == 2
        assert said in capsys.readouterr().err
