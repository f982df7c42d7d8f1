"""The choice of a class by its name, on the command line and in a config.yaml; and a user's own file that adds some."""

import sys
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
import torch
import tyro
import yaml
from programs import python

from olmo_fn import tree
from olmo_fn.cli import main as cli
from olmo_fn.cli import training
from olmo_fn.fields import AT_LEAST_ONE, SIGNED, check_values, values
from olmo_fn.models.config import dense
from olmo_fn.models.families import OLMO2
from olmo_fn.presets import CONFIGS
from olmo_fn.spec import init
from olmo_fn.train.choices import choosable, choose, named, with_files
from olmo_fn.train.config import CHOICES, Config, Recipe, Run
from olmo_fn.train.folder import check_folder, read_config, write_config
from olmo_fn.train.loss import CrossEntropy
from olmo_fn.train.observers.jsonl import read_metrics
from olmo_fn.train.optimizers import SGD, AdamW, Lion, Muon, OptimizerSettings
from olmo_fn.train.recipe import parameters, recipe
from olmo_fn.train.schedules import WSD, Cosine, Linear, RangeTest
from olmo_fn.train.serialize import from_yaml, to_yaml

TINY = CONFIGS["olmo2-tiny"]
OLD = Path(__file__).parent / "config_0.1"

PARTS = '''
from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

from tyro.conf import Suppress

from olmo_fn.fields import DECAY
from olmo_fn.train.schedules import Warmed
from olmo_fn.train.optimizers import OptimizerSettings
from olmo_fn.presets import CONFIGS as PRESETS
from olmo_fn.train.loss import LossSettings


@dataclass(frozen=True, kw_only=True)
class AdaBelief(OptimizerSettings):
    """AdaBelief (Zhuang et al. 2020), without bias correction."""

    name: Suppress[Literal["adabelief"]] = "adabelief"
    belief: Annotated[float, DECAY] = 0.99
    """Decay of the second moment around the first."""

    def build(self, lr, parameters, dtype):
        import torch

        from olmo_fn.optim.base import Rule, optimizer

        def init(path, p):
            return {"belief_m": torch.zeros_like(p), "belief_s": torch.zeros_like(p)}

        def update(p, g, slots, s):
            m = 0.9 * slots["belief_m"] + 0.1 * g
            v = self.belief * slots["belief_s"] + (1 - self.belief) * (g - m).square()
            return s["lr"] * m / (v.sqrt() + 1e-8), {"belief_m": m, "belief_s": v}

        return optimizer("adabelief", Rule(init, update), lr, self.decay)


@dataclass(frozen=True, kw_only=True)
class Stairs(Warmed):
    """The rate halves every ``steps``."""

    name: Suppress[Literal["stairs"]] = "stairs"
    steps: int = 2
    """Steps between."""

    def shape(self, lr, total):
        return lambda step: lr * 0.5 ** (step.double() // self.steps)


@dataclass(frozen=True, kw_only=True)
class Distill(LossSettings):
    """Squared distance to the logits of a frozen teacher, of random weights here."""

    name: Suppress[Literal["distill"]] = "distill"
    seed: int = 0
    """Of the teacher."""

    def build(self, model):
        from olmo_fn.models import transformer
        from olmo_fn.spec import init

        teacher = init(transformer.specs(model), self.seed)

        def loss(params, batch):
            apart = transformer.logits(model, params, batch) - transformer.logits(model, teacher, batch)
            return apart.square().sum(), {}

        return loss


CONFIGS = {"olmo2-nano": replace(PRESETS["olmo2-tiny"], optim=AdaBelief(lr=2e-3, belief=0.9))}
'''


@pytest.fixture
def parts(tmp_path):
    path = tmp_path / "my_parts.py"
    path.write_text(PARTS)
    return path


def parse(*words):
    return training.parse([str(word) for word in words], CONFIGS, "train.py")


# --- the package's own ------------------------------------------------------------------------------------------------


def test_a_flag_puts_another_class_there_before_the_rest_is_parsed():
    cfg = parse(
        "olmo2-tiny", "--optim.betas", "0.8", "0.9", "--optim.name", "adamw", "--schedule.name=wsd", "--schedule.decay", "5"
    )
    assert cfg.optim == AdamW(lr=TINY.optim.lr, betas=(0.8, 0.9))
    assert cfg.schedule == WSD(warmup=30, final=0.02, decay=5)  # warm-up and end are the preset's


def test_what_the_preset_says_stays_and_what_its_class_has_by_default_does_not():
    cfg = replace(TINY, optim=AdamW(lr=1.0, no_decay=("embed",)))
    chosen, rest = choose(cfg, ["--optim.name", "lion", "--run.steps", "3"], CHOICES)
    assert chosen.optim == Lion(lr=1.0, no_decay=("embed",))
    assert chosen.optim.betas == (0.9, 0.99)
    assert rest == ["--run.steps", "3"]
    assert choose(cfg, ["--optim.name", "adamw"], CHOICES)[0] == cfg
    assert choose(TINY, ["--schedule.name", "range-test"], CHOICES)[0].schedule == RangeTest()


def test_every_choice_has_a_flag_and_every_setting_a_default_and_a_help():
    model = "model.block", "model.mixer", "model.feed-forward", "model.norm", "model.rope-scaling"
    held = *model, "data.instances", "loss", "optim", "schedule", "observe.own"
    assert choosable(TINY, CHOICES).keys() == {f"--{name}.name" for name in held}
    assert len(held) == len(CHOICES)
    for classes in CHOICES.values():
        for name, cls in classes.items():
            assert cls().name == name
            assert cls.__doc__
            assert all(field.default is not MISSING or field.default_factory is not MISSING for field in fields(cls))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optim.name", "muun"), "--optim.name 'muun' is unknown, did you mean muon? There are adamw, lion"),
        (("--schedule.name=",), "--schedule.name '' is unknown; There are cosine, linear"),
        (("--loss.name",), "--loss.name '' is unknown; There are cross-entropy"),
        (("--use",), "--use needs a value after it"),
        (("--use", "gone.py"), "--use gone.py: there is no such file"),
        (("--use", "no_such_module"), "--use no_such_module: No module named 'no_such_module'; give a file that ends in .py"),
    ],
)
def test_what_is_no_choice_is_told_in_one_line(words, message, capsys):
    assert cli.main(["train", "olmo2-tiny", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1


def test_a_flag_of_another_class_is_refused():
    with pytest.raises(ValueError, match=r"^--optim.rank: dion has it, choose that with --optim.name dion$"):
        parse("olmo2-tiny", "--optim.name", "lion", "--optim.rank", "0.5")


def test_help_is_of_what_is_chosen_and_names_what_may_be(capsys, parts):
    with pytest.raises(SystemExit):
        parse("--use", parts, "olmo2-tiny", "--optim.name", "muon", "--help")
    text = capsys.readouterr().out
    assert "--optim.nesterov" in text
    assert "--optim.first-step-bias" not in text
    for classes in with_files(CHOICES, [str(parts)])[0].values():
        for name in classes:
            assert name in text


def test_the_z_loss_is_a_flag_of_the_recipe_as_well():
    for flag in ("--recipe.z-loss", "--loss.z-loss"):
        assert parse("olmo2-tiny", flag, "0.5").loss == CrossEntropy(z_loss=0.5)


# --- a user's own file ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.random.default_rng(0).integers(1, 64, 20_000, dtype=np.uint8).tofile(path)
    return path


def small(tokens, folder):
    flags = {
        "data.paths": tokens, "data.dtype": "uint8", "data.heldout-fraction": 0.05, "model.d-model": 16, "model.n-layers": 1,
        "model.n-heads": 2, "model.hidden-size": 32, "model.vocab-size": 64, "recipe.batch-size": 4,
        "recipe.sequence-length": 16, "run.threads": 1, "run.steps": 4, "run.folder": folder, "schedule.warmup": 0,
        "recipe.dtype": "float32",
    }  # fmt: skip
    return [*(str(word) for name, value in flags.items() for word in (f"--{name}", value)), "--recipe.no-compile"]


def test_a_run_with_an_optimizer_a_schedule_a_loss_and_a_preset_of_ones_own(tmp_path, tokens, parts):
    """In a process of its own, which knows the file by its path alone; then resumed by its config.yaml alone."""
    words = f"--use {parts} --schedule.name stairs --schedule.steps 2 --loss.name distill --loss.seed 3 --recipe.engine func"
    found = python("train.py", "olmo2-nano", *small(tokens, tmp_path / "run"), *words.split())
    assert found.returncode == 0, found.stderr
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["lr"] for line in lines] == pytest.approx([2e-3, 1e-3, 1e-3, 5e-4])
    saved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (saved["optim"]["name"], saved["optim"]["belief"], saved["loss"]["seed"]) == ("adabelief", 0.9, 3)
    assert saved["use"] == [str(parts)]
    again = python("train.py", tmp_path / "run" / "config.yaml", "--run.folder", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert [line["loss"] for line in read_metrics(tmp_path / "again" / "metrics.jsonl")] == [line["loss"] for line in lines]
    mean = python("-m", "olmo_fn", "average", tmp_path / "run", "-o", tmp_path / "mean")
    assert mean.returncode == 0, mean.stderr
    assert read_config(tmp_path / "mean").optim == read_config(tmp_path / "run").optim


def test_a_config_finds_its_file_beside_it_once_both_have_moved(tmp_path, parts):
    cfg = parse("--use", parts, "olmo2-nano", "--run.folder", tmp_path / "run")
    write_config(cfg, tmp_path / "run")
    assert read_config(tmp_path / "run") == cfg
    parts.rename(tmp_path / "run" / parts.name)
    moved = read_config(tmp_path / "run")
    assert moved.use == (str(tmp_path / "run" / parts.name),)
    assert moved.optim.belief == cfg.optim.belief
    check_folder(moved)  # where the file lies changes no number
    (tmp_path / "run" / parts.name).unlink()
    with pytest.raises(ValueError, match=r"config\.yaml: --use .*my_parts\.py: there is no such file, nor .*run/my_parts\.py"):
        read_config(tmp_path / "run")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('["adabelief"]] = "adabelief"', '["muon"]] = "muon"', "AdaBelief has the name 'muon', which is taken; choose another"),
        ("    seed: int = 0\n", "    seed: int\n", "seed of Distill has no default; every setting has one"),
    ],
)
def test_what_a_file_may_not_say(parts, old, new, message):
    parts.write_text(parts.read_text().replace(old, new))
    with pytest.raises(ValueError, match=message):
        with_files(CHOICES, [str(parts)])


def test_the_package_is_not_changed_by_a_file(parts):
    """Choices are values: what one file adds, nobody else sees."""
    before = {base: dict(classes) for base, classes in CHOICES.items()}
    more, presets = with_files(CHOICES, [str(parts)])
    assert "adabelief" in more[OptimizerSettings]
    assert list(presets) == ["olmo2-nano"]
    assert {base: dict(classes) for base, classes in CHOICES.items()} == before
    assert "olmo2-nano" not in CONFIGS


def test_a_module_that_python_finds_will_do(tmp_path, monkeypatch):
    (tmp_path / "own_parts_of_a_test.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    assert parse("--use", "own_parts_of_a_test", "olmo2-tiny", "--optim.name", "adabelief").use == ("own_parts_of_a_test",)
    del sys.modules["own_parts_of_a_test"]


def test_numbers_of_own_settings_are_checked_by_their_marks(parts):
    with pytest.raises(ValueError, match=r"--optim\.belief is 1\.0; it must be at least 0 and below 1"):
        parse("--use", parts, "olmo2-nano", "--optim.belief", "1").check()


# --- config.yaml of version 0.1 ---------------------------------------------------------------------------------------


def test_a_file_by_hand_without_a_folder_runs_in_one_of_its_name(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "model: {d_model: 8, n_layers: 1, n_heads: 1, hidden_size: 4}\noptim: {name: lion, lr: 4e-4}\n"
    )
    cfg = parse(tmp_path / "mine.yaml", "--optim.weight-decay", "0.5")
    assert (cfg.run.folder, cfg.optim) == ("runs/mine", Lion(lr=4e-4, weight_decay=0.5))
    assert cfg.model == dense(8, 1, n_heads=1, hidden_size=4)


def test_files_of_version_0_1_are_read():
    """Written by that version's own code."""
    old = {name: read_config(OLD / f"{name}.yaml") for name in ("adamw", "muon", "sgd")}
    tiny = replace(TINY, optim=AdamW(lr=3e-2), recipe=replace(TINY.recipe, sequence_length=256))  # the preset was this
    tiny = replace(tiny, data=replace(tiny.data, order="olmo-core"))
    assert old["adamw"] == replace(tiny, run=replace(TINY.run, folder="runs/olmo2-tiny"))
    assert old["muon"].optim == Muon(lr=2e-3, adamw_lr=1e-3, betas=(0.8, 0.9), nesterov=False, moments="bfloat16")
    assert (old["muon"].schedule.lengths, old["muon"].schedule.warmup) == ((100, 200), 0.05)
    assert (old["muon"].loss, old["muon"].recipe.ema) == (CrossEntropy(z_loss=0.0), 0.9)
    assert old["sgd"].optim == SGD(lr=0.3, momentum=0.9, nesterov=True, weight_decay=0.0)
    assert old["sgd"].schedule == RangeTest(lowest=1e-5)
    assert old["sgd"].model == CONFIGS["olmo2-32b"].model
    for cfg in old.values():
        cfg.check()


def test_wrong_fields_of_such_a_file_are_still_told(tmp_path):
    (tmp_path / "config.yaml").write_text((OLD / "muon.yaml").read_text().replace("  ema: 0.9", "  emu: 0.9"))
    with pytest.raises(ValueError, match=r"recipe\.emu: there is no such field, did you mean recipe\.ema\?"):
        read_config(tmp_path)


def test_differences_are_told_by_flag(tmp_path):
    cfg = replace(TINY, run=replace(TINY.run, folder=str(tmp_path / "run")))
    write_config(cfg, tmp_path / "run")
    check_folder(replace(cfg, recipe=replace(cfg.recipe, accumulate=2), nproc=2, gpus=3))
    other = replace(cfg, optim=AdamW(lr=cfg.optim.lr), schedule=replace(cfg.schedule, final=0.5))
    with pytest.raises(ValueError, match=r"\(--optim\.name was muon, is adamw, --schedule\.final was 0\.02, is 0\.5\)"):
        check_folder(other)


def test_a_settings_tree_is_a_recipe():
    """What is chosen is what trains: AdamW's slots, or Muon's beside AdamW's."""
    model = replace(OLMO2["olmo2-1m"], vocab_size=64, n_layers=1)
    cfg = Config(model, schedule=Linear(warmup=0), recipe=Recipe(4, 8, compile=False), run=Run(steps=5))
    params = init(parameters(cfg), 0)
    for optim, slots in ((AdamW(), {"adamw_m"}), (Muon(), {"adamw_m", "muon_momentum"})):
        state = recipe(replace(cfg, optim=optim)).init(params)
        assert slots <= state.slots.keys()
        assert torch.equal(tree.at(state.params, "embed"), params["embed"])
    assert recipe(replace(cfg, schedule=Cosine(warmup=1)))


# --- choices in choices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mixer:
    name: tyro.conf.Suppress[str] = ""


@dataclass(frozen=True)
class Attend(Mixer):
    name: tyro.conf.Suppress[str] = "attend"
    heads: Annotated[int, AT_LEAST_ONE] = 2


@dataclass(frozen=True)
class Recur(Mixer):
    name: tyro.conf.Suppress[str] = "recur"
    gates: Annotated[float, SIGNED] = -1.0


@dataclass(frozen=True)
class FeedForward(Mixer):
    name: tyro.conf.Suppress[str] = ""


@dataclass(frozen=True)
class Gated(FeedForward):
    name: tyro.conf.Suppress[str] = "gated"
    width: int = 8


@dataclass(frozen=True)
class Block:
    name: tyro.conf.Suppress[str] = "post"
    mixer: Annotated[Any, tyro.conf.arg(name="")] = Attend()
    feed_forward: Annotated[Any, tyro.conf.arg(name="")] = Gated()


@dataclass(frozen=True)
class Pre(Block):
    name: tyro.conf.Suppress[str] = "pre"
    scale: float = 1.0


@dataclass(frozen=True)
class Net:
    depth: int = 1
    block: Annotated[Any, tyro.conf.arg(name="")] = field(default_factory=Block)
    pattern: tyro.conf.Suppress[tuple[Block, ...]] = ()


NESTED = {Mixer: named(Attend, Recur), FeedForward: named(Gated), Block: named(Block, Pre)}


def test_choices_in_choices_whose_fields_are_flags_without_their_names():
    """The shape of a model: a block, its mixer, its feed-forward network."""
    flags = ["--mixer.name", "recur", "--block.name", "pre", "--gates", "-3", "--depth", "2", "--width", "5"]
    cfg, rest = choose(Net(), flags, NESTED)
    assert tyro.cli(Net, args=rest, default=cfg) == Net(2, Pre(mixer=Recur(gates=-3.0), feed_forward=Gated(width=5)))
    assert [field.flag for field in values(cfg)][1:] == [
        *("--block.name", "--mixer.name", "--gates", "--feed-forward.name", "--width", "--scale", "--pattern")
    ]


def test_they_come_back_from_yaml():
    cfg = Net(2, Pre(mixer=Recur(gates=-3.0)), (Block(), Pre(feed_forward=Gated(width=9))))
    assert from_yaml(to_yaml(cfg), Net, NESTED) == cfg
    assert from_yaml("block: {feed_forward: {width: 3}}", Net, NESTED) == Net(block=Block(feed_forward=Gated(width=3)))
    with pytest.raises(ValueError, match=r"block\.mixer\.name is 'gated', a text; it must be one of attend, recur"):
        from_yaml("block: {mixer: {name: gated}}", Net, NESTED)
    with pytest.raises(ValueError, match=r"pattern\[0\]\.mixer\.head: there is no such field, did you mean pattern\[0\]"):
        from_yaml("pattern: [{mixer: {head: 1}}]", Net, NESTED)
    with pytest.raises(ValueError, match="--heads is 0; it must be at least 1"):
        check_values(replace(cfg, pattern=(Block(mixer=Attend(heads=0)),)))
