"""The law of `capture`, that it is invisible, on graphs that are recorded on a CPU; each mutant breaks it."""

from __future__ import annotations

from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import batch_of, caught, same_bits

from olmo_fn import tree
from olmo_fn.core import capture as module
from olmo_fn.core.capture import WARM, Recorded, capture
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw, muon, partition, schedule_free_adamw, sgd, soap, warmup_cosine
from olmo_fn.spec import init
from olmo_fn.testing.recording import RecordedGraph, recorded_graphs
from olmo_fn.transforms import gradient_noise, merge, skip_steps

MODEL = dense(8, 2, 2, 12, vocab_size=32)
SPECS = transformer.specs(MODEL)
on_cpu = capture(recorded_graphs, "cpu")


@pytest.fixture(autouse=True)
def rows_as_on_a_gpu(monkeypatch):
    """On a CPU the embedding's gradient finds out which rows there are, on the host; a GPU has an operation for it."""

    def add_rows(cotangent, rows, inside, V):
        return torch.ops.aten.embedding_dense_backward(cotangent, rows, V, -1, False)

    monkeypatch.setattr("olmo_fn.nn.embedding.add_rows", add_rows)


def optimizers():
    yield "adamw", [adamw(warmup_cosine(1e-2, 3, 20)), skip_spikes(6, 8), ema(0.9), merge(2, [5, 8]), skip_steps([(6, 6)])]
    yield "sgd", [sgd(1e-2, momentum=0.9)]
    yield "schedule-free", [schedule_free_adamw(1e-2)]
    yield "muon", [partition({"matrix": muon(1e-2), "default": adamw(1e-3)}, SPECS)]
    yield "noise", [gradient_noise(0.01), clip(1.0), adamw(1e-2)]


def step_of(*transforms, engine="tape"):
    return pipe(transformer.loss(MODEL, z_loss=1e-4), grad(engine), accumulate(2), *transforms, donate())


def batches(n):
    """With a shape that changes and comes back."""
    return [batch_of(32, rows=4, length=(8, 8, 8, 8, 12, 8, 12, 12, 12, 8)[i % 10], seed=i) for i in range(n)]


def law_invisible(step, transform=on_cpu, n=10):
    """State and metrics of every step are those without it, and stay what they are."""
    captured = transform(step)
    plain, state = (s.init(init(SPECS, 0)) for s in (step, captured))
    seen = []
    for batch in batches(n):
        plain, expected = step(plain, batch)
        state, metrics = captured(state, batch)
        seen.append((metrics, {name: x.clone() for name, x in expected.items()}))
        assert same_bits(state._asdict(), plain._asdict())
    for metrics, expected in seen:
        assert same_bits(metrics, expected)
    return captured


@pytest.mark.parametrize("transforms", [pytest.param(t, id=name) for name, t in optimizers()])
def test_invisible(transforms):
    captured = law_invisible(step_of(*transforms))
    assert len(captured.memory.recorded) == 2


def test_invisible_to_engine_func():
    law_invisible(step_of(adamw(1e-2), engine="func"), n=5)


def stale(recorded):
    recorded.graph.replay()
    return module.unpack(recorded.metrics.clone(), recorded.form)


@pytest.mark.parametrize("name", ["batch", "settle", "metrics", "undone"])
def test_the_law_catches(name):
    def overwritten(self, batch):
        for key, x in batch.items():
            self.batch[key].copy_(x)
        self.graph.replay()
        return module.unpack(self.metrics, self.form)

    mutants = {
        "batch": patch.object(Recorded, "run", lambda self, batch: stale(self)),
        "settle": patch.object(module.Captured, "settle", lambda self, old, new: None),
        "metrics": patch.object(Recorded, "run", overwritten),
        "undone": patch.object(RecordedGraph, "replay", lambda self: None),
    }
    with mutants[name]:
        caught(law_invisible, step_of(adamw(warmup_cosine(1e-2, 3, 20))))


def test_a_step_is_replayed_without_python():
    """Neither the loss nor the optimizer is called again, and everything stays where it is."""
    calls = []
    step = step_of(adamw(1e-2), skip_spikes())
    plain = step.control
    captured = on_cpu(replace(step, control=lambda *args: calls.append(1) or plain(*args)))
    state = captured.init(init(SPECS, 0))
    places = None
    for i in range(WARM + 4):
        state, metrics = captured(state, batch_of(32, seed=i))
        now = [x.data_ptr() for _, x in tree.items(state._asdict())]
        assert places in (None, now)
        places = now
    assert len(calls) == WARM + 1
    assert int(state.step) == WARM + 4
    assert metrics["loss"].isfinite()


def test_another_state_is_recorded_anew():
    """One from a checkpoint, or a tensor that somebody has put into the tree."""
    captured = on_cpu(step_of(adamw(1e-2)))
    plain = step_of(adamw(1e-2))
    for other in ("state", "leaf"):
        state, expected = (step.init(init(SPECS, 0)) for step in (captured, plain))
        for i in range(6):
            if other == "leaf" and i == 4:
                state.params["embed"] = state.params["embed"] * 2
                expected.params["embed"] = expected.params["embed"] * 2
            state, _ = captured(state, batch_of(32, seed=i))
            expected, _ = plain(expected, batch_of(32, seed=i))
        assert same_bits(state.params, expected.params)


def test_a_state_is_spent():
    captured = on_cpu(step_of(sgd(1e-2)))
    state = captured.init(init(SPECS, 0))
    for i in range(WARM + 2):
        before = state
        state, _ = captured(before, batch_of(32, seed=i))
        with pytest.raises(ValueError, match="this state is spent"):
            captured(before, batch_of(32, seed=i))


def test_what_cannot_be_captured_is_refused():
    loss = transformer.loss(MODEL)
    with pytest.raises(ValueError, match=r"needs donate\(\) before it in the pipe"):
        pipe(loss, grad(), sgd(1e-2), capture())
    with pytest.raises(ValueError, match="would record a recorded step; leave out one of them"):
        pipe(loss, grad(), sgd(1e-2), donate(), capture(), capture())
    step = pipe(loss, grad(), sgd(1e-2), donate(), capture())
    with pytest.raises(ValueError, match="a graph for cuda, and this state is on cpu"):
        step(step.init(init(SPECS, 0)), batch_of(32))
    layout = replace(step.execution.layout, sweep=object())
    with pytest.raises(ValueError, match=r"cannot record a pipeline.*--mesh\.pp"):
        capture()(replace(step, execution=replace(step.execution, layout=layout)))
    reads = step_of(partition({"matrix": soap(1e-2, every=2), "default": adamw(1e-3)}, SPECS))
    with pytest.raises(ValueError, match=r"cannot record this step \(aten::_local_scalar_dense waits.*--recipe\.capture"):
        law_invisible(reads)
