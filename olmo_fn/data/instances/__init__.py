"""Training instances: rows of a fixed number of tokens, by number. A kind of dataset is one file here.

`fixed` cuts every token file into windows. A kind of your own is a class with the three methods of `Instances`, and a frozen
dataclass with its settings and a method ``build``, as `fixed.FixedLength` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

import numpy as np
from tyro.conf import Suppress

from olmo_fn.data.bounds import Boundaries, document_bounds
from olmo_fn.data.tokens import TokenFile

if TYPE_CHECKING:
    from olmo_fn.data.instances.pieces import Pieces


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
class TokenData:
    """Token files, and what is known of them, of which a kind of dataset makes instances."""

    files: tuple[TokenFile, ...]
    sequence_length: int
    vocab_size: int
    masks: tuple[TokenFile, ...] = ()
    """None, or a label mask for each file."""
    eos_id: int | None = None
    """The end-of-document token, if it is known."""
    bos_id: int | None = None
    """The token that begins a document, if there is one."""
    pad_id: int = 0
    boundaries: Boundaries = "eos"
    cache: Path | None = None
    """The folder that found documents are kept in."""

    def all_bounds(self, kind: str, use_bos: bool = True) -> list[np.ndarray]:
        """The documents of each file, (documents, 2): `document_bounds`. ValueError names the ``kind`` that needs them."""
        if self.eos_id is None and self.boundaries == "eos":
            raise ValueError(
                f"--data.instances.name {kind} needs the end-of-document token; give --data.eos-id or --data.tokenizer"
            )
        eos_id, bos_id = self.eos_id or 0, self.bos_id if use_bos else None
        return [document_bounds(file, eos_id, bos_id, self.boundaries, self.cache) for file in self.files]

    def pieces(self, where: np.ndarray, first: np.ndarray) -> Pieces:
        """Instances of pieces of these files; `olmo_fn.data.instances.pieces.Pieces` has what they are."""
        from olmo_fn.data.instances.pieces import Pieces

        return Pieces(self.files, self.masks, where, first, self.sequence_length, self.vocab_size, self.pad_id)


@dataclass(frozen=True)
class InstancesSettings:
    """The settings of a kind of dataset: derive your own from it, with a ``name`` to choose it by."""

    name: Suppress[str] = ""

    def build(self, tokens: TokenData) -> Instances:
        """The instances of token files."""
        raise NotImplementedError(f"{type(self).__name__} has no build")


class Instances(Protocol):
    """Instances of T tokens, numbered from 0. Reading is a pure function of the numbers."""

    def __len__(self) -> int:
        """How many there are."""
        ...

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The instances ``numbers`` (B,), as arrays (B, T) by name.

        ``input_ids`` of any type of integers, and optionally ``label_mask`` bool, False for a token whose prediction is not in
        the loss; ``labels`` int64, where they are not the next token; ``documents`` int64, numbers that tell the documents of a
        row apart, so that the model sees each by itself. ValueError names the file, the offset and the value of a bad token.
        """
        ...

    def origin(self, number: int) -> Origin:
        """The file that instance ``number`` is from, and the offset of its first token there."""
        ...


@runtime_checkable
class KnowsDocuments(Protocol):
    """Instances that know where the documents of a row begin."""

    def documents(self, numbers: np.ndarray) -> np.ndarray:
        """Numbers (B, T) int64 that tell the documents of each row apart."""
        ...
