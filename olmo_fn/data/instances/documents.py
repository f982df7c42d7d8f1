"""Documents of a row told apart by their end-of-document tokens, so that the model sees each by itself."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from olmo_fn.data.instances import Instances, KnowsDocuments, Origin


def document_numbers(input_ids: np.ndarray, eos_id: int, bos_id: int | None = None) -> np.ndarray:
    """The number, from 0 in each row, of the document of each token: (B, T) int64 from ids (B, T).

    An end-of-document token belongs to the document that it ends. A row may begin in the middle of a document. With ``bos_id``
    a document ends only where that follows.

    >>> document_numbers(np.array([[5, 6, 0, 7, 0, 0, 8]]), eos_id=0)
    array([[0, 0, 0, 1, 1, 2, 3]])
    """
    ends = input_ids == eos_id
    if bos_id is not None:
        ends[:, :-1] &= input_ids[:, 1:] == bos_id
    return np.cumsum(ends, axis=1, dtype=np.int64) - ends


def _finer(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Numbers that change where either of two does, (B, T).

    >>> _finer(np.array([[0, 0, 1, 1]]), np.array([[0, 1, 1, 1]]))
    array([[0, 1, 2, 2]])
    """
    changes = np.zeros_like(a)
    changes[:, 1:] = (a[:, 1:] != a[:, :-1]) | (b[:, 1:] != b[:, :-1])
    return np.cumsum(changes, axis=1)


@dataclass(frozen=True)
class MaskedDocuments:
    """``instances`` with their ``documents``, found by ``eos_id`` unless the instances know or give them themselves.

    As in OLMo-core, this changes what the model sees and not what it predicts: the end of a document still predicts the
    first token of the next.
    """

    instances: Instances
    eos_id: int
    bos_id: int | None = None

    def __len__(self) -> int:
        return len(self.instances)

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays of the instances ``numbers`` (B,), with ``documents`` (B, T) int64."""
        arrays = self.instances.read(numbers)
        if "documents" not in arrays:
            arrays["documents"] = document_numbers(arrays["input_ids"], self.eos_id, self.bos_id)
            if isinstance(self.instances, KnowsDocuments):  # also where a document was cut off, and where padding begins
                arrays["documents"] = _finer(arrays["documents"], self.instances.documents(numbers))
        return arrays

    def origin(self, number: int) -> Origin:
        """Where instance ``number`` comes from."""
        return self.instances.origin(number)
