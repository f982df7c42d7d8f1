"""OLMo 2 through a pipeline: loss and every gradient are those of one process, whatever the schedule, split and tying."""

from dataclasses import replace

import pytest
import torch

from olmo_fn import tree
from olmo_fn.grad import EAGER, fuse, loss_tokens, pull, subtrees, tape_gradients
from olmo_fn.models import transformer
from olmo_fn.models.config import Model
from olmo_fn.parallel.mesh import Mesh
from olmo_fn.parallel.pipeline.communicate import plan
from olmo_fn.parallel.pipeline.execute import execute
from olmo_fn.parallel.pipeline.schedule import schedule
from olmo_fn.parallel.pipeline.split import parse_split, split
from olmo_fn.parallel.pipeline.zero_bubble import Saved, Split, split_pullback
from olmo_fn.spec import init
from olmo_fn.step import split_batch

MODEL = Model(8, 6, 2, 12, vocab_size=17, n_kv_heads=1, window_pattern=(3, -1), init_std=0.3)
DOUBLE, ROWS, LENGTH = torch.float64, 6, 7


def batch_of(cfg):
    ids = torch.randint(cfg.vocab_size, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    labels = ids[:, 1:].clone()
    labels[0, 2:] = labels[3, :4] = -100  # micro-batches count differently many tokens
    return {"input_ids": ids[:, :-1].contiguous(), "labels": labels}


def held(cfg, ranges):
    """The chain's stages of every virtual stage."""
    embed, *blocks, head = fuse(transformer.loss(cfg).stages)
    parts = [blocks[start:stop] for start, stop in ranges]
    parts[0], parts[-1] = [embed, *parts[0]], parts[-1] + [head]
    return parts


def pull_in_two(stage, params, carry, context):
    """As `olmo_fn.grad.pull`, with the pullback in two parts: gradients come as pairs of path and tensor."""
    paths = [path for at, p in zip(stage.params, params, strict=True) for path, _ in tree.items(p, at)]
    if stage.vjp is not None:  # all in the first part
        out, pullback = pull(stage, params, carry, context, False, DOUBLE, EAGER)
        found = []

        def input_grad(cotangent):
            grads, dx = pullback(cotangent)
            found.extend(g for p in grads for _, g in tree.items(p))
            return dx

        return out, Split(input_grad, lambda: list(zip(paths, found, strict=True)))
    leaves = []

    def leaf(p):
        leaves.append(p.detach().requires_grad_())
        return leaves[-1]

    x = None if carry is None else carry.detach().requires_grad_()
    with Saved() as saved:
        out = stage.fn(*(tree.map(leaf, p) for p in params), x, context)
    halves = split_pullback(out, leaves, x, saved)
    return out.detach(), Split(halves.input_grad, lambda: list(zip(paths, halves.weight_grad(), strict=True)))


class Rank:
    """The callbacks of one rank over its chunks of the model."""

    def __init__(self, cfg, mine, parts, microbatches):
        batches = split_batch(batch_of(cfg), microbatches)
        self.tokens = loss_tokens(batches[0])
        self.contexts = [transformer.context(cfg, batch) for batch in batches]
        self.chunks = [parts[mine.stage(chunk)] for chunk in range(mine.chunks)]
        whole = init(transformer.specs(cfg), 0, DOUBLE)
        self.params = [[subtrees(whole, stage) for stage in chunk] for chunk in self.chunks]
        self.pulled, self.grads, self.loss = {}, {}, torch.zeros((), dtype=DOUBLE)

    def forward(self, chunk, k, carry):
        halves = self.pulled[chunk, k] = []
        for stage, params in zip(self.chunks[chunk], self.params[chunk], strict=True):
            carry, half = pull_in_two(stage, params, carry, self.contexts[k])
            halves.append(half)
        if isinstance(carry, tuple):
            self.loss += carry[0].detach() / self.tokens
            return None
        return carry

    def backward_input(self, chunk, k, cotangent):
        cotangent = 1.0 / self.tokens.double() if cotangent is None else cotangent
        for half in reversed(self.pulled[chunk, k]):
            cotangent = half.input_grad(cotangent)
        return cotangent

    def backward_weight(self, chunk, k):
        for half in self.pulled.pop((chunk, k)):
            for path, g in half.weight_grad():
                self.grads[path] = self.grads[path] + g if path in self.grads else g

    def backward(self, chunk, k, cotangent):
        cotangent = self.backward_input(chunk, k, cotangent)
        self.backward_weight(chunk, k)
        return cotangent


def pipelined(connection, cfg, kind, chunks, ranges, microbatches):
    axis = connection.axes.pp
    mine = plan(schedule(kind, axis.size, microbatches, chunks))[axis.index]
    rank = Rank(cfg, mine, held(cfg, ranges), microbatches)
    with torch.enable_grad():
        execute(
            mine,
            rank.forward,
            rank.backward,
            rank.backward_input,
            rank.backward_weight,
            empty=lambda stage, k: torch.empty(ROWS // microbatches, LENGTH, cfg.d_model, dtype=DOUBLE),
            axis=axis,
        )
    return rank.loss, rank.grads


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "ranks", "chunks", "text", "microbatches"),
    [
        ("gpipe", 2, 1, "", 3),
        ("1f1b", 2, 1, "embed,0-5", 6),
        ("1f1b", 4, 1, "embed,0-3,4-5,head", 6),
        ("interleaved", 2, 2, "", 3),
        ("zero_bubble", 2, 1, "0-1,2-5", 3),
        ("zero_bubble", 4, 1, "", 6),
        ("forward", 2, 2, "", 3),
    ],
)
def test_same_as_one_process(pool, tied, kind, ranks, chunks, text, microbatches):
    cfg = replace(MODEL, tie_embeddings=tied)
    stages = ranks * chunks
    ranges = parse_split(text, cfg.n_layers, stages) if text else split(cfg.n_layers, stages, 0.2, 1.5)
    results = pool.run(pipelined, cfg, kind, chunks, ranges, microbatches, mesh=Mesh(pp=ranks), timeout=60)
    params = init(transformer.specs(cfg), 0, DOUBLE)
    expected, metrics = tape_gradients(transformer.loss(cfg), "none", DOUBLE)(params, batch_of(cfg), EAGER)
    torch.testing.assert_close(sum(loss for loss, _ in results), metrics["loss"], rtol=1e-12, atol=1e-12)
    if kind == "forward":
        return
    found = {}
    for _, grads in results:  # only a tied embedding has two owners
        for path, g in grads.items():
            assert path not in found or (tied and path == "embed")
            found[path] = found[path] + g if path in found else g
    assert found.keys() == tree.flatten(expected).keys()
    for path, g in tree.items(expected):
        torch.testing.assert_close(found[path], g, rtol=1e-12, atol=1e-13)
