"""Soups and pictures; and runs from the command line that use what changes over time."""

import importlib.util
import io
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from olmo_fn import average as soups
from olmo_fn import plot, tree
from olmo_fn.checkpoint import load, save, step_path
from olmo_fn.cli import main as cli
from olmo_fn.generate.load import load_model
from olmo_fn.models.config import dense
from olmo_fn.train.config import Config, Growth, Lora, Recipe, Run
from olmo_fn.train.observers import read_metrics
from olmo_fn.train.recipe import parameters
from olmo_fn.train.schedule import schedule, sizes
from olmo_fn.train.schedules import Constant, Cosine
from olmo_fn.transforms.lora import merge_lora

ROOT = Path(__file__).parents[2]
QUICK = examples(25)


# --- soups ------------------------------------------------------------------------------------------------------


@QUICK
@given(st.lists(st.floats(0.1, 5), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from(["params", "ema"]))
def test_average(tmp_path_factory, shares, seed, weights):
    """The weighted mean, in the dtype of the checkpoints; parameters without an average are averaged themselves."""
    folder, g = tmp_path_factory.mktemp("soup"), torch.Generator().manual_seed(seed)
    paths, trees = [], []
    for step in range(len(shares)):
        params = {"a": {"w": torch.randn(3, 4, generator=g)}, "b": torch.randn(5, generator=g).bfloat16()}
        state = {"params": params, "slots": {"ema": {"a": {"w": torch.randn(3, 4, generator=g)}}}}
        paths.append(save(state, folder, step=step))
        trees.append(params if weights == "params" else {**state["slots"]["ema"], "b": params["b"]})
    got = soups.average(paths, shares, weights)
    total = sum(shares)
    mean = tree.map(lambda *xs: sum(x.double() * s for x, s in zip(xs, shares, strict=True)).div(total).to(xs[0].dtype), *trees)
    assert_close(got, mean, rtol=1e-6, atol=1e-7)
    if len(set(shares)) > 1:  # the mutant forgets the shares
        assert not torch.allclose(soups.average(paths, (), weights)["a"]["w"], got["a"]["w"])


def test_average_refuses(tmp_path):
    a = save({"params": {"w": torch.ones(2)}}, tmp_path, step=1)
    b = save({"params": {"w": torch.ones(3)}}, tmp_path, step=2)
    c = save({"params": {"w": torch.ones(2), "v": torch.ones(2)}}, tmp_path, step=3)
    for other, name in ((b, "params.w"), (c, "params.v")):
        with pytest.raises(ValueError, match=f"is of another model than .*{name} differs"):
            soups.average([a, other])
    with pytest.raises(ValueError, match="holds no ema of its weights; use --weights params"):
        soups.average([a], weights="ema")
    with pytest.raises(ValueError, match="1 shares for 2 checkpoints"):
        soups.average([a, a], [1.0])
    with pytest.raises(ValueError, match="holds 3 checkpoints, not 5; use --last 3"):
        soups.chosen([tmp_path], 5)


# --- pictures ---------------------------------------------------------------------------------------------------


def test_every_schedule_is_drawn(tmp_path):
    """All by name and a preset in one picture."""
    names = [
        "cosine",
        "linear",
        "wsd",
        "constant",
        "half-cosine",
        "inv-sqrt",
        "cosine-linear",
        "power",
        "range-test",
        "olmo2-1b",
    ]
    output = tmp_path / "lr.png"
    assert cli.main(["plot", "schedule", *names, "--warmup", "0.02", "-o", str(output)]) == 0
    assert output.read_bytes().startswith(b"\x89PNG")
    more = [
        "--lengths",
        "300",
        "500",
        "--levels",
        "1",
        "0.5",
        "--shapes",
        "linear",
        "cosine",
        "--warmup",
        "100",
        "--total",
        "2000",
    ]
    assert cli.main(["plot", "schedule", "wsds", "piecewise", *more, "-o", str(output)]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule", "cosne"], "'cosne' is no schedule, preset or run; schedules are cosine"),
        (["schedule"], "name what to draw"),
        (["schedule", "wsd", "--warmup", "95000"], "wsd: warmup 95000 and decay 10000 together are longer"),
        (["schedule", "sequential", "--shapes", "linear"], None),
        (["schedule", "sequential", "--shapes", "linear", "--lengths", "5"], "sequential: 1 shapes need 0 lengths"),
        (["schedule", "piecewise", "--lengths", "5"], "piecewise: give --schedule.lengths and --schedule.levels one value"),
        (["schedule", "cosine", "-o", "/nowhere/x.png"], "cannot write '/nowhere/x.png'"),
        (["schedule", "cosine", "-o", "x.xyz"], "cannot write 'x.xyz'"),
        (["range-test", "/nowhere"], "'/nowhere' is not there"),
    ],
)
def test_wrong_pictures(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plot", *arguments]) == (2 if message else 0)
    err = capsys.readouterr().err
    assert err.count("\n") == (1 if message else 0)
    assert message is None or message in err


def test_without_matplotlib(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["plot", "schedule", "cosine"]) == 2
    assert capsys.readouterr().err == 'error: a picture needs matplotlib; install it with: pip install "olmo-fn[plot]"\n'


@QUICK
@given(st.floats(1e-4, 1e-2), st.floats(2, 30))
def test_range_test_finds_the_fall_and_the_edge(fall, wide):
    """A loss that falls around one rate and explodes beyond another."""
    rates = [1e-6 * (1e6) ** (i / 199) for i in range(200)]
    edge = fall * wide * 10
    lines = [{"lr": r, "loss": 8 - 3 / (1 + (fall / r) ** 2) + max(0.0, math.log(r / edge)) ** 2} for r in rates]
    found = plot.range_test([*lines, {"lr": 2.0, "loss": math.nan}], smooth=0.0)
    assert fall / 1.5 < found.steepest < fall * 1.5
    assert fall < found.lowest < edge * 4


# --- the config -------------------------------------------------------------------------------------------------


def config(**parts):
    return Config(model=dense(16, 1, 2, 32, vocab_size=64), **parts)


def test_units_of_a_growing_run():
    """In tokens the schedule follows what was really seen; the rate follows the batch."""
    growth = Growth(batch_sizes=(2, 4), until=(640, 1920), units="tokens", sqrt_lr=True)
    cfg = config(
        growth=growth,
        recipe=Recipe(batch_size=8, sequence_length=16),
        schedule=Constant(warmup=640, units="tokens"),
        run=Run(steps=100),
    )
    assert [phase[:2] for phase in sizes(cfg).phases] == [(0, 2), (20, 4), (40, 8)]
    rates = [schedule(cfg)(torch.tensor(step)).item() for step in (10, 20, 21, 40, 41)]
    lr = cfg.optim.lr
    assert rates == pytest.approx([lr / 2, lr, lr * 2**0.5, lr * 2**0.5, lr * 2], rel=1e-12)


def test_anneal_leaves_any_schedule():
    plain, early = (Cosine(warmup=10, anneal_at=at, decay=20, final=0.0).build(1.0, 100) for at in (0, 50))
    assert early(torch.tensor(50)) == plain(torch.tensor(50))
    assert early(torch.tensor(70)) == 0


# --- whole runs -------------------------------------------------------------------------------------------------


def train(*arguments):
    """What ``python train.py`` prints; in this process, which has torch already."""
    spec = importlib.util.spec_from_file_location("train_py", ROOT / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # a run sets it
        assert module.main([word for argument in arguments for word in str(argument).split()]) == 0
    return out.getvalue()


def soup(*arguments):
    assert cli.main(["average", *(word for argument in arguments for word in str(argument).split())]) == 0


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Flags of a small run, and the folder that it was trained in with a growing batch and merging."""
    folder = tmp_path_factory.mktemp("runs")
    np.random.default_rng(0).integers(1, 64, 20_000, dtype=np.uint8).tofile(folder / "tokens.npy")
    flags = {
        "data.paths": folder / "tokens.npy", "data.dtype": "uint8", "data.heldout-fraction": 0.05, "model.d-model": 16,
        "model.n-layers": 1, "model.n-heads": 2, "model.hidden-size": 32, "model.vocab-size": 64, "recipe.batch-size": 4,
        "recipe.sequence-length": 16, "optim.lr": 0.006, "run.threads": 1, "recipe.dtype": "float32",
    }  # fmt: skip
    flags = [
        "olmo2-tiny",
        *(str(word) for name, value in flags.items() for word in (f"--{name}", value)),
        "--recipe.no-compile",
        "--optim.name=adamw",
    ]
    more = "--run.steps 12 --run.checkpoint-every 4 --schedule.name wsd --schedule.warmup 0.25 --growth.batch-sizes 2"
    more += " --growth.until 6 --growth.min-length 4 --growth.length-multiple 4 --growth.length-steps 9 --growth.sqrt-lr"
    more += " --recipe.merge-last 2"
    more += " --recipe.merge-every 4 --recipe.ema 0.5 --recipe.skip-steps 3 4 --recipe.freeze embed *.w_q --recipe.clip-value 1"
    more += " --recipe.accumulate 2 --recipe.noise-scale 0.9 --recipe.normalize --optim.first-step-bias"
    train(*flags, more, "--run.folder", folder / "base")
    return flags, more, folder


def state_of(folder, step):
    return load(step_path(folder / "checkpoints", step))[0]


def test_a_run_with_everything(base):
    """What it reports, what it keeps, and what stays frozen; and going on in the middle changes no bit."""
    flags, more, folder = base
    lines = read_metrics(folder / "base" / "metrics.jsonl")
    assert [line["tokens"] for line in lines] == [32 * min(i, 6) + 64 * max(0, i - 6) for i in range(1, 13)]
    assert [line["step"] for line in lines if line["skipped"]] == [3, 4]
    assert all(line["noise_scale"] > 0 for line in lines)
    assert lines[6]["lr"] == pytest.approx(0.006 * 2**0.5)
    first, last = (state_of(folder / "base", step) for step in (4, 12))
    frozen = {"embed", "blocks.0.attention.w_q"}
    for path, p in tree.items(last["params"]):
        assert torch.equal(p, tree.at(first["params"], path)) == (path in frozen), path
    for slot in ("ema", "merge", "adamw_m"):
        assert set(tree.flatten(last["slots"][slot])) == set(tree.flatten(last["params"])) - frozen
    assert not torch.equal(last["slots"]["merge"]["head"]["w_out"], last["params"]["head"]["w_out"])
    for step in (8, 12):  # as if it was killed after step 4
        (folder / "base" / "checkpoints" / f"step{step}").rename(folder / f"moved{step}")
    train(*flags, more, "--run.folder", folder / "base")
    for path, value in tree.items(state_of(folder / "base", 12)):
        assert torch.equal(value, tree.at(last, path)), path


def test_lora_from_the_command_line(base, tmp_path):
    """Adapters on a trained model; taken alone, merged into it, sampled with."""
    flags, _, folder = base
    run = tmp_path / "lora"
    more = "--run.steps 6 --schedule.name constant --schedule.warmup 0 --lora.rank 2 --recipe.ema 0.5"
    train(*flags, more, "--run.folder", run, "--run.start-from", folder / "base")
    state, before = state_of(run, 6), state_of(folder / "base", 12)
    for path, p in tree.items(before["params"]):
        assert torch.equal(tree.at(state["params"], path), p)
    assert set(state["slots"]["adamw_m"]) == {"lora"}
    assert state["params"]["lora"]["blocks"]["0"]["attention"]["w_q"]["b"].abs().max() > 0
    for weights in ("params", "ema"):
        out = tmp_path / f"merged-{weights}"
        soup(run, "-o", out, "--lora", "merge", "--weights", weights)
        adapters = state["params"]["lora"] if weights == "params" else state["slots"]["ema"]["lora"]
        assert_close(state_of(out, 6)["params"], merge_lora({**before["params"], "lora": adapters}, 16.0))
    soup(run, "-o", tmp_path / "alone", "--lora", "alone")
    assert set(state_of(tmp_path / "alone", 6)["params"]) == {"lora"}
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):  # the weights are found, a text needs a tokenizer
        load_model(tmp_path / "merged-ema")


def test_soup_from_the_command_line(base, tmp_path):
    """The mean of a run's last checkpoints; a run may start from it."""
    flags, _, folder = base
    out = tmp_path / "mean"
    soup(folder / "base", "--last", 3, "-o", out)
    means = [state_of(folder / "base", step)["params"] for step in (4, 8, 12)]
    assert_close(state_of(out, 12)["params"], tree.map(lambda *xs: sum(xs) / 3, *means))
    more = "--run.steps 2 --schedule.name constant --schedule.warmup 0 --run.start-with params"
    train(*flags, more, "--run.folder", tmp_path / "next", "--run.start-from", out)
    assert read_metrics(tmp_path / "next" / "metrics.jsonl")[-1]["step"] == 2


def test_range_test_from_the_command_line(base, tmp_path):
    flags, _, _ = base
    run = tmp_path / "range"
    more = "--run.steps 20 --schedule.name range-test --schedule.lowest 1e-5 --recipe.skip-sigma 0"
    assert f"olmo-fn plot range-test {run}" in train(*flags, more, "--optim.lr", 1, "--run.folder", run)
    rates = [line["lr"] for line in read_metrics(run / "metrics.jsonl")]
    assert rates == pytest.approx([1e-5 * 1e5 ** (i / 20) for i in range(1, 21)])
    assert cli.main(["plot", "range-test", str(run)]) == 0
    assert (run / "range-test.png").exists()


def test_specs_of_a_lora_run_are_the_models_and_adapters():
    cfg = config(lora=Lora(rank=2, patterns=("*.w_q",)))
    assert set(parameters(cfg)) == {"embed", "blocks", "head", "lora"}
