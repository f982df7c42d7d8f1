"""A step's metrics on their way from the device to numbers, which never stops the device; and the speed of the steps."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist

from olmo_fn.core.chain import Metrics
from olmo_fn.data.sizes import Sizes
from olmo_fn.models.config import Model
from olmo_fn.models.count import flops_per_token
from olmo_fn.train import machine
from olmo_fn.train.process import ProcessContext


class Moment:
    """Now; on a GPU, when it gets to what it is told next."""

    def __init__(self, device: torch.device) -> None:
        self.time = time.perf_counter()
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        """Until it has come."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, before: Moment) -> float:
        """Time between two moments that have come."""
        if self.event and before.event:
            return before.event.elapsed_time(self.event) / 1e3
        return self.time - before.time


def agrees(step: int, device: torch.device) -> bool:
    """Whether the processes of a job compare their ``stop`` after this step: all, or every fourth on a GPU, whose host is to
    be ahead of it.
    """
    return device.type != "cuda" or step % 4 == 0


class InFlight:
    """The metrics of step ``step`` and the largest ``stop`` of all processes, on their way: making it waits for nothing.

    On a GPU they are copied to pinned memory behind the step. The processes' ``stop`` are compared by the hosts, in the
    background: by gloo, whatever the device is, so that no stream of a GPU waits for a process. 0 of steps where they are not.
    """

    def __init__(self, step: int, metrics: Metrics, stop: int, context: ProcessContext) -> None:
        self.step, self._names, device = step, tuple(metrics), context.device
        self._code, self._reduced = torch.tensor(stop, dtype=torch.int32), None
        if context.connection and agrees(step, device):
            self._reduced = dist.all_reduce(self._code, dist.ReduceOp.MAX, async_op=True)
        elif context.connection:
            self._code.zero_()
        values = [value.detach().to(device, torch.float64) for value in metrics.values()]
        self._counts = [value.numel() if value.ndim else 0 for value in values]
        packed = torch.cat([value.reshape(-1) for value in values])
        self._packed = packed.to("cpu", non_blocking=True)
        self.done = Moment(device)

    def arrive(self) -> tuple[dict[str, Any], int]:
        """The metrics as numbers, or lists of them, and the largest ``stop``; waits until they are here."""
        self.done.wait()
        if self._reduced:
            self._reduced.wait()
        numbers = iter(self._packed.tolist())
        values = {
            name: list(islice(numbers, count)) if count else next(numbers)
            for name, count in zip(self._names, self._counts, strict=True)
        }
        return values, int(self._code)


@dataclass
class Meter:
    """Adds to a step's metrics the tokens so far, the speed since the step before, and the memory.

    ``flops_per_second``: of a matrix product on all devices together; the first step's metrics have it as
    ``gemm_flops_per_s``. ``mfu`` is measured against ``peak``, their makers' figure for them, and ``of_gemm`` against that
    product; where the makers' figure is not known (0), ``mfu`` is against the product. An MFU above 1 says that it was measured
    on a busy machine, and is left out.
    """

    model: Model
    sizes: Sizes
    device: torch.device
    flops_per_second: float
    before: Moment
    first: bool = True
    peak: float = 0.0

    def metrics(self, step: int, values: dict[str, Any], done: Moment) -> dict[str, Any]:
        """All metrics of step ``step``, which was ``done`` then."""
        seconds, self.before = done.seconds_since(self.before), done
        tokens = self.sizes.tokens_before(step)
        speed = (tokens - self.sizes.tokens_before(step - 1)) / seconds
        flops = speed * flops_per_token(self.model, self.sizes.at(step - 1).sequence_length)
        mfu = flops / (self.peak or self.flops_per_second)
        rate, self.first = {"gemm_flops_per_s": self.flops_per_second} if self.first else {}, False
        return {
            "step": step,
            **values,
            "tokens": tokens,
            "seconds": round(seconds, 4),
            "tokens_per_s": round(speed, 1),
            **({"mfu": round(mfu, 4)} if mfu <= 1 else {}),
            **({"of_gemm": round(flops / self.flops_per_second, 4)} if self.peak else {}),
            "peak_mb": round(machine.peak_memory(self.device) / 1e6, 1),
            **rate,
        }
