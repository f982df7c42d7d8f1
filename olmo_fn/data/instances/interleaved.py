"""Instances in which several documents alternate in chunks, so that a model learns to look further back: OLMo-core's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

from olmo_fn.data.bounds import fitting
from olmo_fn.data.instances import InstancesSettings, Origin, TokenData
from olmo_fn.data.instances.pieces import Pieces, per_file
from olmo_fn.fields import PATH


@dataclass(frozen=True)
class Interleaved(InstancesSettings):
    """Several documents an instance, cut into chunks that alternate; special tokens stand only at its ends."""

    name: tyro.conf.Suppress[Literal["interleaved"]] = "interleaved"
    """This kind of dataset."""
    docs: int = 2
    """Documents of an instance. Of each as much is used as its share of the sequence length."""
    chunks: int = 2
    """Chunks that each document is cut into."""
    seed: int = 0
    """Which documents come together."""
    exempt_paths: Annotated[tuple[str, ...], PATH] = ()
    """Token files whose documents are instances by themselves."""

    def build(self, tokens: TokenData) -> InterleavedInstances:
        """The instances: first those of ``exempt_paths``, then the others."""
        if min(self.docs, self.chunks) < 1 or self.docs > tokens.sequence_length:
            raise ValueError(
                f"--data.docs is {self.docs} and --data.chunks {self.chunks}; both must be at least 1, "
                f"and no more documents than --recipe.sequence-length {tokens.sequence_length}"
            )
        where = per_file(
            [fitting(bounds, tokens.sequence_length, "truncate") for bounds in tokens.all_bounds(self.name, use_bos=False)]
        )
        exempt = {Path(path).resolve() for path in self.exempt_paths}
        if missing := exempt - {Path(file.path).resolve() for file in tokens.files}:
            raise ValueError(f"--data.exempt-paths {str(min(missing))!r} is not among the --data.paths")
        alone = np.isin(where[:, 0], [i for i, file in enumerate(tokens.files) if Path(file.path).resolve() in exempt])
        mixed = np.random.Generator(np.random.PCG64(self.seed)).permutation(np.flatnonzero(~alone))
        documents = tokens.pieces(where, np.arange(len(where) + 1))
        return InterleavedInstances(
            documents, np.flatnonzero(alone), mixed, self.docs, self.chunks, tokens.eos_id or 0, tokens.bos_id
        )


@dataclass(frozen=True)
class InterleavedInstances:
    """Of ``documents``, one an instance: those ``alone`` as they are, then ``docs`` after ``docs`` of ``mixed`` interleaved."""

    documents: Pieces
    alone: np.ndarray
    mixed: np.ndarray
    docs: int
    chunks: int
    eos_id: int
    bos_id: int | None

    def __len__(self) -> int:
        return len(self.alone) + len(self.mixed) // self.docs

    def members(self, number: int) -> np.ndarray:
        """The documents of instance ``number``."""
        if number < len(self.alone):
            return self.alone[number : number + 1]
        start = (number - len(self.alone)) * self.docs
        return self.mixed[start : start + self.docs]

    def origin(self, number: int) -> Origin:
        """Where the first document of instance ``number`` begins."""
        return self.documents.origin(int(self.members(number)[0]))

    def read(self, numbers: np.ndarray) -> dict[str, np.ndarray]:
        """``input_ids`` (B, T) int64 and ``label_mask`` (B, T) bool."""
        rows = [self._row(int(number)) for number in numbers]
        return {name: np.stack([row[name] for row in rows]) for name in ("input_ids", "label_mask")}

    def _row(self, number: int) -> dict[str, np.ndarray]:
        arrays, T = self.documents.read(self.members(number)), self.documents.sequence_length
        if number < len(self.alone):
            return {name: value[0] for name, value in arrays.items()}
        special = [self.documents.pad_id, self.eos_id, *([] if self.bos_id is None else [self.bos_id])]
        ids, masks = ([row[: T // self.docs] for row in arrays[name]] for name in ("input_ids", "label_mask"))
        kept = [~np.isin(row, special) for row in ids]

        def alternating(rows: list[np.ndarray]) -> np.ndarray:
            chunks = [np.array_split(row[keep], self.chunks) for row, keep in zip(rows, kept, strict=True)]
            return np.concatenate([chunk[i] for i in range(self.chunks) for chunk in chunks])

        tokens, mask = alternating(ids), alternating(masks)
        if self.bos_id is not None and len(tokens) < T:
            tokens, mask = np.insert(tokens, 0, self.bos_id), np.insert(mask, 0, True)
        if len(tokens) < T:
            tokens, mask = np.append(tokens, self.eos_id), np.append(mask, True)
        behind = T - len(tokens)
        return {
            "input_ids": np.pad(tokens, (0, behind), constant_values=self.documents.pad_id),
            "label_mask": np.pad(mask, (0, behind)),
        }
