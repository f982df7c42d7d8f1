"""What a step keeps and how it makes the head's gradients, on CUDA: launches, bytes, waiting, and numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from traced import seen, traced_step

from olmo_fn.core.chain import Backend
from olmo_fn.core.primitive import primitive
from olmo_fn.models.config import dense
from olmo_fn.nn.context import Context
from olmo_fn.nn.cross_entropy import CUDA_LOGITS_ROWS, cross_entropy
from olmo_fn.testing import FakeCuda, Seen
from olmo_fn.train.config import Config, Recipe, Run

MODEL = dense(256, 3, 2, 512, vocab_size=512)


def stepped(process: FakeCuda, remat: str, offload: bool = False) -> Seen:
    recipe = Recipe(batch_size=8, sequence_length=256, remat=remat, offload=offload, skip_sigma=0.0)
    return process.run(traced_step, Config(MODEL, recipe=recipe, run=Run(steps=5000)))


def attended(found: Seen) -> int:
    """How often attention's forward was launched."""
    return sum(n for name, n in found.launches.items() if "attention" in name and "backward" not in name)


def test_remat_on_cuda(fake_cuda: FakeCuda):
    """Attention is launched as often as with nothing rematerialised, and offloading launches copies that nobody waits for."""
    none, selective, full = (stepped(fake_cuda, remat) for remat in ("none", "selective", "full"))
    assert [attended(one) for one in (none, selective, full)] == [MODEL.n_layers, MODEL.n_layers, 2 * MODEL.n_layers]
    assert none.launches["aten::mm"] < selective.launches["aten::mm"] == full.launches["aten::mm"]
    assert full.peak < selective.peak < none.peak
    for remat, each in (("full", 1), ("selective", 2)):
        plain, away = stepped(fake_cuda, remat), stepped(fake_cuda, remat, offload=True)
        copies = (2 * MODEL.n_layers - 1) * each  # the last block's stays where it is
        assert away.launches - plain.launches == {"aten::copy_": copies}
        assert away.syncs == plain.syncs


# --- the head ---------------------------------------------------------------------------------------------------------


def head(N: int, V: int, D: int, dtype: torch.dtype, device: str, weight: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """The loss of N positions, and its gradients."""
    labels = (torch.arange(N, device=device) % V)[None]
    backend = Backend(primitive=primitive, loss_weight=torch.full((), 1 / N, device=device))
    w, x = (y.to(device).requires_grad_() for y in (weight, h.to(dtype)))
    loss, _ = cross_entropy(Context(backend, labels, labels, labels), w, x, labels, V, z_loss=1e-3)
    return loss.detach(), *torch.autograd.grad(loss, [w, x], backend.loss_weight)


def large_head(N: int) -> None:
    V, D = 100_352, 4096
    head(N, V, D, torch.bfloat16, "cuda", torch.empty(V, D, device="cuda"), torch.empty(1, N, D, device="cuda"))


@pytest.mark.parametrize(("N", "chunks"), [(2048, 1), (8192, 2), (20_000, 4)])
def test_the_products_add_up_in_fp32(fake_cuda: FakeCuda, N: int, chunks: int):
    """For each chunk three products, of which the weight's adds to the sum of those before."""
    found = fake_cuda.run(seen, large_head, N)
    assert (found.launches["aten::mm"], found.launches["aten::addmm"]) == (2 * chunks + 1, chunks - 1)
    assert not found.syncs


def on_both(N: int, V: int, D: int) -> list[float]:
    """How far bf16 gradients are from fp64 ones: of the emulated device, whose sums are fp32, and of the CPU."""
    products(torch.library.Library("aten", "IMPL"))
    weight, h = torch.randn(V, D), torch.randn(1, N, D).bfloat16()
    exact, *others = (
        head(N, V, D, dtype, device, weight.to(w), h)
        for dtype, device, w in (
            (torch.float64, "cpu", torch.float64),
            (torch.bfloat16, "cuda", torch.float32),
            (torch.bfloat16, "cpu", torch.float32),
        )
    )
    return [float((x.cpu().double() - e).norm() / e.norm()) for found in others for x, e in zip(found, exact, strict=True)]


def products(library: torch.library.Library) -> None:
    """What only CUDA has: products of bf16 whose sums are fp32."""
    on_both.library = library  # it ends with its object

    def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype) -> Tensor:
        return a.to(out_dtype) @ b.to(out_dtype)

    def addmm(total: Tensor, a: Tensor, b: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1, out: Tensor) -> Tensor:
        return out.copy_(total + mm(a, b, out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")


def test_numbers_of_many_chunks(fake_cuda: FakeCuda):
    """Two chunks and a bit: as near to the exact gradients as the CPU's, or nearer."""
    loss, d_w, d_h, *cpu = fake_cuda.run(on_both, 2 * CUDA_LOGITS_ROWS[1] + 100, 64, 16)
    assert loss <= 1.01 * cpu[0] + 1e-6
    assert d_w <= 1.01 * cpu[1]
    assert d_h <= 1.01 * cpu[2]
