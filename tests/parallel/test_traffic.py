"""Collectives and bytes of one step, counted on real ranks, beside the textbook's minimum: the table of docs/parallelism.md."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from olmo_fn import tree
from olmo_fn.core.pipe import Transform, clip, grad, pipe, with_execution
from olmo_fn.core.step import Step
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import DEFAULT, Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.parallel.gathered import Gathered
from olmo_fn.parallel.shard import shard
from olmo_fn.parallel.sharded import ShardedWeights, sharded
from olmo_fn.spec import init
from olmo_fn.testing import Live, Moved, Pool, Traffic

MODEL = dense(16, 2, 4, 24, vocab_size=32, n_kv_heads=2)
MIXER = MODEL.block.mixer
B, T, D, K = 8, 16, MODEL.d_model, MIXER.width(MODEL.d_model)
LAYERS, HEADS, KV = MODEL.n_layers, MIXER.n_heads, MIXER.kv_heads
SPECS = transformer.specs(MODEL)
ZERO2 = Rules(keep_gathered=True)


def recipe(dtype: torch.dtype, *more: Transform, change=lambda stage: stage) -> Step:
    return pipe(transformer.loss(MODEL).changed(change), grad(dtype=dtype), clip(1.0), adamw(1e-2), *more)


def a_batch() -> dict[str, torch.Tensor]:
    ids = torch.arange(B * (T + 1)).view(B, T + 1) % MODEL.vocab_size
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}


def count(connection, rules: Rules, dtype: torch.dtype) -> dict[tuple[str, str], Moved]:
    step = recipe(dtype, shard(connection, SPECS, rules))
    state = step.init(init(SPECS, 0))
    with Traffic(connection.axes) as traffic:
        step(state, a_batch())
    return traffic.moved


# --- the textbook -----------------------------------------------------------------------------------------------------


def elements(on: Callable[[str], bool], matrices: bool | None = None) -> int:
    """Entries of the parameters that are ``on``; only matrices, or only vectors."""
    return sum(s.size for p, s in tree.items(SPECS) if on(p) and matrices in (None, len(s.shape) > 1))


def is_sharded(path: str) -> bool:
    """All but the gains of queries and keys, which have no dim "embed"."""
    return "embed" in tree.at(SPECS, path).axes


def weights(wire: int, last: bool = True) -> int:
    """Bytes of all that FSDP gathers: matrices in the compute dtype, vectors in fp32; without the head's segment perhaps."""
    on = lambda path: is_sharded(path) and (last or not path.startswith("head"))  # noqa: E731
    return wire * elements(on, matrices=True) + 4 * elements(on, matrices=False)


SEGMENTS = LAYERS + 2  # embedding, blocks, head
IN_PLACE = 5 * LAYERS  # matrices whose rows are sharded, each gathered straight into its place: w_q, w_k, w_v, w_gate, w_up
REST = 4 * elements(lambda path: not is_sharded(path))  # summed at the end, at once
CONTROL = Moved(2, 4 * 3 + 8, 4 * 3 + 8)  # loss, ce, z of all tokens; the squared norm


def fsdp(rules: Rules, wire: int, n: int = 2) -> dict[str, Moved]:
    """ZeRO: weights are gathered once (ZeRO-2), or again for the backward sweep but for the last segment's (ZeRO-3);
    gradients are scattered once, in fp32.
    """
    whole = weights(wire) + (0 if rules.keep_gathered else weights(wire, last=False))
    gathers = IN_PLACE + SEGMENTS + (0 if rules.keep_gathered else IN_PLACE + SEGMENTS - 1)
    return {
        "all_gather": Moved(gathers, whole, whole * (n - 1) // n),
        "reduce_scatter": Moved(SEGMENTS, 4 * elements(is_sharded), 4 * elements(is_sharded) * (n - 1) // n),
    }


def all_reduces(*parts: Moved) -> Moved:
    return Moved(*map(sum, zip(*parts, strict=True)))


ACTIVATION = B * T * D * 4  # of one rank's sequences in fp32
BLOCK = 2 * LAYERS  # sublayers


@pytest.mark.parametrize("wire", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rules", [DEFAULT, ZERO2], ids=["zero3", "zero2"])
def test_fsdp(pool: Pool, rules: Rules, wire: torch.dtype) -> None:
    rest = all_reduces(CONTROL, Moved(1, REST, REST))
    want = {(kind, "dp_shard"): moved for kind, moved in {**fsdp(rules, wire.itemsize), "all_reduce": rest}.items()}
    assert pool.run(count, rules, wire, mesh=Mesh(dp_shard=2)) == [want] * 2


def test_ddp(pool: Pool) -> None:
    """All gradients summed once, a bucket a segment."""
    grads = 4 * elements(lambda path: True)
    want = {("all_reduce", "dp_replicate"): all_reduces(CONTROL, Moved(SEGMENTS, grads, grads))}
    assert pool.run(count, DEFAULT, torch.float32, mesh=Mesh(dp_replicate=2)) == [want] * 2


def test_hsdp(pool: Pool) -> None:
    """As FSDP inside a copy; of the gradients only the shards are summed over the copies."""
    shards = 4 * elements(is_sharded) // 2
    rest = [Moved(m.calls, m.whole, 2 * m.whole * 3 // 4) for m in (CONTROL, Moved(1, REST, 0))]
    want = {(kind, "dp_shard"): moved for kind, moved in fsdp(DEFAULT, 4).items()}
    want |= {("all_reduce", "dp_replicate"): Moved(SEGMENTS, shards, shards), ("all_reduce", "data"): all_reduces(*rest)}
    assert pool.run(count, DEFAULT, torch.float32, mesh=Mesh(dp_replicate=2, dp_shard=2)) == [want] * 4


def test_tensor_and_sequence_parallel(pool: Pool) -> None:
    """2 gathers and 2 scatters of the activations a block, one of each for embedding and head; the same backward."""
    moves = 2 * (BLOCK + 1)
    stream = Moved(moves, moves * ACTIVATION, moves * ACTIVATION // 2)
    statistic = B * T * 4
    small = [
        Moved(4 * LAYERS, 4 * LAYERS * statistic, 0),  # mean squares of queries and of keys, and their gradients
        Moved(BLOCK + 1, (BLOCK + 1) * 4 * D, 0),  # gains of norms, which see a part of the sequence
        Moved(3, 3 * statistic, 0),  # the head: largest logit, sum of exponentials, logit of the label
        Moved(1, 8, 0),  # the squared norm
    ]
    want = {("all_gather", "tp"): stream, ("reduce_scatter", "tp"): stream}
    total = all_reduces(*small)
    want["all_reduce", "tp"] = total._replace(sent=total.whole)
    assert pool.run(count, DEFAULT, torch.float32, mesh=Mesh(tp=2)) == [want] * 2


PAIR = B * KV * T * K * 4  # keys, or values, of a rank's sequences
QKVO = B * (2 * HEADS + 2 * KV) * T * K * 4
CP = {
    # keys and values gathered, their gradients scattered
    "gather": dict.fromkeys(("all_gather", "reduce_scatter"), Moved(2 * LAYERS, 2 * LAYERS * PAIR, LAYERS * PAIR)),
    # queries, keys, values, the result, and all their gradients: a rank has half of each, and half of that goes to the other
    "ulysses": {"all_to_all": Moved(8 * LAYERS, LAYERS * QKVO, LAYERS * QKVO // 2)},
    # a rank's half of keys and values goes 1 hop forward and 1 backward, their gradients 2, home again
    "ring": {"all_to_all": Moved(4 * LAYERS, 4 * LAYERS * PAIR, 4 * LAYERS * PAIR)},
}


@pytest.mark.parametrize("method", CP)
def test_context_parallel(pool: Pool, method: str) -> None:
    """Parameters as in FSDP over the same ranks, and what attention exchanges."""
    want = {**fsdp(DEFAULT, 4), "all_reduce": all_reduces(CONTROL, Moved(1, REST, REST))}
    for kind, moved in CP[method].items():
        want[kind] = all_reduces(want.get(kind, Moved()), moved)
    found = pool.run(count, Rules(cp_method=method), torch.float32, mesh=Mesh(cp=2))
    assert found == [{(kind, "cp"): moved for kind, moved in want.items()}] * 2


# --- memory -----------------------------------------------------------------------------------------------------------


def between_sweeps(connection, rules: Rules) -> tuple[int, int]:
    """Bytes of gathered weights that live when the head begins, the last stage forward; and of all that the step made."""
    gathered: list[Gathered] = []
    found: list[tuple[int, int]] = []

    class Watched(ShardedWeights):
        def fetch(self, *args):
            weights = super().fetch(*args)
            gathered.extend([weights] if isinstance(weights, Gathered) else [])
            return weights

    def watching(stage):
        def head(p, x, ctx):
            time.sleep(0.3)  # gloo's thread may hold the buffers of the gather that just ended for a moment longer
            weights = sum(out.untyped_storage().nbytes() for segment in gathered for out in segment.outs.values())
            found.append((weights, live.bytes()))
            return stage.fn(p, x, ctx)

        return stage._replace(fn=head) if stage.name == "head" else stage

    layout = sharded(connection, SPECS, rules)
    step = with_execution(recipe(torch.float32, change=watching), layout=replace(layout, weights=Watched(layout.placement)))
    state = step.init(init(SPECS, 0))
    with Live() as live:
        step(state, a_batch())
    return found[0]


def test_zero3_frees_gathered_weights_between_the_sweeps(pool: Pool) -> None:
    """Between the sweeps only the weights in use live; all else is what data parallelism keeps too, so there is no copy."""
    all_weights, in_use = weights(4), weights(4) - weights(4, last=False)
    _, activations = pool.run(between_sweeps, DEFAULT, mesh=Mesh(dp_replicate=2))[0]
    assert activations > 0
    for rank in range(2):
        assert pool.run(between_sweeps, DEFAULT, mesh=Mesh(dp_shard=2))[rank] == (in_use, activations + in_use)
        assert pool.run(between_sweeps, ZERO2, mesh=Mesh(dp_shard=2))[rank] == (all_weights, activations + all_weights)
