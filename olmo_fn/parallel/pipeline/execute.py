"""Run one rank's program: call the callbacks in its order, and move carries and cotangents between ranks.

A send is posted as soon as its tensor is there and a receive `AHEAD` actions before it is needed, on the channel of what is
sent and the edge it crosses (`Axis.channels`), where nothing else can be in the way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, TypeAlias

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from olmo_fn.mesh.axis import Axis
from olmo_fn.parallel.pipeline.schedule import Action
from olmo_fn.parallel.pipeline.transfers import RankProgram, Transfer

Forward: TypeAlias = Callable[[int, int, Tensor | None], Tensor | None]
Backward: TypeAlias = Callable[[int, int, Tensor | None], Tensor | None]
BackwardWeight: TypeAlias = Callable[[int, int], None]
Empty: TypeAlias = Callable[[int, int], Tensor]

NAMES = {"F": "forward", "B": "backward", "I": "backward_input", "W": "backward_weight"}


def execute(
    program: RankProgram,
    forward: Forward,
    backward: Backward | None = None,
    backward_input: Backward | None = None,
    backward_weight: BackwardWeight | None = None,
    *,
    empty: Empty,
    axis: Axis = Axis(),  # noqa: B008
) -> None:
    """Run this rank's program; every transfer has ended when it returns.

    - ``forward(chunk, microbatch, carry) -> carry``: ``carry`` is None on the first virtual stage, and what is returned on
      the last one is not used. It keeps what backward needs, and the loss.
    - ``backward(chunk, microbatch, cotangent) -> cotangent``: None comes in on the last virtual stage, and what is
      returned on the first is not used. It keeps the gradients. ``backward_input`` has the same form, ``backward_weight(chunk,
      microbatch)`` does the rest later; a program without I and W needs neither, one of forwards only no backward at all.
    - ``empty(stage, microbatch)``: a new contiguous tensor like the carry from virtual stage ``stage`` to the next, and like
      its cotangent. Both ranks must agree on shape and dtype, as nothing is sent to say so.
    - ``axis``: the pipeline's, ``connection.axes.pp``; the program must be the one of its ``index``.

    ValueError if a callback is missing that the program needs, before anything is sent; a carry that is not as ``empty``
    says is refused before it is sent.
    """
    given = {"F": forward, "B": backward, "I": backward_input, "W": backward_weight}
    callbacks: dict[str, Callable[..., Any]] = {op: callback for op, callback in given.items() if callback is not None}
    if missing := {action.op for action in program.actions} - callbacks.keys():
        raise ValueError(f"this pipeline program needs the callback {' and '.join(NAMES[op] for op in sorted(missing))}")
    if (program.ranks, program.rank) != (axis.size, axis.index):
        raise ValueError(
            f"a program for rank {program.rank} of {program.ranks} cannot run on rank {axis.index} of an axis of {axis.size}; "
            f"rank_programs(...)[axis.index] is the one that can"
        )
    received: dict[Transfer, tuple[dist.Work | None, Tensor]] = {}  # or under way, or from this rank to itself
    sending = Sending(program.sends)
    for i, action in enumerate(program.actions):
        received |= {transfer: _receive(transfer, empty, axis) for transfer in program.receives(i)}
        if action.op == "W":
            callbacks["W"](action.chunk, action.microbatch)
            continue
        wanted, value = program.incoming(action), None
        if wanted:
            work, value = received.pop(wanted)
            _wait(work)
        out = callbacks[action.op](action.chunk, action.microbatch, value)
        if transfer := program.outgoing(action):
            _check(out, transfer, action, empty)
            if transfer.source == transfer.target:
                received[transfer] = None, out.detach()
            else:
                sending.add(*_send(out.detach().contiguous(), transfer, axis))
        del value, out  # each is memory that the next action may need
        sending.let_go()
    sending.wait()
    assert not received, f"never used: {list(received)}"


class Sending:
    """Tensors that are being sent, which are kept until they have been read.

    On a processor at most ``most`` of them: the oldest is then waited for. On a GPU a wait would stop the stream that computes
    until the receiver is there, so each is asked now and then whether it is done; the schedule bounds how many there are.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.works: deque[tuple[dist.Work, Tensor]] = deque()

    def add(self, work: dist.Work | None, tensor: Tensor) -> None:
        """Keep a tensor until ``work``, which reads it, is done."""
        if work is not None:
            self.works.append((work, tensor))

    def let_go(self) -> None:
        """Drop what has been read."""
        while self.works:
            work, tensor = self.works[0]
            if not (work.is_completed() if tensor.is_cuda else len(self.works) > self.most):
                return
            if not tensor.is_cuda:
                work.wait()
            self.works.popleft()

    def wait(self) -> None:
        """Until all has been read."""
        while self.works:
            self.works.popleft()[0].wait()


def _send(tensor: Tensor, transfer: Transfer, axis: Axis) -> tuple[dist.Work | None, Tensor]:
    return dist.isend(tensor, group=_group(transfer, axis), group_dst=int(transfer.source < transfer.target)), tensor


def _receive(transfer: Transfer, empty: Empty, axis: Axis) -> tuple[dist.Work | None, Tensor]:
    tensor = empty(transfer.stage, transfer.microbatch)
    return dist.irecv(tensor, group=_group(transfer, axis), group_src=int(transfer.target < transfer.source)), tensor


def _group(transfer: Transfer, axis: Axis) -> dist.ProcessGroup:
    """The two ranks of the transfer's channel, in the order of the axis."""
    channel = axis.channels[transfer.source + (axis.size if transfer.what == "cotangent" else 0)]
    return _resolve_process_group(GroupName(channel))


def _wait(work: dist.Work | None) -> None:
    if work:
        work.wait()


def _check(out: Tensor | None, transfer: Transfer, action: Action, empty: Empty) -> None:
    like = empty(transfer.stage, transfer.microbatch)
    if out is None or out.shape != like.shape or out.dtype != like.dtype:
        found = "None" if out is None else f"{tuple(out.shape)} {out.dtype}"
        raise ValueError(
            f"the {transfer.what} of {action} on rank {transfer.source} is {found}, but stage {transfer.stage} hands on "
            f"{tuple(like.shape)} {like.dtype}"
        )
