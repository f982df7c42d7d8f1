"""The folder of checkpoints: names, the writer's lock, the commit by rename, and what a killed writer left behind.

Everything that is not a finished checkpoint begins with a dot: ``.partial-*`` is being written, ``.deleted-*`` is being
deleted, ``.replaced-*`` makes way for a new one of the same step. Renames are the only step between these and ``step{N}``,
so at any instant a ``step{N}`` is either complete or absent.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from olmo_fn.checkpoint.stored import verify
from olmo_fn.files import sync, try_lock, unlock

log = logging.getLogger(__name__)
_STEP = re.compile(r"step(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.(partial|deleted|replaced)-(step\d+)-[0-9a-f]{12}")


def steps(folder: str | Path) -> list[int]:
    """The steps with a checkpoint in ``folder``, oldest first, broken ones too; none if there is no such folder.

    >>> steps("/nowhere")
    []
    """
    try:
        names = os.listdir(folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def step_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies.

    >>> step_path("runs/a/checkpoints", 200).as_posix()
    'runs/a/checkpoints/step200'
    """
    return Path(folder) / f"step{step}"


def hidden(path: Path, kind: str) -> Path:
    """A fresh name beside the checkpoint ``path`` that no reader takes for a checkpoint."""
    return path.with_name(f".{kind}-{path.name}-{uuid.uuid4().hex[:12]}")


@contextmanager
def drafting(path: Path, nbytes: int, replace: bool) -> Iterator[Path]:
    """A hidden folder to write the checkpoint ``path`` into, removed at the end unless committed; the writer's lock is held.

    ValueError if ``path`` is an intact checkpoint and not ``replace``; a broken one is kept under another name. OSError if
    less than ``nbytes`` are free.
    """
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in made:
        sync(folder.parent)
    with locked(path.parent):
        there = os.path.lexists(path)  # also a link to nothing, which is broken
        broken = there and verify(path)
        if there and not broken and not replace:
            raise ValueError(
                f"{path} is there already, and whole; pass replace=True to put this state in its place, "
                "or save into another folder"
            )
        if free_bytes(path.parent) < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if broken:
            aside = path.rename(path.with_name(f"{path.name}.broken-{uuid.uuid4().hex[:12]}"))
            log.warning("%s is broken and another one takes its place; it is kept as %s", path, aside)
        draft = hidden(path, "partial")
        try:
            draft.mkdir()
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def commit(draft: Path, path: Path, index: bytes) -> None:
    """Make ``draft``, with ``index`` as its ``index.json``, the checkpoint ``path``; all of it is durable then."""
    with open(draft / "index.json", "xb") as file:
        file.write(index)
        file.flush()
        os.fsync(file.fileno())
    sync(draft)
    replaced = path.rename(hidden(path, "replaced")) if os.path.lexists(path) else None
    draft.rename(path)
    sync(path.parent)
    if replaced:
        _remove(replaced)


def delete(path: Path) -> None:
    """Delete the checkpoint ``path``: it stops being one by a rename, before its first file goes. Of a link, the link goes."""
    deleted = path.rename(hidden(path, "deleted"))
    sync(path.parent)
    _remove(deleted)


def free_bytes(folder: Path) -> float:
    """Bytes that are free in ``folder``; infinitely many where the filesystem does not count them: it has none in all."""
    with suppress(OSError):
        usage = shutil.disk_usage(folder)
        if usage.total:
            return usage.free
    return math.inf


@contextmanager
def tolerated(what: str) -> Iterator[None]:
    """Warn of an error of the system that is no reason to end a run, as when something old cannot be deleted."""
    try:
        yield
    except OSError as error:
        log.warning("%s: %s", what, error)


@contextmanager
def locked(folder: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold ``folder`` as its only writer, and sweep it; the kernel lets go when the process dies, however it dies.

    Waits up to ``patience`` seconds for another writer, then raises TimeoutError. On a filesystem without locks it neither
    waits nor sweeps.
    """
    deadline = time.monotonic() + patience
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        while not (alone := try_lock(fd)):
            if alone is None:
                break
            if time.monotonic() >= deadline:
                raise TimeoutError(
                    f"{folder}: another process has been saving there for {patience:.0f} s; "
                    "two runs must not share a folder: give one of them another"
                )
            time.sleep(0.05)
        else:
            with tolerated(f"cannot sweep {folder}"):
                _sweep(folder)
        yield
    finally:
        unlock(fd)


def sweep(folder: str | Path) -> None:
    """Remove what a killed writer left in ``folder``; does nothing while another process saves there."""
    if os.path.isdir(folder):
        with tolerated(f"cannot sweep {folder}"), suppress(TimeoutError), locked(Path(folder), patience=0.0):
            pass


def _sweep(folder: Path) -> None:
    for path in list(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match[1] == "replaced" and not os.path.lexists(folder / match[2]):
            # Killed between the two renames of a replacement: the old checkpoint is the one of its step.
            path.rename(folder / match[2])
            sync(folder)
        else:
            _remove(path)


def _remove(path: Path) -> None:
    with tolerated(f"cannot delete {path}"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
