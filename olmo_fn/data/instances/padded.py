"""One document an instance, cut off at the sequence length and padded: OLMo-core's padded dataset."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import tyro

from olmo_fn.data.bounds import fitting
from olmo_fn.data.instances import InstancesSettings, TokenData
from olmo_fn.data.instances.pieces import Pieces, per_file


@dataclass(frozen=True)
class Padded(InstancesSettings):
    """One document an instance: cut off at the sequence length, padded, and the padding is not in the loss."""

    name: tyro.conf.Suppress[Literal["padded"]] = "padded"
    """This kind of dataset."""

    def build(self, tokens: TokenData) -> Pieces:
        """The documents in the order of the files."""
        where = per_file(
            [fitting(bounds, tokens.sequence_length, "truncate") for bounds in tokens.all_bounds(self.name, use_bos=False)]
        )
        return tokens.pieces(where, np.arange(len(where) + 1))
