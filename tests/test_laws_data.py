"""Law 8: the order is a bijection, the same for any data-parallel degree, worker count and resume point."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmo_fn.data.batches import Batches, share
from olmo_fn.data.order import batches_per_epoch, indices, permutation
from olmo_fn.data.prefetch import prefetch
from olmo_fn.data.tokens import open_tokens
from olmo_fn.data.windows import Windows

sizes = st.tuples(st.integers(1, 12), st.integers(1, 300), st.integers(0, 2**40))


def law_order(order, batch_size, num_instances, seed):
    """``order`` visits no instance twice in an epoch, leaves out less than a batch, differs between epochs,
    and depends on nothing but its arguments."""
    per_epoch = batches_per_epoch(num_instances, batch_size)
    steps = range(2 * per_epoch)
    forward = [order(step, batch_size, num_instances, seed).tolist() for step in steps]
    for epoch in range(2):
        seen = [i for row in forward[epoch * per_epoch : (epoch + 1) * per_epoch] for i in row]
        assert len(seen) == len(set(seen)) == per_epoch * batch_size > num_instances - batch_size
        assert all(0 <= i < num_instances for i in seen)
    if num_instances > 50 and batch_size < num_instances // 2:
        assert forward[:per_epoch] != forward[per_epoch:]
    resumed = {step: order(step, batch_size, num_instances, seed).tolist() for step in reversed(steps)}
    assert [resumed[step] for step in steps] == forward


@settings(deadline=None)
@given(sizes)
def test_law_8_bijection_and_resume(case):
    batch_size, num_instances, seed = case
    law_order(indices, batch_size, num_instances + batch_size, seed)


@settings(deadline=None)
@given(sizes, st.integers(1, 6), st.integers(0, 10**6))
def test_law_8_data_parallel(case, world, step):
    """The ranks of any world share out the same global batch."""
    batch_size, num_instances, seed = case[0] * world, case[1] + case[0] * world, case[2]
    batch = indices(step, batch_size, num_instances, seed)
    parts = [batch[share(batch_size, rank, world)] for rank in range(world)]
    assert len({len(part) for part in parts}) == 1
    assert np.array_equal(np.stack(parts, 1).reshape(-1), batch)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 30), st.integers(1, 4))
def test_law_8_read_ahead_and_resume_point(data, batch_size, start, depth):
    """Batches do not depend on how far they are read ahead, nor on the step that reading starts at."""
    whole = [data(step)["input_ids"] for step in range(40)]
    ahead = [batch["input_ids"] for batch in prefetch(data, start, 40, depth)]
    assert all(torch.equal(a, b) for a, b in zip(ahead, whole[start:], strict=True))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("law") / "tokens.npy"
    np.arange(1000, dtype=np.uint16).tofile(path)
    return Batches(
        Windows((open_tokens(str(path), "uint16"),), 8, 1000), batch_size=7, seed=3, num_instances=120
    )


class Stateful:
    """A mutant: the order of a generator that goes on."""

    def __init__(self):
        self.generator = np.random.default_rng(0)

    def __call__(self, step, batch_size, num_instances, seed):
        return self.generator.permutation(num_instances)[:batch_size]


def without_epoch(step, batch_size, num_instances, seed):
    start = step % batches_per_epoch(num_instances, batch_size) * batch_size
    return permutation(num_instances, seed, 1)[start : start + batch_size]


def with_replacement(step, batch_size, num_instances, seed):
    return np.random.default_rng((seed, step)).integers(0, num_instances, batch_size)


def over_the_edge(step, batch_size, num_instances, seed):
    """Batches run over the end of an epoch, so an instance can be twice in one epoch's batches."""
    start = step * batch_size
    epochs = [permutation(num_instances, seed, 1 + (start + i) // num_instances) for i in range(batch_size)]
    return np.array([order[(start + i) % num_instances] for i, order in enumerate(epochs)])


@pytest.mark.parametrize("mutant", [Stateful(), without_epoch, with_replacement, over_the_edge])
def test_law_8_catches(mutant):
    law_order(indices, 7, 101, 0)
    with pytest.raises(AssertionError):
        law_order(mutant, 7, 101, 0)
