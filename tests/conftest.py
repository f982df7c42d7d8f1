"""One thread a test process: for tensors of the tests' size more are slower, above all on a busy machine."""

import pytest
import torch

from olmo_fn.testing import Pool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool():
    """Real processes connected by gloo, started when first asked for and kept: see `olmo_fn.testing.Pool`."""
    with Pool() as processes:
        yield processes
