"""Where the documents of packed sequences begin, as kernels for sequences of different lengths want to know it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("doc_starts", "doc_longest")  # in a batch


@dataclass(frozen=True, eq=False)
class Packing:
    """Documents packed into sequences of T tokens: ``starts`` (B, n) int32, in each row where its documents begin and then,
    as often as needed, T; and a length that none of them exceeds.

    Both n and ``longest`` are powers of two, or T, so that few shapes are seen. A launch needs ``longest`` as a number: it is
    known before a step, and the device is not waited for.
    """

    starts: Tensor
    longest: int
    _known: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def of(cls, documents: Tensor) -> Packing:
        """Of the first positions (B, T) of each position's document. Waits for the device, if they are not on a CPU.

        >>> Packing.of(torch.tensor([[0, 0, 2, 2, 2], [0, 0, 0, 0, 0]]))
        Packing(starts=tensor([[0, 2],
                [0, 5]], dtype=torch.int32), longest=5)
        """
        B, T = documents.shape
        index = torch.arange(T, device=documents.device).expand(B, T)
        first = documents == index
        most, longest = torch.stack((first.sum(1).max(), (index - documents).max() + 1)).tolist()
        n = min(_power_of_two(most), T)
        starts = torch.full((B, n + 1), T, dtype=torch.int32, device=documents.device)
        place = torch.where(first, first.cumsum(1) - 1, n)  # those that begin no document go behind the others
        starts.scatter_(1, place, documents.to(torch.int32))
        return cls(starts[:, :n].contiguous(), min(_power_of_two(longest), T))

    @classmethod
    def in_batch(cls, batch: Mapping[str, Tensor]) -> Packing | None:
        """That which `to_batch` put into a batch, or part of its rows."""
        return cls(batch["doc_starts"], batch["doc_longest"].shape[1]) if "doc_starts" in batch else None

    def to_batch(self) -> dict[str, Tensor]:
        """As tensors that are split by rows and moved as all of a batch are: ``longest`` is the size of one without entries.

        >>> packing = Packing(torch.zeros(4, 1, dtype=torch.int32), 512)
        >>> Packing.in_batch({name: x[:2] for name, x in packing.to_batch().items()}).longest
        512
        """
        return dict(zip(NAMES, (self.starts, self.starts.new_empty(len(self.starts), self.longest, 0)), strict=True))

    def cumulative(self, start: int, length: int) -> Tensor:
        """Cumulative lengths (B n + 1,) int32 of the documents' parts among ``length`` positions from ``start`` on, which of
        all sequences lie one after the other. Every document is counted, also those that have no part there.

        All layers ask for the same: it is computed once.

        >>> Packing(torch.tensor([[0, 2, 5]], dtype=torch.int32), 3).cumulative(1, 4)
        tensor([0, 1, 4, 4], dtype=torch.int32)
        """
        if (start, length) not in self._known:
            self._known[start, length] = self._cumulative(start, length)
        return self._known[start, length]

    def _cumulative(self, start: int, length: int) -> Tensor:
        B = len(self.starts)
        rows = torch.arange(0, B * length, length, dtype=torch.int32, device=self.starts.device)
        local = (self.starts - start).clamp_(0, length).add_(rows[:, None]).flatten()
        return torch.cat((local, local.new_full((1,), B * length)))


def _power_of_two(n: int) -> int:
    """The next power of two.

    >>> [_power_of_two(n) for n in (1, 2, 3, 5)]
    [1, 2, 4, 8]
    """
    return 1 << (n - 1).bit_length()
