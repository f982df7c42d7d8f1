"""Windows over all files as if they were one: nothing is lost but the last tokens of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro

from olmo_fn.data.instances import InstancesSettings, TokenData
from olmo_fn.data.instances.pieces import Pieces


@dataclass(frozen=True)
class Joined(InstancesSettings):
    """Windows of the sequence length over all token files, one behind the other: a window may span several files."""

    name: tyro.conf.Suppress[Literal["joined"]] = "joined"
    """This kind of dataset."""

    def build(self, tokens: TokenData) -> Pieces:
        """The windows; OLMo-core's concatenating and chunking source."""
        length = tokens.sequence_length
        ends = np.cumsum([file.num_tokens for file in tokens.files], dtype=np.int64)
        total = int(ends[-1]) // length * length
        cuts = np.unique(np.concatenate([np.arange(0, total + 1, length, dtype=np.int64), ends[ends < total]]))
        starts = cuts[:-1]
        file = np.searchsorted(ends, starts, side="right")
        before = np.concatenate([[0], ends])[file]
        where = np.column_stack([file, starts - before, cuts[1:] - before]).astype(np.int64)
        return tokens.pieces(where, np.searchsorted(cuts, np.arange(0, total + 1, length)))
