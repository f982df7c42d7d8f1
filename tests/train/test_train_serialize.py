"""Configs as YAML: exact round trips, and wrong files told by the name of the field."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import MISSING, fields, replace
from typing import Any

import pytest
from helpers import examples
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn.data.settings import Data
from olmo_fn.models.config import Attention, Block, Model, PreNorm
from olmo_fn.models.families import OLMO2, OLMO3
from olmo_fn.train.choices import base_of
from olmo_fn.train.config import CHOICES, Config, Run
from olmo_fn.train.observers import Observe
from olmo_fn.train.optimizers import AdamW
from olmo_fn.train.serialize import from_yaml, to_yaml

MODEL = "model: {d_model: 8, n_layers: 1, block: {mixer: {n_heads: 1}, feed_forward: {hidden_size: 4}}}\n"


def settings_of(cls: type) -> st.SearchStrategy[Any]:
    """Any ``cls`` in which fields that hold a choice hold any class that may be chosen; its name is what chooses it."""
    made: dict[str, st.SearchStrategy[Any]] = {"name": st.just(cls.name)} if base_of(cls, CHOICES) else {}  # type: ignore[attr-defined]
    for field in fields(cls):
        kind = type(field.default_factory() if field.default_factory is not MISSING else field.default)
        if base := base_of(kind, CHOICES):
            made[field.name] = st.deferred(lambda base=base: st.from_type(base))
    return st.builds(cls, **made)


st.register_type_strategy(float, st.floats(allow_nan=False))
for base, classes in CHOICES.items():
    st.register_type_strategy(base, st.one_of(*map(settings_of, classes.values())))
for cls in (Model, Data, Observe):
    st.register_type_strategy(cls, settings_of(cls))


@examples(60)
@given(st.from_type(Config))
def test_a_config_comes_back_as_it_was(config: Config) -> None:
    assert from_yaml(to_yaml(config), Config, CHOICES) == config


@examples(30)
@given(st.text())
def test_any_text_survives(text: str) -> None:
    config = Config(OLMO2["olmo2-1m"], run=Run(folder=text, sample=text))
    assert from_yaml(to_yaml(config), Config, CHOICES).run == config.run


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "~",
        "=",
        "<<",
        "1e5",
        "1_000",
        "0x1f",
        "yes",
        "2024-01-01",
        "a: b",
        "- a",
        "\x85",
        "&a",
        "\U0001f600 \ufeff",
    ],
)
def test_texts_that_yaml_could_take_for_something_else(text: str) -> None:
    run = Run(folder=text)
    assert from_yaml(to_yaml(run), Run) == run


@pytest.mark.parametrize("model", [*OLMO2.values(), *OLMO3.values()])
def test_presets(model: Model) -> None:
    assert from_yaml(to_yaml(Config(model)), Config, CHOICES) == Config(model)


def test_a_model_of_several_kinds_of_blocks() -> None:
    config = Config(replace(OLMO2["olmo2-1m"], pattern=(Block(), PreNorm(mixer=Attention(n_heads=2)))))
    assert from_yaml(to_yaml(config), Config, CHOICES) == config


def test_a_file_may_say_little_and_numbers_may_be_written_as_usual() -> None:
    config = from_yaml(MODEL + "optim: {lr: 4e-4, eps: 0, betas: [0, 1]}\nrun:\n  steps: 3\n", Config, CHOICES)
    assert config.optim == AdamW(lr=4e-4, eps=0.0, betas=(0.0, 1.0))
    assert all(type(value) is float for value in (config.optim.lr, config.optim.eps, *config.optim.betas))
    assert config.run == Run(steps=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "model is missing, and has no default"),
        ("model: {d_model: 8}", "model.n_layers is missing, and has no default; it must be a whole number"),
        ("model: 3", "model is '3', a whole number; it must be the fields of Model, each as name: value"),
        ("[1]", "the whole is a list of 1; it must be the fields of Config"),
        (MODEL + "rum: {}", "rum: there is no such field, did you mean run? There are model, data,"),
        (MODEL + "run: {stepz: 3}", "run.stepz: there is no such field, did you mean run.steps?"),
        (MODEL + "run: {steps: 1.5}", "run.steps is '1.5', a number; it must be a whole number"),
        (MODEL + "run: {steps: true}", "run.steps is 'True', true or false; it must be a whole number"),
        (MODEL + "run: {resume: 1}", "run.resume is '1', a whole number; it must be true or false"),
        (MODEL + "run: {folder: 2024-01-01}", "run.folder is '2024-01-01', a date; it must be a text"),
        (MODEL + "run: {folder: null}", "run.folder is null; it must be a text"),
        (MODEL + "optim: {lr: fast}", "optim.lr is 'fast', a text; it must be a number"),
        (MODEL + "optim: {betas: [1]}", "optim.betas is a list of 1; it must be a list [a number, a number]"),
        (MODEL + "optim: {name: soap, betas: x}", "optim.betas is 'x', a text; it must be a list [a number, a number] or null"),
        (MODEL + "optim: {name: lion, rank: 1}", "optim.rank: there is no such field. There are name, lr, weight_decay"),
        (MODEL + "optim: muon", "optim is 'muon', a text; it must be the fields of OptimizerSettings, each as name: value"),
        (MODEL + "optim: {name: [muon]}", "optim.name is a list of 1; it must be one of adamw, lion, sgd"),
        (MODEL + "data: {paths: &a [x], tokenizer: *a}", "not YAML, line 2: *a is an alias; write the value instead"),
        ("[" * 5000, "nested too deeply"),
        ("#" * 2_000_000, "2,000,000 characters"),
        (MODEL + "data: {paths: a}", "data.paths is 'a', a text; it must be a list [...] of a text each"),
        (MODEL + "data: {paths: [a, 3]}", "data.paths[1] is '3', a whole number; it must be a text"),
        (MODEL + "schedule: {name: step}", "it must be one of cosine, linear, wsd, constant"),
        (
            MODEL.replace("n_heads: 1", "n_heads: 1, head_dim: x"),
            "model.block.mixer.head_dim is 'x', a text; it must be a whole number or null",
        ),
        (
            MODEL.replace("n_layers: 1", "head_dim: 4"),
            "model.head_dim: there is no such field, did you mean model.block.mixer.",
        ),
        (
            MODEL.replace("n_layers: 1", "mixer: {}"),
            "model.mixer: there is no such field, did you mean model.block.mixer? There",
        ),
        (MODEL + "steps: 3", "steps: there is no such field, did you mean run.steps? There are model, data,"),
        (MODEL.replace("n_layers: 1", "n_layers: 1, pattern: [{mixer: 3}]"), "model.pattern[0].mixer is '3', a whole number"),
        (MODEL + "run: {steps: 3", "not YAML, line 2: expected ',' or '}'"),
        (MODEL + "run: {steps: 3}\nrun: {steps: 4}", "not YAML, line 3: run is given twice"),
        (MODEL + "run: {steps: 3, steps: 4}", "not YAML, line 2: steps is given twice"),
        ("? [a]\n: 3", "not YAML, line 1: found unhashable key"),
        ("a: \x00", "not YAML: unacceptable character"),
        ("a: 2024-99-99", "not YAML: month must be in 1..12"),
    ],
)
def test_wrong_files(text: str, message: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        from_yaml(text, Config, CHOICES)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_torch_is_not_imported() -> None:
    code = "import sys, olmo_fn.train.folder, olmo_fn.presets; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
