"""What a rank of the pool measures of one real step, for tests/planner/test_plan.py."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from olmo_fn import tree
from olmo_fn.core.layout import SINGLE
from olmo_fn.core.offload import HostStash, Link, copy_beside, pinned
from olmo_fn.core.pipe import with_execution
from olmo_fn.spec import init
from olmo_fn.testing.traffic import Traffic
from olmo_fn.train.recipe import parameters, recipe


class Peak(TorchDispatchMode):
    """The most bytes that live at once in storages made under it; nothing of `olmo_fn.planner` is used."""

    def __init__(self, others):
        super().__init__()
        self.others = {x.untyped_storage() for x in others}
        self.storages, self.bytes = weakref.WeakSet(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage() not in self.others:
                self.storages.add(x.untyped_storage())
        self.bytes = max(self.bytes, sum(storage.nbytes() for storage in self.storages))
        return out


def batch_of(cfg):
    shape = (cfg.recipe.batch_size, cfg.recipe.sequence_length)
    ids = torch.randint(cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def measure(step, cfg, state, layout):
    """Bytes at the largest moment of a step, state included."""
    leaves = [x for slot in (state.params, state.slots) for _, x in tree.items(layout.placement.to_local(slot))]
    batch = layout.sharing.as_given(batch_of(cfg))
    with Peak([*leaves, *batch.values()]) as peak:
        step(state, batch)
    return peak.bytes + sum(x.nbytes for x in leaves)


def unseen(run):
    """What happens on the host, no mode sees."""

    def apart(*args):
        with _disable_current_modes():
            return run(*args)

    return apart


def single_peak(cfg, dtype):
    step = recipe(cfg, dtype)
    if cfg.recipe.offload:
        step = with_execution(step, stash=lambda: HostStash(Link(unseen(pinned), unseen(copy_beside))))
    return measure(step, cfg, step.init(init(parameters(cfg), 0)), SINGLE)


def sharded_step(connection, cfg, dtype):
    step = recipe(cfg, dtype, connection)
    return step, step.init(step.execution.layout.placement.init(0))


def rank_step(connection, cfg, dtype):
    """Of one step: (axis, kind) -> (count, bytes), and the bytes at its largest moment."""
    step, state = sharded_step(connection, cfg, dtype)
    with Traffic(connection.axes) as traffic:
        peak = measure(step, cfg, state, step.execution.layout)
    return {(axis, kind): (moved.calls, moved.whole) for (kind, axis), moved in traffic.moved.items()}, peak
