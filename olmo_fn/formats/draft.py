"""A file or a directory that appears whole, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from olmo_fn.checkpoint.commit import free_bytes, hidden
from olmo_fn.files import sync


@contextmanager
def drafting(target: Path, nbytes: int) -> Iterator[Path]:
    """A hidden name beside ``target``, at which the block makes a file or a directory; at the end that takes the target's
    place, durably, or is removed after an error.

    ValueError if something is there already, or fewer than ``nbytes`` are free.
    """
    if target.exists():
        raise ValueError(f"{target} is there already; choose another name, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    if free_bytes(target.parent) < nbytes:
        raise ValueError(f"{target} needs {nbytes:,} bytes, and fewer are free there; free some space, or choose another")
    draft = hidden(target, "partial")
    try:
        yield draft
        for path in (*draft.rglob("*"), draft):
            sync(path)
        os.replace(draft, target)
        sync(target.parent)
    finally:
        shutil.rmtree(draft) if draft.is_dir() else draft.unlink(missing_ok=True)
