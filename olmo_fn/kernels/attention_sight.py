"""Which keys a query sees, and so which tiles of attention there are to compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from olmo_fn.kernels.packing import Packing

FAR = 1e30  # taken from a score for each position out of sight: finite, so that a row that sees nothing has no NaN
TILE = 128  # rows or columns of a tile: its scores stay in the processor's cache between two products


class Tile(NamedTuple):
    """Some rows of queries and columns of keys, of some sequences of the batch."""

    batch: slice
    rows: slice
    columns: slice


class Sight(NamedTuple):
    """Who sees whom, of queries for the positions from ``offset`` on and keys for those from ``key_offset`` on.

    A position sees itself and those before it: at most ``window`` in all, and with ``documents`` (B, T), from
    `olmo_fn.kernels.attention.document_starts` and of all positions, those of its own document.

    Tiles are what is computed. In them are the keys that some query of the tile sees, so the work follows the window and the
    documents' lengths; as each sequence has other documents, there are tiles for each. That is on a CPU, where reading the
    documents waits for nothing; on other devices tiles are as wide as without documents.
    """

    window: int | None = None
    documents: Tensor | None = None
    offset: int = 0
    key_offset: int = 0
    packing: Packing | None = None
    """The same documents, for kernels that take lengths; None: made from ``documents`` where it is needed."""

    def row_tiles(self, B: int, R: int, T: int) -> Iterator[Tile]:
        """Every `TILE` of R rows that sees some of T columns, with those; the last rows first.

        >>> [(t.rows.start, t.columns.start, t.columns.stop) for t in Sight(window=100).row_tiles(1, 300, 300)]
        [(256, 157, 300), (128, 29, 256), (0, 0, 128)]
        """
        starts, shift = range(0, R, TILE), self.offset - self.key_offset
        begins = [[0] * len(starts)]
        if self._on_host is not None:  # in a tile the first row's document begins first
            begins = (self._on_host[:, self.offset : self.offset + R : TILE] - self.key_offset).tolist()
        for batch, firsts in zip(self._parts(B), begins, strict=True):
            for start, first in zip(reversed(starts), reversed(firsts), strict=True):
                stop = min(start + TILE, R)
                oldest = 0 if self.window is None else start + shift - self.window + 1
                columns = slice(max(0, first, oldest), min(T, stop + shift))
                if columns.start < columns.stop:
                    yield Tile(batch, slice(start, stop), columns)

    def column_tiles(self, B: int, R: int, T: int) -> Iterator[Tile]:
        """Every `TILE` of T columns that some of R rows see, with those."""
        starts, shift = range(0, T, TILE), self.offset - self.key_offset
        stops = [min(start + TILE, T) for start in starts]
        ends = [[R] * len(starts)]
        if self._on_host is not None:  # behind the last row whose document begins before the tile ends
            begins = self._on_host[:, self.offset : self.offset + R].contiguous()
            ends = torch.searchsorted(begins, torch.tensor([stops] * len(begins)) + self.key_offset).tolist()
        for batch, lasts in zip(self._parts(B), ends, strict=True):
            for start, stop, last in zip(starts, stops, lasts, strict=True):
                newest = R if self.window is None else stop - 1 - shift + self.window
                rows = slice(max(0, start - shift), min(R, last, newest))
                if rows.start < rows.stop:
                    yield Tile(batch, rows, slice(start, stop))

    def ends(self, R: int, device: torch.device) -> tuple[Tensor, ...]:
        """Of each row the last position that it sees (1, R), and the first (1 or B, R) if that is not 0 for all."""
        last = torch.arange(self.offset, self.offset + R, device=device)[None]
        firsts = [] if self.window is None else [last - self.window + 1]
        if self.documents is not None:
            firsts.append(self.documents[:, self.offset : self.offset + R])
        return last, *([torch.maximum(firsts[0], firsts[-1])] if firsts else [])

    @property
    def _on_host(self) -> Tensor | None:
        return self.documents if self.documents is not None and self.documents.device.type == "cpu" else None

    def _parts(self, B: int) -> list[slice]:
        """Sequences that have the same tiles."""
        return [slice(0, B)] if self._on_host is None else [slice(b, b + 1) for b in range(B)]
