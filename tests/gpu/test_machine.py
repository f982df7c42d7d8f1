"""Which GPU a process takes, and what it is told where it can take none: the surroundings, not the device, are made up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from traced import connected

from olmo_fn.core import compile as compiling
from olmo_fn.launch import process as processes
from olmo_fn.launch.place import Place
from olmo_fn.launch.process import Process, init_process_group
from olmo_fn.mesh.connect import backend_of
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.testing import FakeCuda
from olmo_fn.train import machine


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What is asked of CUDA, in order; there are eight GPUs."""
    asked: list[object] = []
    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "set_device", asked.append)
    monkeypatch.setattr(torch, "empty", lambda *size, device: asked.append(f"empty {device}") or empty(*size))
    return asked


def test_a_process_takes_its_gpu_before_it_touches_any(gpus: list[object]):
    device = machine.pick_device("auto", Place(rank=11, size=16, local_rank=3, local_size=8))
    assert device == torch.device("cuda", 3)
    assert gpus == [device, "empty cuda:3"]


def test_a_process_that_sees_one_gpu_takes_it(gpus: list[object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert machine.pick_device("cuda", Place(3, 4, 3, 4)) == torch.device("cuda", 0)


def test_more_processes_than_gpus_are_refused(gpus: list[object], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="8 processes on this machine for 4 GPUs: start one for each, --nproc 4"):
        machine.pick_device("cuda", Place(0, 8, 0, 8))


def test_a_process_alone_takes_the_usual_one(gpus: list[object]):
    assert machine.pick_device("auto") == torch.device("cuda")
    assert gpus == ["empty cuda"]


@pytest.fixture
def old_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """torch for CUDA, a GPU, and a driver that is too old."""

    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver")

    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(machine, "DEVICES", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.usefixtures("old_driver")
def test_a_driver_that_is_too_old_is_said_in_one_line():
    with pytest.raises(ValueError, match=r"there is a GPU that torch .* for CUDA 13\.0 cannot use \(The NVIDIA driver"):
        machine.pick_device("auto")
    assert machine.pick_device("cpu").type == "cpu"


@pytest.mark.usefixtures("old_driver")
@pytest.mark.parametrize("change", ["hidden", "no GPU", "torch for the CPU"])
def test_the_cpu_is_taken_where_no_gpu_is_meant(change: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    if change == "hidden":
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    elif change == "no GPU":
        (tmp_path / "nvidia0").unlink()
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    assert machine.pick_device("auto").type == "cpu"


def test_what_triton_compiles_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compiling.lacking() == "no C compiler found"
    (tmp_path / "clang").write_text("#!/bin/sh\n")
    (tmp_path / "clang").chmod(0o755)
    monkeypatch.setattr(compiling.sysconfig, "get_path", lambda name: str(tmp_path))
    assert compiling.lacking().startswith(f"{tmp_path}/Python.h is not there")
    (tmp_path / "Python.h").touch()
    assert compiling.lacking() == ""
    monkeypatch.setenv("CC", "nowhere")
    assert compiling.lacking() == "$CC is 'nowhere', which is no program"


def test_recompilations_are_not_limited_by_older_versions(monkeypatch: pytest.MonkeyPatch):
    assert compiling.isolated() == {"isolate_recompiles": True}
    monkeypatch.setattr(torch, "compile", lambda model, *, fullgraph: model)
    with torch._dynamo.config.patch(recompile_limit=8):  # monkeypatch would delete what is not set by itself
        assert compiling.isolated() == {}
        assert torch._dynamo.config.recompile_limit == 64


def test_nccl_connects_a_job_at_once(monkeypatch: pytest.MonkeyPatch):
    given: dict[str, object] = {}
    monkeypatch.setattr(processes.dist, "init_process_group", lambda backend, **more: given.update(more, backend=backend))
    process = Process(3, 8, 3, dist.HashStore())
    init_process_group(process, torch.device("cuda", 3))
    assert (given["backend"], given["device_id"]) == ("cpu:gloo,cuda:nccl", torch.device("cuda", 3))
    init_process_group(process)
    assert (given["backend"], given["device_id"]) == ("gloo", None)


def backends(mesh: Mesh) -> list[str | None]:
    connected(mesh)
    return [backend_of("cuda"), backend_of("cpu")]


def test_groups_on_gpus_have_the_backend_of_gpus_alone(fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch):
    assert fake_cuda.run(backends, Mesh(dp_shard=2)) == ["fake", None]
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")
    assert (backend_of("cuda"), backend_of("cpu")) == ("nccl", None)
