"""Which collectives a rank waits for at once, with no product of matrices between their beginning and their end: none but those
that must.

Gathers and reductions of weights must only at the two ends of the sweeps, whatever the depth of the model. Those inside of a
layer (tensor and context parallelism) give what the next operation reads: on a GPU `olmo_fn.nn.async_tp` is for them.
"""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from olmo_fn.core.pipe import clip, grad, pipe
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.placement import Rules
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, Block, Model, dense
from olmo_fn.models.settings.moe import MoE
from olmo_fn.optim import adamw
from olmo_fn.parallel.pipeline.execute import Sending
from olmo_fn.parallel.shard import shard
from olmo_fn.spec import init
from olmo_fn.testing import Pool, Waits

B, T = 8, 16


def waits(connection, rules: Rules, n_layers: int) -> tuple[Counter, Counter]:
    """Of one step: what is waited for at once, and what is not."""
    model = dense(16, n_layers, 4, 24, vocab_size=32, n_kv_heads=2)
    specs = transformer.specs(model)
    step = pipe(transformer.loss(model), grad(), clip(1.0), adamw(1e-2), shard(connection, specs, rules))
    ids = torch.arange(B * (T + 1)).view(B, T + 1) % model.vocab_size
    batch = {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()}
    state = step.init(init(specs, 0))
    with Waits(connection.axes) as waits:
        step(state, batch)
    assert not waits.under_way, "a collective that nobody has waited for"
    at_once = Counter(wait[:3] for wait in waits.found if not wait.products)
    return at_once, Counter(wait[:3] for wait in waits.found if wait.products)


SCATTER = ("reduce_scatter", "dp_shard", "sharded._scatter")
A_BLOCK = 6  # gathers of its weights: five matrices in their places, and a bucket
TABLE = {  # gathers: before the first product, and of the last block again, since the head has made its gradient already
    ("all_gather", "dp_shard", "gathered._gather"): 1 + A_BLOCK + A_BLOCK,
    SCATTER: 2,  # of the first block and the table: nothing is left to compute
}
ROWS = {
    ("all_gather", "dp_shard", "gathered._gather"): A_BLOCK + A_BLOCK,
    SCATTER: 1,
    ("all_gather", "dp_shard", "embedding.embedding"): 1,  # ids
    ("all_to_all", "dp_shard", "embedding._to_askers"): 1,
    ("all_to_all", "dp_shard", "embedding._to_owners"): 1,
}


def ends(axis: str) -> dict[tuple[str, str, str], int]:
    """What is summed once all is there: gradients of whole leaves; the loss; the norm, under clipping."""
    return {("all_reduce", axis, f"sharded.{name}"): 1 for name in ("summing", "total", "norm")}


COPIES = {("all_reduce", "dp_replicate", "sharded.go_on"): 3}  # of the first two blocks and the table: begun a segment later
LAYOUTS = {
    "fsdp": (Mesh(dp_shard=2), Rules(), TABLE | ends("dp_shard")),
    "fsdp, rows": (Mesh(dp_shard=2), Rules(exchanged=("embed",)), ROWS | ends("dp_shard")),
    "hsdp": (Mesh(dp_replicate=2, dp_shard=2), Rules(), TABLE | ends("data") | COPIES),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_only_the_ends_of_a_sweep_wait(pool: Pool, name: str) -> None:
    mesh, rules, must = LAYOUTS[name]
    for n_layers in (3, 4):
        for at_once, overlapped in pool.run(waits, rules, n_layers, mesh=mesh):
            assert at_once == Counter(must)
            assert overlapped[SCATTER] == n_layers
            if mesh.dp_replicate > 1:
                assert overlapped["all_reduce", "dp_replicate", "sharded.go_on"] == n_layers + 2 - 3


def test_tensor_parallelism_waits_inside_of_its_layers(pool: Pool) -> None:
    for at_once, overlapped in pool.run(waits, Rules(), 2, mesh=Mesh(tp=2)):
        inside = {"linear", "feed_forward", "norm", "cross_entropy", "transformer", "embedding", "tape"}
        assert {begun_in.split(".")[0] for _, _, begun_in in at_once} == {*inside, "sharded"}
        assert not overlapped


def waits_of_experts(connection, shared: int) -> list[tuple[str, bool]]:
    """Of one step: what began each exchange of a row, and whether anything was computed before it was waited for."""
    moe = MoE(num_experts=4, top_k=2, expert_size=8, shared_size=shared, dispatch="exchange")
    model = Model(16, 2, 32, block=Block(mixer=Attention(n_heads=2), feed_forward=moe))
    step = pipe(transformer.loss(model), grad(), adamw(1e-2), shard(connection, transformer.specs(model)))
    ids = torch.arange(B * (T + 1)).view(B, T + 1) % model.vocab_size
    state = step.init(init(transformer.specs(model), 0))
    with Waits(connection.axes) as waits:
        step(state, {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous()})
    assert not waits.under_way
    return [(wait.begun_in, wait.products >= 3) for wait in waits.found if wait.kind == "all_to_all"]


@pytest.mark.parametrize("shared", [8, 0])
def test_what_all_tokens_share_is_computed_while_they_travel(pool: Pool, shared: int) -> None:
    """Forward rows and their weights are under way meanwhile, and backward what comes of the results; counts are not."""
    for found in pool.run(waits_of_experts, shared, mesh=Mesh(dp_shard=2, ep=2)):
        there = Counter(hidden for begun_in, hidden in found if begun_in == "experts.exchanged")
        assert there == {True: 2 * 2, False: 2} if shared else {False: 3 * 2}, "of two layers: rows, weights, and counts"
        assert [begun_in for begun_in, _ in found].count("experts.finish") == 2, "the way back"
        back = Counter(hidden for begun_in, hidden in found if begun_in == "tape.backward")
        assert back.total() == 3 * 2
        assert bool(back[True]) == bool(shared)


# --- sends of a pipeline ----------------------------------------------------------------------------------------------


class Work:
    """A transfer that notes when it is waited for."""

    def __init__(self, waited: list[Work]) -> None:
        self.done, self.waited = False, waited

    def is_completed(self) -> bool:
        return self.done

    def wait(self) -> None:
        self.waited.append(self)


def test_a_send_does_not_stop_a_gpu() -> None:
    """On a GPU waiting would make the stream that computes wait for the receiver; tensors live until they have been read."""
    waited: list[Work] = []
    works, tensor = [Work(waited) for _ in range(4)], SimpleNamespace(is_cuda=True)
    sending = Sending(most=2)
    for work in works:
        sending.add(work, tensor)
        sending.let_go()
    assert len(sending.works) == 4
    assert not waited
    works[0].done = works[2].done = True
    sending.let_go()
    assert [work for work, _ in sending.works] == works[1:], "in their order"
    works[1].done = True
    sending.let_go()
    assert [work for work, _ in sending.works] == works[3:]
    sending.wait()
    assert waited == works[3:]


def test_a_processor_has_as_many_sends_as_the_schedule_says() -> None:
    waited: list[Work] = []
    works, sending = [Work(waited) for _ in range(4)], Sending(most=2)
    for work in works:
        sending.add(work, torch.empty(0))
        sending.let_go()
        assert len(sending.works) <= 2
    assert waited == works[:2]
    sending.wait()
    assert waited == works
