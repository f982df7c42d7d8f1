"""Law 13: whatever reads a run (resume, replay, generate, average, evaluate) sees the same batches and the same model."""

import contextlib
import io
import shutil
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import examples, same_bits
from hypothesis import given
from hypothesis import strategies as st

from olmo_fn import average, tree
from olmo_fn.checkpoint import load, step_path
from olmo_fn.core.step import Step
from olmo_fn.data.settings import Data
from olmo_fn.data.sizes import constant_sizes
from olmo_fn.data.tokenizer import byte_level
from olmo_fn.generate.load import load_model
from olmo_fn.models.config import dense
from olmo_fn.replay import replay as module
from olmo_fn.spec import init
from olmo_fn.train import session as sessions
from olmo_fn.train.config import CHOICES, Config, Growth, Lora, Recipe, Run
from olmo_fn.train.loop import Result, train
from olmo_fn.train.optimizers import OptimizerSettings
from olmo_fn.train.schedules import Constant
from olmo_fn.train.session import Session, open_run
from olmo_fn.transforms.lora import merge_lora

STEPS, MIDDLE, LENGTH, ROWS = 6, 4, 16, 4
GROWTH = Growth(batch_sizes=(2,), until=(3,), min_length=4, length_multiple=4, length_steps=5)


class Trained(NamedTuple):
    """A run that has ended, with a checkpoint in its middle and one at its end."""

    cfg: Config
    result: Result
    folder: Path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Tokens, and a mask that leaves out some labels."""
    folder, chance = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    ids = np.where(chance.random(3_000) < 0.1, byte_level().eos_id, chance.integers(1, 250, 3_000))
    ids.astype(np.uint16).tofile(folder / "tokens.npy")
    (chance.random(3_000) < 0.7).tofile(folder / "mask.npy")
    byte_level().save(folder / "tokenizer.json")
    return folder


def config(data, growth=GROWTH, mask=False, documents=False, lora=0, optim="adamw", **recipe):
    masks = (str(data / "mask.npy"),) if mask else ()
    return Config(
        model=dense(8, 1, 2, 12, vocab_size=257, init_method="llama"),
        data=Data(
            paths=(str(data / "tokens.npy"),),
            dtype="uint16",
            tokenizer=str(data / "tokenizer.json"),
            label_mask_paths=masks,
            mask_documents=documents,
            cache_dir=str(data / "cache"),
        ),
        optim=CHOICES[OptimizerSettings][optim](lr=0.05),
        schedule=Constant(warmup=0),
        growth=growth,
        recipe=Recipe(ROWS, LENGTH, compile=False, dtype="float32", **recipe),
        lora=Lora(lora, patterns=("*.w_q", "*.feed_forward.w_*")),
        run=Run(steps=STEPS, checkpoint_every=MIDDLE, threads=1, sample="", device="cpu"),
    )


@st.composite
def configs(draw, data):
    """Whatever changes batches, the model, or where a gradient is taken."""
    return config(
        data,
        growth=draw(st.sampled_from([Growth(), GROWTH, replace(GROWTH, truncate=True), replace(GROWTH, min_length=0)])),
        mask=draw(st.booleans()),
        documents=draw(st.booleans()),
        lora=draw(st.sampled_from([0, 2])),
        optim=draw(st.sampled_from(["adamw", "schedule-free", "muon"])),
        accumulate=draw(st.sampled_from([1, 2])),
        clip_value=draw(st.sampled_from([0.0, 0.01])),
        ema=draw(st.sampled_from([0.0, 0.5])),
        merge_last=2,
        merge_every=2,
        freeze=draw(st.sampled_from([(), ("embed",), ("*.w_q", "*norm")])),
        normalize=draw(st.booleans()),
        skip_steps=draw(st.sampled_from([(), ((2, 2),)])),
    )


def trained(cfg, folder) -> Trained:
    cfg = replace(cfg, run=replace(cfg.run, folder=str(folder)))
    cfg.check()
    with contextlib.redirect_stdout(io.StringIO()):
        return Trained(cfg, train(cfg), folder)


# --- the law --------------------------------------------------------------------------------------------------------------


def law_replay(run: Trained):
    """A replayed step is the recorded one, bit for bit; its rows are what the files hold, and add up to its loss."""
    tokens = np.fromfile(run.cfg.data.paths[0], np.uint16)
    for step in (2, MIDDLE, STEPS):
        found = module.replay(run.folder, step)
        assert found.differences == ()
        assert found.start == (MIDDLE if step > MIDDLE else 0)
        count = sum(row.tokens for row in found.sequences)
        assert sum(row.loss * row.tokens for row in found.sequences) / count == pytest.approx(found.metrics["loss"], rel=1e-5)
        for row in found.sequences:
            assert np.array_equal(tokens[row.offset : row.offset + len(row.ids)], row.ids)


def law_resume(run: Trained, folder: Path):
    """A run that goes on from its middle ends in the same state, bit for bit, with the same loss on held-out text."""
    shutil.copytree(run.folder, folder)
    shutil.rmtree(step_path(folder / "checkpoints", STEPS))
    again = trained(run.cfg, folder).result
    assert again.heldout == run.result.heldout
    (ends, other) = (tree.flatten(load(step_path(where / "checkpoints", STEPS))[0]) for where in (run.folder, folder))
    assert ends.keys() == other.keys()
    assert all(torch.equal(value, other[path]) for path, value in ends.items())


def law_model(run: Trained, folder: Path):
    """generate and average load the model that training evaluated; of averages, what the checkpoint's slots say."""
    session, saved = open_run(run.folder), load(step_path(run.folder / "checkpoints", STEPS))[0]
    loaded, _ = load_model(run.folder)
    assert evaluated(run, loaded.params) == run.result.heldout
    for weights in ("params", *(slot for slot in ("ema", "merge") if slot in saved["slots"])):
        slot = {} if weights == "params" else tree.flatten(saved["slots"][weights])
        expected = tree.unflatten((path, slot.get(path, p)) for path, p in tree.items(saved["params"]))
        if run.cfg.lora.rank:
            expected = merge_lora(expected, run.cfg.lora.alpha)
        assert same_bits(load_model(run.folder, weights=weights)[0].params, expected)
        out = folder / weights
        lora = "merge" if run.cfg.lora.rank else "keep"
        average.soup(average.Soup((run.folder,), out, weights=weights, lora=lora))
        assert same_bits(load_model(out)[0].params, expected)
        assert session.evaluate(session.newest(run.folder).state, weights) == evaluated(run, expected)


def evaluated(run: Trained, params):
    """The loss of an ordinary model's parameters on the held-out tokens, as the session of a run without adapters finds it."""
    plain = open_run(replace(run.cfg, lora=Lora()))
    return plain.evaluate(plain.step.init(params))


def law_13(run: Trained, folder: Path):
    law_replay(run)
    law_resume(run, folder / "again")
    law_model(run, folder)


@given(st.data())
@examples(8)
def test_whatever_reads_a_run_sees_the_same(tmp_path_factory, data, draw):
    folder = tmp_path_factory.mktemp("law")
    law_13(trained(draw.draw(configs(data)), folder / "run"), folder)


# --- mutants --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Runs that have something to forget."""
    folder = tmp_path_factory.mktemp("runs")
    cfgs = {
        "growing": config(data),
        "lora": config(data, Growth(), lora=2, ema=0.5, merge_last=2, merge_every=2),
        "normalize": config(data, Growth(), normalize=True),
        "schedule-free": config(data, Growth(), optim="schedule-free"),
        "ema": config(data, Growth(), ema=0.5, merge_last=2, merge_every=2),
    }
    return {name: trained(cfg, folder / name) for name, cfg in cfgs.items()}


def at_the_parameters(session, state, batch):
    """Rows whose gradient is taken where the model is evaluated."""
    step = type("AtParams", (Step,), {"point": lambda self, state: state.params})
    step = step(**{f.name: getattr(session.step, f.name) for f in fields(Step)})
    session = replace(session)
    vars(session)["step"] = step
    return SEQUENCES(session, state, batch)


def of_the_base_model(session, state, batch):
    """Rows that know no adapters."""
    base = state._replace(params={name: p for name, p in state.params.items() if name != "lora"})
    return SEQUENCES(replace(session, cfg=replace(session.cfg, lora=Lora())), base, batch)


SEQUENCES, BATCH, SOURCE = module.sequences, Session.batch, Session.source.func
CONSTANT = property(lambda self: replace(SOURCE(self), train=replace(SOURCE(self).train, sizes=constant_sizes(ROWS, LENGTH))))
MUTANTS = {
    "replay ignores growth": ("growing", Session, "source", CONSTANT),
    "replay begins without normalisation": (
        "normalize",
        Session,
        "first_state",
        lambda self: self.step.init(init(self.specs, self.cfg.run.seed)),
    ),
    "rows at the parameters": ("schedule-free", module, "sequences", at_the_parameters),
    "rows of the base model": ("lora", module, "sequences", of_the_base_model),
    "a resumed run begins its data again": ("normalize", Session, "batch", lambda self, step: BATCH(self, step % MIDDLE)),
    "the adapters are forgotten": (
        "lora",
        Session,
        "merged",
        lambda self, params: {name: value for name, value in params.items() if name != "lora"},
    ),
    "the parameters pass for averages": (
        "ema",
        sessions,
        "weight_places",
        lambda weights, paths, names, holder: {path: f"params.{path}" for path in paths},
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_the_law_catches(name, runs, tmp_path, monkeypatch):
    which, where, what, mutant = MUTANTS[name]
    run = runs[which]
    monkeypatch.setattr(where, what, mutant)
    with pytest.raises(AssertionError):
        law_13(run, tmp_path)


SLOW = [pytest.param(which, marks=pytest.mark.slow) for which in ("normalize", "schedule-free", "ema")]


@pytest.mark.parametrize("which", ["growing", "lora", *SLOW])
def test_and_spares_the_right_one(which, runs, tmp_path):
    law_13(runs[which], tmp_path)
