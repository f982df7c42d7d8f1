"""Training instances: rows of a fixed number of tokens, by number. A kind of dataset is one file here.

`fixed` cuts every token file into windows. A kind of your own is a class with the three methods of `Instances`, and a frozen
dataclass with its settings and a method ``build``, as `fixed.FixedLength` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from tyro.conf import Suppress


class Origin(NamedTuple):
    """Where an instance comes from.

    >>> str(Origin("part-00000.npy", 4096))
    'part-00000.npy from token 4,096 on'
    """

    path: str
    offset: int
    """Of its first token in the file, in tokens."""

    def __str__(self) -> str:
        return f"{self.path} from token {self.offset:,} on"


@dataclass(frozen=True)
class InstancesSettings:
    """The settings of a kind of dataset: derive your own from it, with a ``name`` to choose it by."""

    name: Suppress[str] = ""

    def build(self, files: Any, masks: Any, sequence_length: int, vocab_size: int, eos_id: int | None) -> Instances:
        """The instances of token ``files``; ``masks``: none, or a label mask for each file."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


class Instances(Protocol):
    """Instances of T tokens, numbered from 0. Reading is a pure function of the numbers."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The instances ``numbers`` (B,), as arrays (B, T) by name.

        ``input_ids`` int64, and optionally ``label_mask`` bool, False for a token whose prediction is not in the loss;
        ``labels`` int64, where they are not the next token; ``documents`` int64, numbers that tell the documents of a row
        apart, so that the model sees each by itself. ValueError names the file, the offset and the value of a bad token.
        """
        ...

    def origin(self, number: int) -> Origin:
        """The file that instance ``number`` is from, and the offset of its first token there."""
        ...
