"""OLMo 2 through a pipeline of real processes: loss, state after three steps and evaluation are those of one process,
whatever the schedule, split, tying and what else the mesh does."""

import pytest
import torch
from torch.distributed.tensor import DTensor

from olmo_fn import tree
from olmo_fn.core.pipe import accumulate, clip, ema, grad, offload, pipe, skip_spikes
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense, modified
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline import sweep
from olmo_fn.parallel.pipeline.stages import Pipeline
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init
from olmo_fn.train.evals import evaluate

MODEL = dense(16, 3, 4, 18, vocab_size=19, n_kv_heads=2, window_pattern=(5, -1), init_std=0.3)
TIED = modified(MODEL, tie_embeddings=True)
DOUBLE = torch.float64


def batch(i):
    g = torch.Generator().manual_seed(i)
    ids = torch.randint(MODEL.vocab_size, (8, 17), generator=g)
    labels = ids[:, 1:].masked_fill(torch.rand(8, 16, generator=g) < 0.3, -100)  # micro-batches count differently many tokens
    documents = torch.randint(0, 4, (8, 16), generator=g).sort(-1).values
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels, "documents": documents}


def train(cfg, options, *layout):
    """Three steps and an evaluation: metrics, state as whole tensors, held-out loss."""
    parts = grad("tape", options.get("remat", "none"), DOUBLE), accumulate(options.get("accumulate", 1)), clip(1.0)
    step = pipe(transformer.loss(cfg, z_loss=1e-2), *parts, adamw(1e-2), skip_spikes(), ema(0.9), *layout)
    params = init(transformer.specs(cfg), 0, DOUBLE)
    state, metrics = step.init(params), []
    for i in range(3):
        state, found = step(state, batch(i))
        metrics.append({name: float(value) for name, value in found.items()})
    heldout = evaluate(transformer.loss(cfg), state.params, iter([batch(9)]), None, dtype=DOUBLE, execution=step.execution)
    whole = tree.map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, {"params": state.params, "slots": state.slots})
    return metrics, tree.flatten(whole), heldout.loss


def on_rank(connection, cfg, options, pipeline, mutant=None):
    if mutant == "late":  # weights' gradients of the zero-bubble schedule that nobody computes
        keep = sweep._accumulate
        sweep._accumulate = lambda found, grads: keep(found, {} if "feed_forward" in str([*grads]) and found else grads)
    try:
        layout = shard(connection, transformer.specs(cfg), pipeline=pipeline)
        return train(cfg, options, layout, *([offload()] if options.get("offload") else []))
    finally:
        if mutant == "late":
            sweep._accumulate = keep


def law(pool, mesh, pipeline, cfg=MODEL, mutant=None, **options):
    metrics, state, heldout = train(cfg, options)
    seen = set()
    for their_metrics, their_state, their_heldout in pool.run(on_rank, cfg, options, pipeline, mutant, mesh=mesh):
        for ours, theirs in zip(metrics, their_metrics, strict=True):
            assert theirs == pytest.approx(ours, rel=1e-11, abs=1e-11)
        assert their_heldout == pytest.approx(heldout, rel=1e-12)
        for path, value in their_state.items():
            torch.testing.assert_close(value, state[path], rtol=1e-11, atol=1e-12, msg=lambda m, p=path: f"{p}: {m}")
        seen |= set(their_state)
    assert seen == set(state), "every parameter is somewhere"


@pytest.mark.parametrize(
    ("mesh", "pipeline", "options"),
    [
        (Mesh(pp=2), Pipeline("1f1b"), {}),
        (Mesh(pp=2), Pipeline("gpipe"), {"remat": "full", "offload": True}),
        (Mesh(pp=2), Pipeline("interleaved", 4, 2), {"accumulate": 2}),
        (Mesh(pp=2), Pipeline("zero_bubble"), {"remat": "every-2"}),
        (Mesh(pp=4), Pipeline("1f1b", 2), {"cfg": TIED}),
        (Mesh(pp=2, dp_shard=2), Pipeline("zero_bubble", 2), {"cfg": TIED, "remat": "feed_forward"}),
        (Mesh(pp=2, tp=2), Pipeline("1f1b", split="embed,0-2"), {}),
        (Mesh(pp=2, cp=2), Pipeline("gpipe"), {"remat": "selective"}),
        (Mesh(pp=2), Pipeline("zero_bubble"), {"remat": "selective", "offload": True}),
    ],
)
def test_pipelines_are_invisible(pool, mesh, pipeline, options):
    law(pool, mesh, pipeline, **options)


def test_the_law_catches(pool):
    """A mutant that loses gradients of a micro-batch."""
    law(pool, Mesh(pp=2), Pipeline("zero_bubble"))
    with pytest.raises(AssertionError):
        law(pool, Mesh(pp=2), Pipeline("zero_bubble"), mutant="late")


def test_what_cannot_be_cut_is_refused(pool):
    for pipeline, message in (
        (Pipeline(split="0,1-2,3"), "has 3 parts for 2 virtual stages"),
        (Pipeline("interleaved"), "needs at least 2 chunks a rank"),
        (Pipeline(microbatches=3), "8 sequences a data-parallel rank cannot be cut into 3 micro-batches"),
    ):
        with pytest.raises(RuntimeError, match=message):
            pool.run(on_rank, MODEL, {}, pipeline, mesh=Mesh(pp=2))
