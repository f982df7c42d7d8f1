"""Multi-token prediction is what its definition says, written out position by position; documents' ends have no labels."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE, PLAIN
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.models import count, transformer
from olmo_fn.models.config import MultiToken, dense
from olmo_fn.nn.norm import rms_norm
from olmo_fn.spec import init

PLAINEST = dense(16, 2, 2, 24, vocab_size=40, init_std=0.3)
MODEL = replace(PLAINEST, multi_token=MultiToken(depth=2, weight=0.6))


def batch(documents: bool = False) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (2, 13), generator=torch.Generator().manual_seed(0))
    more = {"documents": torch.tensor([[0] * 5 + [1] * 7] * 2)} if documents else {}
    return {"input_ids": ids[:, :-1].contiguous(), "labels": ids[:, 1:].contiguous(), **more}


def by_definition(params, data) -> torch.Tensor:
    """The extra loss: of each module the mean over modules of the summed cross entropies, times the weight."""
    chain, x = transformer.loss(PLAINEST), None
    own = {name: value for name, value in params.items() if name != "mtp"}
    ctx = chain.context(data, PLAIN)
    for stage in chain.stages[:-1]:
        x, _ = stage.fn({key: tree.at(own, path) for key, path in stage.params}, x, ctx)
    T, total = data["input_ids"].shape[1], torch.zeros(())
    layer = transformer.layers(PLAINEST)[-1]
    for k in (1, 2):
        p = params["mtp"][str(k)]
        token = params["embed"][torch.cat((data["input_ids"][:, k:], torch.zeros(2, k, dtype=torch.int64)), 1)]
        both = torch.cat((rms_norm(p["stream_norm"], x), rms_norm(p["embed_norm"], token)), -1)
        x = both @ p["join"]["w_join"]
        for part in layer.parts:
            x = part.fn(p["block"], x, lambda sub, h, p=p: sub.apply(p["block"][sub.name], h, ctx), ctx)
        logits = rms_norm(p["head_norm"], x) @ params["head"]["w_out"].T
        for row in range(2):
            for t in range(T - k):
                same = "documents" not in data or data["documents"][row, t] == data["documents"][row, t + k]
                if same:
                    total = total - logits[row, t].log_softmax(-1)[data["labels"][row, t + k]]
    return 0.3 * total


@pytest.mark.parametrize("documents", [False, True])
def test_definition(documents):
    params, data = init(transformer.specs(MODEL), seed=0), batch(documents)
    total, metrics = transformer.loss(MODEL)(params, data)
    own = {name: value for name, value in params.items() if name != "mtp"}
    expected = by_definition(params, data)
    assert_close(total - transformer.loss(PLAINEST)(own, data)[0], expected, rtol=1e-4, atol=1e-4)
    assert_close(metrics["mtp"], expected, rtol=1e-5, atol=1e-5)


def test_engines_agree_and_every_part_learns():
    params, data = init(transformer.specs(MODEL), seed=0), batch()
    found = [pipe(transformer.loss(MODEL), grad(engine))(params, data)[0] for engine in ("tape", "func")]
    for (path, a), (_, b) in zip(*(tree.items(g) for g in found), strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-6)
        assert a.any(), path


def test_counts_and_decoding():
    """The modules count, and the logits are those of the model without them."""
    params, data = init(transformer.specs(MODEL), seed=0), batch()
    own = {name: value for name, value in params.items() if name != "mtp"}
    assert torch.equal(transformer.logits(MODEL, params, data), transformer.logits(PLAINEST, own, data))
    block = count.num_params(PLAINEST) - count.num_params(dense(16, 1, 2, 24, vocab_size=40))
    assert count.num_params(MODEL) - count.num_params(PLAINEST) == 2 * (block + 2 * 16 * 16 + 3 * 16)
    assert count.flops_per_token(MODEL, 12) > count.flops_per_token(PLAINEST, 12)


def test_labels_end_with_the_sequence():
    ctx = transformer.loss(MODEL).context(batch(), PLAIN)
    assert [(part.labels == IGNORE).sum(1).tolist() for part in ctx.ahead] == [[1, 1], [2, 2]]
