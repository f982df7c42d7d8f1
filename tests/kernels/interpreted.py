"""Triton kernels in Triton's interpreter beside the plain operations that define them: run by test_triton.py, in a process
whose Triton interprets. The interpreter cuts fp32 off where a GPU rounds to bf16: bf16 may differ by one in its last place.
"""

from __future__ import annotations

import pytest
import torch
from helpers import batch_of

from olmo_fn import tree
from olmo_fn.core.chain import IGNORE
from olmo_fn.core.gradients import Execution
from olmo_fn.core.pipe import grad, pipe
from olmo_fn.kernels import triton_logits
from olmo_fn.kernels.triton_logits import logits_gradient
from olmo_fn.kernels.triton_rotation import rotated_norms_vjp
from olmo_fn.mesh.axis import Axis
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.nn import attention, cross_entropy
from olmo_fn.nn.attention import Place, norm_and_rotate
from olmo_fn.nn.rope import rope_table
from olmo_fn.spec import init

BF16 = 2.0**-7  # from one number to the next, over the number, at most


def ulps(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bf16 lie between ``a`` and ``b`` at most."""
    order = lambda x: torch.where(x.view(torch.int16) < 0, -32768 - x.view(torch.int16).int(), x.view(torch.int16).int())  # noqa: E731
    return int((order(a) - order(b)).abs().max())


@pytest.mark.parametrize(  # within a piece, all kept, pieces that are read twice, odd ends
    ("vocab", "cap"), [(2, None), (130, 5.0), (1000, None), (1024, 5.0), (1538, None), (1538, 5.0)]
)
def test_logits_gradient(monkeypatch, vocab, cap):
    monkeypatch.setattr(triton_logits, "PIECE", 128)
    monkeypatch.setattr(triton_logits, "MOST", 4)
    torch.manual_seed(vocab)
    logits = (3 * torch.randn(6, vocab)).bfloat16()
    logits[5] = -9984.0
    logits[5, 1] = 2.0  # all but one entry is impossible
    labels = torch.tensor([vocab - 1, 0, IGNORE, vocab // 2, IGNORE, 1])
    weight, z_loss = torch.tensor(0.25), 1e-2
    exact = logits.double().requires_grad_()
    with torch.enable_grad():
        one = torch.eye(vocab, dtype=torch.float64)
        loss, metrics = cross_entropy.plain_cross_entropy(one, exact, labels, labels, None, z_loss, Axis(), cap)
        (expected,) = torch.autograd.grad(loss * weight, exact)
    got = logits.clone()
    sums = logits_gradient(got, labels, weight, z_loss, cap)
    torch.testing.assert_close(sums.double(), torch.stack((metrics["ce"], metrics["z"])), rtol=1e-6, atol=1e-5)
    assert (got[labels == IGNORE] == 0).all()
    large = expected.abs() > 1e-6
    assert ulps(got[large], expected[large].bfloat16()) <= 1
    assert (got[~large].abs() < 2e-6).all()


@pytest.mark.parametrize("norm", ["full", "head", "per-head"])
@pytest.mark.parametrize(("dtype", "heads", "documents"), [(torch.float32, (3, 1), True), (torch.bfloat16, (4, 4), False)])
def test_rotated_norms(norm, dtype, heads, documents):
    torch.manual_seed(len(norm))
    B, T, K = 2, 35, 16
    xs = tuple(torch.randn(B, T, H * K).to(dtype).requires_grad_() for H in heads)
    gains = tuple(torch.randn(K if norm == "head" else H * K).requires_grad_() for H in heads)
    cos, sin = rope_table(torch.randint(9, (B, T)) if documents else torch.arange(T), K, 100.0)
    how = Place(K, 1e-6, norm, tensors=("q_norm", "k_norm", "cos", "sin"))
    expected = norm_and_rotate(how, Axis(), *xs, xs[1], *gains, cos, sin)[:2]
    cotangents = tuple(torch.randn_like(x) for x in expected)
    gradients = torch.autograd.grad(expected, (*gains, *xs), cotangents)
    with torch.no_grad():
        got, pullback = rotated_norms_vjp(xs, gains, cos, sin, 1e-6, norm == "full")
        by_head, by_position = cotangents, tuple(c.transpose(1, 2).contiguous().transpose(1, 2) for c in cotangents)
        for order in (by_head, by_position):
            d_gains, d_xs = pullback(order)
            for d, exact in zip((*(d() for d in d_gains), *d_xs), gradients, strict=True):
                close(d, exact, dtype)
    for x, exact in zip(got, expected, strict=True):
        assert x.transpose(1, 2).is_contiguous()
        close(x, exact, dtype)


def close(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> None:
    """To three units in the last place of the largest entry: two roundings follow one another, and sums cancel."""
    assert a.dtype == b.dtype
    unit = 2e-7 if dtype == torch.float32 else BF16
    assert (a.double() - b.double()).abs().max() <= 3 * unit * b.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_uses_them(monkeypatch, dtype):
    cfg = dense(d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, hidden_size=32, vocab_size=64, init_std=0.3)
    loss, batch = transformer.loss(cfg), batch_of(64, rows=2, length=8, masked=(0.0, 0.5))
    params = init(transformer.specs(cfg), seed=0)
    used = []

    def seen(kernel, x):
        used.append(x.shape)
        return True

    def gradients(fn):
        return pipe(loss, grad()).fn(params, batch, Execution(kernel=fn, dtype=dtype))

    plain = gradients(lambda fn: fn)
    monkeypatch.setattr(attention, "on_triton", seen)
    monkeypatch.setattr(cross_entropy, "on_triton", seen)
    monkeypatch.setattr(attention, "memory_order", lambda attend: attention.BY_POSITION)
    got = gradients(lambda fn: fn)
    assert len(used) == 3  # two layers and a head
    for path, d in tree.items(plain.tree):
        other = tree.at(got.tree, path)
        error = (d.double() - other.double()).norm() / d.double().norm()
        assert error < (1e-6 if dtype == torch.float32 else 2e-2), (path, error)
    torch.testing.assert_close(
        got.metrics["loss"], plain.metrics["loss"], rtol=1e-6 if dtype == torch.float32 else 1e-3, atol=0
    )
