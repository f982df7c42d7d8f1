"""Attention on a GPU, traced: which kernel is launched, with what, and that nothing is copied on the way to it and back."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch._subclasses import FakeTensorMode
from traced import connected, traced_step

from olmo_fn import tree
from olmo_fn.core.chain import Backend
from olmo_fn.core.pipe import accumulate, grad, pipe
from olmo_fn.core.primitive import primitive
from olmo_fn.kernels.attention_backend import Need
from olmo_fn.kernels.attention_cp import attend_over_vjp
from olmo_fn.kernels.attention_table import choose_auto
from olmo_fn.kernels.packing import Packing
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.mesh.settings import MeshConfig
from olmo_fn.models import transformer
from olmo_fn.models.config import Attention, dense
from olmo_fn.nn.context import Context
from olmo_fn.optim import adamw
from olmo_fn.testing import FakeCuda, Seen, Trace
from olmo_fn.train.config import Config, Recipe, Run

FLASH = {"aten::_flash_attention_forward": 1}, {"aten::_flash_attention_backward": 1}
CUDNN = {"aten::_scaled_dot_product_cudnn_attention": 1}, {"aten::_scaled_dot_product_cudnn_attention_backward": 1}
HEADS = {"n_heads": 8, "n_kv_heads": 2}
CASES = {
    "cudnn": (HEADS, False, CUDNN),
    "flash": ({**HEADS, "window_pattern": (32,)}, False, FLASH),
    "documents": (HEADS, True, FLASH),
}


def layer(settings, documents, T=128):
    """The launches of an attention sublayer, forward and backward, whose norms and rotation are one compiled stage."""
    model = dense(128, 3, 8, 96, vocab_size=128)
    model = replace(model, block=replace(model.block, mixer=Attention(**settings)))
    sub = model.block.mixer.build(model, 0)
    with FakeTensorMode(), Trace() as trace:
        p = tree.map(lambda spec: torch.empty(spec.shape, device="cuda", dtype=torch.bfloat16).requires_grad_(), sub.specs)
        x = torch.empty(2, T, 128, device="cuda", dtype=torch.bfloat16).requires_grad_()
        ids = torch.zeros(2, T, dtype=torch.int64, device="cuda")
        tables = {key: make(torch.arange(T, device="cuda")) for key, make in sub.tables.items()}
        backend = Backend(primitive, dtype=torch.bfloat16, fuse=trace.stage, kernel=trace.kernel)
        ctx = Context(backend, ids, ids, ids, tables=tables)
        if documents:
            starts = torch.zeros(2, 4, dtype=torch.int32, device="cuda")
            ctx = replace(ctx, documents=ids, packing=Packing(starts, 64))
            ctx.packing.cumulative(0, T)  # once for all layers
        trace.seen = Seen()
        out = sub.apply(p, x, ctx)
        forward, trace.seen = trace.seen, Seen()
        torch.autograd.grad(out, [x, *(leaf for _, leaf in tree.items(p))], torch.empty_like(out))
    return forward.launches, trace.seen.launches


@pytest.mark.parametrize("case", CASES)
def test_a_layer_is_its_products_and_a_kernel(fake_cuda: FakeCuda, case: str):
    """Eager, besides one compiled stage: nothing transposes, joins or copies heads."""
    settings, documents, (there, back) = CASES[case]
    forward, backward = fake_cuda.run(layer, settings, documents)
    assert forward == {"aten::mm": 4, **there}
    assert backward == {"aten::mm": 6, "aten::addmm_": 2, **back}


# --- parts of sequences -------------------------------------------------------------------------------------------------


def over_ranks(method, window, documents):
    """Kernels of the first rank of two, forward and backward, in dtypes and shapes that a GPU's operations take."""
    cp = connected(Mesh(cp=2)).axes.cp
    with FakeTensorMode(), Trace() as trace:
        q, k = (torch.empty(2, 64, n, 16, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for n in (8, 2))
        options = {"window": window, "cp": cp, "method": method}
        if documents:
            ids = torch.zeros(2, 128, dtype=torch.int64, device="cuda")
            options |= {"documents": ids, "packing": Packing(torch.zeros(2, 4, dtype=torch.int32, device="cuda"), 64)}
        part = {"gather": "rows", "ring": "ring", "ulysses": "whole"}[method]
        need = NEED._replace(window=bool(window), documents=documents, part=part)
        out, pullback = attend_over_vjp(q, k, k, attend=choose_auto(need), **options)
        found = pullback(out, torch.empty_like(out))
    assert [x.shape for x in (out, *found)] == [q.shape, q.shape, k.shape, k.shape]
    assert {x.dtype for x in (out, *found)} == {torch.bfloat16}
    if method != "ulysses":  # which exchanges heads for positions
        assert all(x.transpose(1, 2).is_contiguous() for x in (out, found[0]))
    return Counter({name: n for name, n in trace.seen.launches.items() if "attention" in name}), trace.seen.syncs


NEED = Need("cuda", torch.bfloat16, 16, grouped=True, capability=(9, 0))


@pytest.mark.parametrize(
    ("method", "window", "documents", "kernels", "times"),
    [
        ("gather", None, False, FLASH, 2),
        ("gather", 40, True, FLASH, 2),
        ("ulysses", None, False, CUDNN, 1),
        ("ulysses", 40, True, FLASH, 1),
        ("ring", None, False, CUDNN, 5),  # of 4 pieces the first and the last: one pair, and four
        ("ring", 40, False, FLASH, 4),
        ("ring", None, True, FLASH, 5),
    ],
)
def test_context_parallelism(fake_cuda: FakeCuda, method, window, documents, kernels, times):
    launches, syncs = fake_cuda.run(over_ranks, method, window, documents)
    assert launches == {name: times for way in kernels for name in way}
    assert not syncs


# --- steps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "mesh", "kernel", "layers"),
    [
        ({}, None, "aten::_scaled_dot_product_cudnn_attention", 3),
        ({"window_pattern": (8,), "sinks": True}, None, "aten::_flash_attention_forward", 2),
        ({"n_kv_heads": 2}, Mesh(tp=2), "aten::_scaled_dot_product_cudnn_attention", 3),
        ({"score_cap": 5.0}, None, "flex_attention", 3),
    ],
    ids=["whole", "windows and sinks", "tp", "capped"],
)
def test_a_step_attends_by_the_backend(fake_cuda: FakeCuda, settings, mesh, kernel, layers):
    """And waits for nothing."""
    model = dense(64, 3, 4, 96, vocab_size=128)
    model = replace(model, block=replace(model.block, mixer=replace(model.block.mixer, n_heads=4, **settings)))
    made = MeshConfig(tp=mesh.tp) if mesh else MeshConfig()
    seen = fake_cuda.run(traced_step, Config(model, recipe=Recipe(4, 32), run=Run(steps=5000), mesh=made), mesh)
    assert seen.launches[kernel] == layers
    assert not any(name.endswith("bmm") for name in seen.launches)
    assert not seen.syncs


def step_of_documents():
    """Of a batch as a session brings it to a GPU, in two parts."""
    model = dense(64, 3, 4, 96, vocab_size=128)
    with FakeTensorMode(), Trace() as trace:
        step = pipe(transformer.loss(model), grad(dtype=torch.bfloat16), accumulate(2), adamw(1e-3))
        state = step.init(tree.map(lambda spec: torch.empty(spec.shape, device="cuda"), transformer.specs(model)))
        ids = torch.zeros(4, 32, dtype=torch.int64, device="cuda")
        lengths = Packing(torch.zeros(4, 8, dtype=torch.int32, device="cuda"), 16).to_batch()
        trace.seen = Seen()
        step(state, {"input_ids": ids, "labels": ids, "documents": ids, **lengths})
    return trace.seen


def test_documents_make_nobody_wait(fake_cuda: FakeCuda):
    """Their lengths come with the batch, and are made cumulative once for all three layers of each part."""
    seen = fake_cuda.run(step_of_documents)
    assert not seen.syncs
    assert seen.launches["aten::_flash_attention_forward"] == seen.launches["aten::_flash_attention_backward"] == 6
    assert seen.launches["aten::clamp_"] == 2
