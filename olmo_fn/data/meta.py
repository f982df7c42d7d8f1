"""What the tokenizing command writes beside its token files in ``meta.json``, and what is checked by it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from olmo_fn.data.stores import NotShown, each, is_remote, read_whole
from olmo_fn.data.tokenizer import Tokenizer
from olmo_fn.data.tokens import SIZES


class Vocabulary(NamedTuple):
    """What the ids of token files mean; None for what is not known."""

    eos_id: int
    size: int | None = None
    hash: str | None = None
    """`Tokenizer.vocab_hash`; folders that are older than it have none."""

    def differs(self, other: Vocabulary) -> bool:
        """Whether both cannot be of one tokenizer."""
        return any(None not in pair and pair[0] != pair[1] for pair in zip(self, other, strict=True))

    def __str__(self) -> str:
        size = "" if self.size is None else f"{self.size:,} ids, "
        return f"{size}end of document {self.eos_id}"


class Meta(NamedTuple):
    """What the ``meta.json`` of a folder says of its token files."""

    dtype: str
    vocabulary: Vocabulary
    num_bytes: Mapping[tuple[str, int], int]
    """UTF-8 bytes of the text of each file, by its name and number of tokens."""


def folder_of(path: str) -> str:
    """The folder of a file, on a disk or in a store.

    >>> folder_of("s3://bucket/tokens/part-00000.npy"), folder_of("part-00000.npy")
    ('s3://bucket/tokens', '.')
    """
    return path.rpartition("/")[0] if is_remote(path) else str(Path(path).parent)


def metas_beside(paths: Iterable[str]) -> dict[str, Meta]:
    """What the tokenizing command wrote in the folders of token files, by folder, where it did. ValueError if a store fails.

    >>> metas_beside(["no/such/part-00000.npy"])
    {}
    """
    folders = [*dict.fromkeys(map(folder_of, paths))]
    return {folder: meta for folder, meta in zip(folders, each(read_meta, folders), strict=True) if meta}


def read_meta(folder: str) -> Meta | None:
    """The ``meta.json`` in ``folder``; None if there is none to be read, or none of the tokenizing command's."""
    path = f"{folder}/meta.json"
    if not is_remote(path) and not os.path.isfile(path):  # a pipe, say, which nobody writes to
        return None
    try:
        data = read_whole(path)
    except (OSError, NotShown):
        return None
    try:
        found = json.loads(data.decode())
    except (ValueError, RecursionError):
        return None

    def of(record: object, name: str, kind: type) -> Any:
        value = record.get(name) if isinstance(record, dict) else None
        return value if type(value) is kind else None

    dtype, eos_id = of(found, "dtype", str), of(found, "eos_id", int)
    if dtype not in SIZES or eos_id is None:
        return None
    vocabulary = Vocabulary(eos_id, of(found, "vocab_size", int), of(found, "vocab_hash", str))
    files = of(found, "files", dict) or {}
    num_bytes = {(name, of(count, "tokens", int)): of(count, "bytes", int) for name, count in files.items()}
    return Meta(dtype, vocabulary, {key: value for key, value in num_bytes.items() if value is not None})


def check_vocabulary(metas: Mapping[str, Meta], tokenizer: Tokenizer | None, name: str) -> None:
    """ValueError if the token files in the folders of ``metas`` are of several tokenizers, or not of this, named ``name``."""
    known = [(f"the token files in {folder!r}", meta.vocabulary) for folder, meta in metas.items()]
    if tokenizer:
        own = Vocabulary(tokenizer.eos_id, tokenizer.vocab_size, tokenizer.vocab_hash)
        known.insert(0, (f"the tokenizer {name!r}", own))
    for whose, vocabulary in known[1:]:
        if vocabulary.differs(known[0][1]):
            hint = "train on and hold out files of one tokenizer, and give its tokenizer.json, which is beside them"
            raise ValueError(f"{whose} are of another tokenizer ({vocabulary}) than {known[0][0]} ({known[0][1]}); {hint}")
