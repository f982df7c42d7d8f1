"""A step on a GPU waits for nothing, whatever optimizer and transforms it is made of, and launches little besides the model."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from traced import traced_step

from olmo_fn import tree
from olmo_fn.core.capture import WARM, capture
from olmo_fn.core.pipe import accumulate, clip, donate, ema, grad, pipe, skip_spikes
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adafactor, adamw, dion, lion, muon, normuon, partition, sgd
from olmo_fn.optim.adamw import adam
from olmo_fn.optim.schedule_free import schedule_free_adamw
from olmo_fn.optim.schedules import warmup_cosine
from olmo_fn.testing import FakeCuda, Seen, Trace
from olmo_fn.train.config import Config, Recipe, Run
from olmo_fn.transforms import (
    accumulate_measured,
    clip_groups,
    clip_value,
    dims_of,
    first_step_bias,
    freeze,
    gradient_noise,
    merge,
    noise_scale,
    normalize,
    skip_steps,
)

MODEL = dense(64, 1, 4, 96, vocab_size=128)
SPECS = transformer.specs(MODEL)
RATE = warmup_cosine(1e-3, 10, 100)


def beside(matrix):
    return partition({"matrix": matrix, "default": adamw(RATE)}, SPECS)


OPTIMIZERS = {
    "adam": lambda: adam(RATE),
    "adamw": lambda: adamw(RATE, moments=torch.bfloat16),
    "sgd": lambda: sgd(RATE, momentum=0.9),
    "lion": lambda: lion(RATE),
    "adafactor": lambda: adafactor(RATE),
    "schedule-free": lambda: schedule_free_adamw(RATE),
    "muon": lambda: beside(muon(RATE)),
    "normuon": lambda: beside(normuon(RATE)),
    "dion": lambda: beside(dion(RATE)),
    "first step bias": lambda: first_step_bias(adamw(RATE)),
}
"""All but SOAP, which decides by its count of updates whether to look for new bases, and reads it for that."""
BEFORE = {
    "clip": lambda: [clip(1.0)],
    "clip_value": lambda: [clip_value(1.0)],
    "clip_groups": lambda: [clip_groups({"embed": 0.1, "default": 1.0}, SPECS)],
    "gradient_noise": lambda: [gradient_noise(0.01)],
    "accumulate": lambda: [accumulate(2)],
}
AFTER = {
    "skip_spikes": lambda: [skip_spikes()],
    "skip_steps": lambda: [skip_steps([(3, 5), (9, 9)])],
    "ema": lambda: [ema(0.99)],
    "merge": lambda: [merge(5, range(10, 100, 10))],
    "normalize": lambda: [normalize(dims_of(SPECS))],
    "freeze": lambda: [freeze("embed", parameters=SPECS)],
    "donate": lambda: [donate()],
}


def pipe_of(optimizer: str = "adamw", before: str = "", after: str = ""):
    around = BEFORE[before]() if before else [], AFTER[after]() if after else []
    return pipe(transformer.loss(MODEL), grad(dtype=torch.bfloat16), *around[0], OPTIMIZERS[optimizer](), *around[1])


def steps(make, args=(), n=1, length=16):
    """What the last of ``n`` steps does."""
    with FakeTensorMode(), Trace() as trace:
        step = make(*args)
        state = step.init(tree.map(lambda spec: torch.empty(spec.shape, device="cuda"), SPECS))
        for _ in range(n):
            trace.seen = Seen()
            ids = torch.zeros(4, length, dtype=torch.int64, device="cuda")
            state, _ = step(state, {"input_ids": ids, "labels": ids})
    return trace.seen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers(fake_cuda: FakeCuda, name: str):
    assert not fake_cuda.run(steps, pipe_of, (name,)).syncs


@pytest.mark.parametrize("name", [*BEFORE, *AFTER])
def test_transforms(fake_cuda: FakeCuda, name: str):
    assert not fake_cuda.run(steps, pipe_of, ("adamw", *((name, "") if name in BEFORE else ("", name)))).syncs


def measured():
    loss = transformer.loss(MODEL)
    return pipe(loss, grad(), accumulate_measured(2), adamw(RATE), noise_scale(0.9))


def test_the_noise_scale(fake_cuda: FakeCuda):
    assert not fake_cuda.run(steps, measured).syncs


def waiting():
    """A schedule with an ``if`` reads the step's number."""
    return pipe(transformer.loss(MODEL), grad(), adamw(lambda step: torch.tensor(1e-3, device=step.device)))


def test_what_waits_is_found(fake_cuda: FakeCuda):
    assert [name.split(":")[2] for name in fake_cuda.run(steps, waiting).syncs] == ["_to_copy test_syncs.py"]


# --- launches -----------------------------------------------------------------------------------------------------------

CFG = Config(dense(64, 3, 4, 96, vocab_size=128), recipe=Recipe(8, 16), run=Run(steps=5000))


@pytest.mark.parametrize("mesh", [None, Mesh(dp_shard=8), Mesh(dp_replicate=2, dp_shard=4)], ids=["one", "fsdp", "hsdp"])
def test_the_norm_and_the_updates_are_few_launches(fake_cuda: FakeCuda, mesh: Mesh | None):
    """Alike leaves are updated in one call: 3 blocks of 11 leaves, of five sizes."""
    seen = fake_cuda.run(traced_step, CFG, mesh)
    assert not seen.syncs
    norms = seen.launches["aten::_foreach_norm"]
    assert 1 <= norms <= 2  # a dtype each
    assert seen.launches["aten::linalg_vector_norm"] == (1 if mesh is None else 0)
    updates = seen.calls["each"] + seen.calls["guarded"]
    assert updates <= 12 < len(tree.flatten(transformer.specs(CFG.model)))


# --- capture ------------------------------------------------------------------------------------------------------------


class Launched:
    """A graph of nothing: what is recorded is counted as launched, what is replayed is not."""

    def recording(self):
        from contextlib import nullcontext

        return nullcontext()

    def replay(self):
        pass


def captured():
    return capture(lambda: Launched)(pipe_of("adamw", "clip", "donate"))


def test_a_captured_step_launches_a_graph(fake_cuda: FakeCuda):
    """Besides, the batch into the graph's tensors and the metrics out of it."""
    assert fake_cuda.run(steps, captured, (), WARM + 1).launched > 100  # records
    seen = fake_cuda.run(steps, captured, (), WARM + 2)
    assert seen.launches == {"aten::zeros": 1, "aten::copy_": 2, "aten::clone": 1}
    assert not seen.syncs
