"""Carry a plan out: call the callbacks in its order, and move carries and cotangents between ranks with torch.distributed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from collections.abc import Set as AbstractSet
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from olmo_fn.mesh.axis import Axis
from olmo_fn.parallel.pipeline.communicate import Exchange, Plan, Transfer

Forward: TypeAlias = Callable[[int, int, Tensor | None], Tensor | None]
Backward: TypeAlias = Callable[[int, int, Tensor | None], Tensor | None]
BackwardWeight: TypeAlias = Callable[[int, int], None]
Empty: TypeAlias = Callable[[int, int], Tensor]

SENDS = 2  # exchanges whose sends may be under way before the oldest is waited for


def execute(
    plan: Plan,
    forward: Forward,
    backward: Backward | None = None,
    backward_input: Backward | None = None,
    backward_weight: BackwardWeight | None = None,
    *,
    empty: Empty,
    axis: Axis = Axis(),  # noqa: B008
) -> None:
    """Run this rank's plan; every transfer has ended when it returns.

    - ``forward(chunk, microbatch, carry) -> carry``: ``carry`` is None on the first virtual stage, and what is returned on
      the last one is not used. It keeps what backward needs, and the loss.
    - ``backward(chunk, microbatch, cotangent) -> cotangent``: None comes in on the last virtual stage, and what is
      returned on the first is not used. It keeps the gradients. ``backward_input`` has the same form, ``backward_weight(chunk,
      microbatch)`` does the rest later; a plan without I and W needs neither, one of forwards only no backward at all.
    - ``empty(stage, microbatch)``: a new contiguous tensor like the carry from virtual stage ``stage`` to the next, and like
      its cotangent. Both ranks must agree on shape and dtype, as nothing is sent to say so.
    - ``axis``: the pipeline's, ``connection.axes.pp``; the plan must be the one of its ``index``.

    ValueError if a callback is missing that the plan needs, before anything is sent; a carry that is not as ``empty``
    says is refused before it is sent.
    """
    given = {"F": forward, "B": backward, "I": backward_input, "W": backward_weight}
    callbacks: dict[str, Callable[..., Any]] = {op: callback for op, callback in given.items() if callback is not None}
    _check(plan, callbacks.keys(), axis)
    group = _resolve_process_group(GroupName(axis.group)) if axis.size > 1 else None
    arrived: dict[Transfer, tuple[_Works, Tensor]] = {}  # received or, within a rank, produced
    produced: dict[Transfer, Tensor] = {}  # not posted yet
    sending: deque[tuple[_Works, list[Tensor]]] = deque()  # memory that is being read
    for step in plan.steps:
        if isinstance(step, Exchange):
            works, sent = _post(step, plan.rank, produced, arrived, empty, group)
            if sent:
                sending.append((works, sent))
            if len(sending) > SENDS:
                sending.popleft()[0].wait()
            continue
        if step.op == "W":
            callbacks["W"](step.chunk, step.microbatch)
            continue
        value = None
        if wanted := plan.incoming(step):
            works, value = arrived.pop(wanted)
            works.wait()
        out = callbacks[step.op](step.chunk, step.microbatch, value)
        del value
        if sent_on := plan.outgoing(step):
            like = empty(sent_on.stage, sent_on.microbatch)
            if out is None or out.shape != like.shape or out.dtype != like.dtype:
                found = "None" if out is None else f"{tuple(out.shape)} {out.dtype}"
                raise ValueError(
                    f"the {sent_on.what} of {step} on rank {plan.rank} is {found}, but stage {sent_on.stage} hands on "
                    f"{tuple(like.shape)} {like.dtype}"
                )
            if sent_on.source == sent_on.target:
                arrived[sent_on] = _Works([]), out.detach()
            else:
                produced[sent_on] = out.detach().contiguous()
    while sending:
        sending.popleft()[0].wait()
    assert not arrived, f"never used: {list(arrived)}"
    assert not produced, f"never sent: {list(produced)}"


class _Works:
    """The transfers of one exchange; waiting a second time is free."""

    def __init__(self, works: list[dist.Work]) -> None:
        self.works = works

    def wait(self) -> None:
        while self.works:
            self.works.pop(0).wait()


def _post(
    exchange: Exchange,
    rank: int,
    produced: dict[Transfer, Tensor],
    arrived: dict[Transfer, tuple[_Works, Tensor]],
    empty: Empty,
    group: dist.ProcessGroup | None,
) -> tuple[_Works, list[Tensor]]:
    """Begin the transfers of an exchange in one batch; returns what to wait for and the tensors that are being sent."""
    operations, sent, works = [], [], _Works([])
    for transfer in exchange.transfers:
        if transfer.source == rank:
            tensor = produced.pop(transfer)
            sent.append(tensor)
            operations.append(dist.P2POp(dist.isend, tensor, group=group, group_peer=transfer.target))
        else:
            tensor = empty(transfer.stage, transfer.microbatch)
            arrived[transfer] = works, tensor
            operations.append(dist.P2POp(dist.irecv, tensor, group=group, group_peer=transfer.source))
    works.works = dist.batch_isend_irecv(operations)
    return works, sent


def _check(plan: Plan, given: AbstractSet[str], axis: Axis) -> None:
    missing = {step.op for step in plan.steps if not isinstance(step, Exchange)} - given
    if missing:
        names = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}
        raise ValueError(f"this pipeline plan needs the callback {' and '.join(names[op] for op in sorted(missing))}")
    if (plan.ranks, plan.rank) != (axis.size, axis.index):
        raise ValueError(
            f"a plan for rank {plan.rank} of {plan.ranks} cannot run on rank {axis.index} of an axis of {axis.size}; "
            f"plan(programs)[axis.index] is the one that can"
        )
