"""The tracer sees what it says it sees, on programs small enough to count by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from traced import connected, seen

from olmo_fn.mesh.collectives import gather_into, psum
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing import FakeCuda, FakeCudaFailed, Seen, Trace
from olmo_fn.testing.fake_cuda import where

CPU, KB = torch.device("cpu"), 1024


def mixed() -> None:
    x = torch.ones(8, device="cuda")
    x + torch.ones(8)


def waits() -> None:
    x = torch.ones(256, device="cuda")
    x.to(CPU)
    x.to(CPU, non_blocking=True)
    torch.ones(256).to("cuda")
    x.copy_(torch.ones(256), non_blocking=True)
    torch.tensor(2.0, device="cuda")


def value() -> None:
    torch.ones((), device="cuda").item()


def launches() -> None:
    """Three kernels (two for x, a product) on 1 KB each, and on the CPU, which is not counted, one."""
    x = torch.ones(256, device="cuda").view(16, 16) * 2
    torch.ones(256)
    (x.t()[:8] @ x).view(-1)


def peak() -> None:
    """Four tensors of 1 KB of which two live at once; one of them as a view."""
    for _ in range(2):
        x = torch.empty(256, device="cuda").view(16, 16)
        y = torch.empty(256, device="cuda")
        del x, y


def resized() -> None:
    """A storage that is given back makes room for the next."""
    x = torch.empty(256, device="cuda")
    x.untyped_storage().resize_(0)
    y = torch.empty(256, device="cuda")
    x.untyped_storage().resize_(KB)
    del y


def gelu(scale: float, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.tanh(x) * x * scale, y + 1


def compiled() -> Seen:
    """A stage forward and backward, and a kernel: a call each, their insides no launches, and memory that nobody sees."""
    with FakeTensorMode(), Trace() as trace:
        x = torch.empty(256, device="cuda", requires_grad=True)
        y = torch.empty(256, device="cuda")
        out, more = trace.stage(gelu, 2.0)(x, y)
        assert more.requires_grad is False or more.shape == y.shape
        (g,) = torch.autograd.grad(out, x, y)
        trace.kernel(torch.tanh)(g)
    return trace.seen


def gathers(mesh: Mesh) -> Seen:
    """A gather that something is computed beside, and a sum that is waited for at once."""
    axis = connected(mesh).axes.dp_shard
    with FakeTensorMode(), Trace() as trace:
        x = torch.empty(256, device="cuda")
        pending = gather_into(torch.empty(512, device="cuda"), x, 2, axis.group)
        x * 2
        torch.ops._c10d_functional.wait_tensor(pending)
        psum(x, axis)
    return trace.seen


def test_autograd_runs_on_the_device_that_is_not_there(fake_cuda: FakeCuda):
    assert fake_cuda.run(where) == "cuda:0"


def test_mixed_devices_are_named_with_their_place(fake_cuda: FakeCuda):
    with pytest.raises(
        FakeCudaFailed, match=r"DeviceMismatch: test_trace.py:\d+: aten.add.Tensor gets tensors on cpu and cuda:0"
    ):
        fake_cuda.run(seen, mixed)


def test_a_value_that_the_host_asks_for_is_named_with_its_place(fake_cuda: FakeCuda):
    with pytest.raises(FakeCudaFailed, match=r"test_trace.py:\d+: aten._local_scalar_dense.default asks a fake tensor"):
        fake_cuda.run(seen, value)


def test_copies_that_block_are_synchronisations(fake_cuda: FakeCuda):
    found = fake_cuda.run(seen, waits).syncs
    first = waits.__code__.co_firstlineno
    assert found == {f"aten::_to_copy test_trace.py:{first + line}": 1 for line in (2, 4, 6)}


def test_views_and_the_cpu_launch_nothing(fake_cuda: FakeCuda):
    found = fake_cuda.run(seen, launches)
    assert found.launches == {"aten::ones": 1, "aten::mul": 1, "aten::mm": 1}
    assert found.moved == KB + 2 * KB + (KB // 2 + KB + KB // 2)  # the product reads half of x and all of it


def test_what_lives_at_the_peak(fake_cuda: FakeCuda):
    assert fake_cuda.run(seen, peak).peak == 2 * KB
    assert fake_cuda.run(seen, resized).peak == 2 * KB


def test_compiled_functions_are_one_call_each_way(fake_cuda: FakeCuda):
    found = fake_cuda.run(compiled)
    assert found.calls == {"gelu": 1, "gelu backward": 1, "tanh": 1}
    assert not found.launches
    assert found.peak == 6 * KB  # x, y, two results, a gradient, and the kernel's


def test_collectives_that_are_waited_for_at_once(fake_cuda: FakeCuda):
    found = fake_cuda.run(gathers, Mesh(dp_shard=2))
    assert found.collectives == {"all_gather_into_tensor_out": 1, "all_reduce": 1}
    assert [name.split(":")[0] for name in found.waited] == ["all_reduce test_trace.py"]


@pytest.mark.slow  # starts a process
def test_the_process_dies_with_its_reason(fake_cuda: FakeCuda):
    with FakeCuda() as other, pytest.raises(FakeCudaFailed, match="exit code 3"):
        other.run(exit_now)
    assert fake_cuda.run(where) == "cuda:0"  # the other lives


def exit_now() -> None:
    import os

    os._exit(3)
