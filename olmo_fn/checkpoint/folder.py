"""The folder of checkpoints: names, the writer's lock, and what a killed writer left behind.

Everything that is not a finished checkpoint starts with a dot: ``.partial-*`` is being written,
``.deleted-*`` is being deleted, ``.replaced-*`` makes place for a new one of the same step. Renames are the
only step between these and ``step{N}``, so at any instant a ``step{N}`` is either all there or not there.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STEP = re.compile(r"step(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.(partial|deleted|replaced)-(step\d+)-[0-9a-f]{12}")
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def steps(folder: str | Path) -> list[int]:
    """The steps with a checkpoint in ``folder``, oldest first, whole or not; none if there is no such folder.

    >>> steps("/nowhere")
    []
    """
    folder = Path(folder)
    found = (_STEP.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def step_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies.

    >>> step_path("runs/a/checkpoints", 200).as_posix()
    'runs/a/checkpoints/step200'
    """
    return Path(folder) / f"step{step}"


def hidden(folder: Path, what: str, step: int) -> Path:
    """A fresh name in ``folder`` that no reader takes for a checkpoint."""
    return folder / f".{what}-step{step}-{uuid.uuid4().hex[:12]}"


@contextmanager
def writing(folder: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold ``folder`` as its only writer; the kernel lets go when the process dies, however it dies.

    Waits up to ``patience`` seconds for another writer, then raises TimeoutError. Sweeps first.
    """
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        locked = _lock(fd, patience)
        if locked is False:
            raise TimeoutError(
                f"{folder}: another process has been saving there for {patience:.0f} s; "
                "two runs must not share a folder: give one of them another"
            )
        if locked:
            _sweep(folder)
        yield
    finally:
        _unlock(fd)


def sweep(folder: str | Path) -> None:
    """Remove what a killed writer left in ``folder``; does nothing while another process saves there."""
    folder = Path(folder)
    if not folder.is_dir():
        return
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if _lock(fd, 0.0):
            _sweep(folder)
    finally:
        _unlock(fd)


def delete(path: Path, step: int) -> None:
    """Delete the checkpoint at ``path``: it stops being one by a rename, before its first file goes."""
    trash = hidden(path.parent, "deleted", step)
    path.rename(trash)
    sync_folder(path.parent)
    shutil.rmtree(trash)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _lock(fd: int, patience: float) -> bool | None:
    """True with the lock, False without it in time, None where the filesystem has no locks."""
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return None
            if error.errno not in (errno.EWOULDBLOCK, errno.EINTR):
                raise
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.05)


def _unlock(fd: int) -> None:
    # Closing is not enough: a child forked meanwhile would hold on to the lock.
    try:
        fcntl.flock(fd, fcntl.LOCK_UN)
    finally:
        os.close(fd)


def _sweep(folder: Path) -> None:
    for path in list(folder.iterdir()):
        match = _HIDDEN.fullmatch(path.name)
        if match is None:
            continue
        if match[1] == "replaced" and not (folder / match[2]).exists():
            # Killed between the two renames of a replacement: the old checkpoint is the one of its step.
            path.rename(folder / match[2])
            sync_folder(folder)
        else:
            shutil.rmtree(path)
