"""What a run does between its steps on a GPU: batches, metrics, the state of ranks; without a GPU, so that nothing is timed."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from traced import connected

from olmo_fn import tree
from olmo_fn.core.pipe import donate, grad, pipe
from olmo_fn.data.prefetch import arriving
from olmo_fn.mesh.mesh import Mesh
from olmo_fn.models import transformer
from olmo_fn.models.config import dense
from olmo_fn.optim import adamw
from olmo_fn.parallel.shard import shard
from olmo_fn.testing import FakeCuda, Trace
from olmo_fn.train.meter import InFlight
from olmo_fn.train.process import ProcessContext

CUDA = torch.device("cuda", 0)
MODEL = dense(64, 2, 4, 96, vocab_size=128)


def batches() -> list[str]:
    """What happens to three batches, in order; torch's streams and events are stand-ins that write it down."""
    happened = []

    class Stream:
        device = CUDA

        def __init__(self, device):
            self.name = "copies"

        def record_event(self):
            happened.append(f"event on {self.name}")
            return "event"

        def wait_event(self, event):
            happened.append(f"{self.name} waits for the {event}")

    main = Stream(CUDA)
    main.name = "steps"
    switched = threading.local()

    @contextmanager
    def stream(which):
        switched.on = which
        yield
        switched.on = None

    def pinned(x: Tensor) -> Tensor:
        assert switched.on.name == "copies"
        happened.append("pinned")
        return x

    stand_ins = [
        patch.multiple(torch.cuda, Stream=Stream, stream=stream, current_stream=lambda device: main),
        patch.object(Tensor, "pin_memory", pinned),
        patch.object(Tensor, "record_stream", lambda x, which: happened.append(f"kept for {which.name}")),
    ]
    mode = FakeTensorMode()

    def data(step):
        with mode:
            return {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "labels": torch.zeros(2, 4, dtype=torch.int64)}

    with stand_ins[0], stand_ins[1], stand_ins[2], mode, Trace() as trace:
        for batch in arriving(data, 0, 1, CUDA):
            assert {x.device for x in batch.values()} == {CUDA}
            happened.append("step")
    assert not trace.seen.syncs
    return happened


def test_batches_travel_on_a_stream_of_their_own(fake_cuda: FakeCuda):
    sent = ["pinned", "pinned", "event on copies"]
    received = ["steps waits for the event", "kept for steps", "kept for steps", "step"]
    assert fake_cuda.run(batches) == sent + received


def metrics() -> list[str]:
    """Making `InFlight` waits for nothing; its numbers come by one copy."""
    event = SimpleNamespace(record=lambda stream: None, synchronize=lambda: None)
    with patch.object(torch.cuda, "Event", lambda **options: event), FakeTensorMode(), Trace() as trace:
        values = {"loss": torch.ones((), device=CUDA), "n": torch.ones((), dtype=torch.int64, device=CUDA)}
        flying = InFlight(3, values | {"load": torch.ones(8, device=CUDA)}, 0, ProcessContext(CUDA))
        assert flying._packed.device.type == "cpu"
        assert flying._packed.shape == (10,)
    assert not trace.seen.syncs
    return [name for name, n in trace.seen.launches.items() for _ in range(n)]


def test_metrics_leave_by_one_copy(fake_cuda: FakeCuda):
    launched = fake_cuda.run(metrics)
    assert launched.count("aten::cat") == 1
    assert launched.count("aten::_to_copy") == 4  # to fp64 each, and to the host together


def wrapped(given_back: bool) -> tuple[int, int]:
    """How many leaves of a donated state are the very DTensors that they were, and how many there are."""
    connection = connected(Mesh(dp_shard=4))
    specs = transformer.specs(MODEL)
    step = pipe(transformer.loss(MODEL), grad(), adamw(1e-3), shard(connection, specs), *([donate()] if given_back else []))
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = step.execution.layout.placement.make(lambda path, spec, box: torch.empty(box.shape))
        state = step.init(params)
        before = dict(tree.items(state._asdict()))
        ids = torch.zeros(4, 16, dtype=torch.int64, device="cuda")
        state, _ = step(state, {"input_ids": ids, "labels": ids})
    leaves = {path: leaf for path, leaf in tree.items(state._asdict()) if isinstance(leaf, DTensor)}
    return sum(leaf is before[path] for path, leaf in leaves.items()), len(leaves)


@pytest.mark.parametrize("given_back", [True, False])
def test_the_state_stays_wrapped(fake_cuda: FakeCuda, given_back: bool):
    same, leaves = fake_cuda.run(wrapped, given_back)
    assert leaves == 3 * len(tree.flatten(transformer.specs(MODEL)))
    assert same == (leaves if given_back else 0)
