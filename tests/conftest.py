"""What all tests share: one thread a process, profiles of hypothesis, and real ranks.

For tensors of the tests' size more threads are slower, above all on a busy machine.
"""

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that tests start, too; torch reads it when it is imported

import pytest
import torch
from hypothesis import settings

from olmo_fn.testing import FakeCuda, Pool

torch.set_num_threads(1)

settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.register_profile("nightly", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "dev"))


@pytest.hookimpl(tryfirst=True)  # xdist's own hook, which reads the groups, must come after it
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """One of xdist's workers has all tests on real ranks, so that there are eight of these and not eight a worker; one has all
    that are traced in a process with a fake GPU. Tests that need a GPU are skipped where there is none.
    """
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU, and torch finds none"))
        for fixture, group in (("pool", "ranks"), ("fake_cuda", "fake_cuda")):
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session")
def pool():
    """Real processes connected by gloo, started when first asked for and kept: see `olmo_fn.testing.Pool`."""
    with Pool() as processes:
        yield processes


@pytest.fixture(scope="session")
def fake_cuda():
    """A process with a GPU that is not there, started when first asked for and kept: see `olmo_fn.testing.FakeCuda`."""
    if torch.version.cuda:
        pytest.skip("a GPU is emulated where torch has none: this is a build for CUDA")
    if not shutil.which(os.environ.get("CXX", "g++")):
        pytest.skip("the emulated GPU is built with a C++ compiler, and there is none")
    with FakeCuda() as process:
        yield process


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Each device that there may be: for laws that hold on all of them."""
    return torch.device(request.param)
