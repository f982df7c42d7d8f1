"""The folder of checkpoints: names, the writer's lock, the commit by rename, and what a killed writer left behind.

Everything that is not a finished checkpoint begins with a dot: ``.partial-*`` is being written, ``.deleted-*`` is being
deleted, ``.replaced-*`` makes way for a new one of the same step. Renames are the only step between these and ``step{N}``,
so at any instant a ``step{N}`` is either complete or absent.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from olmo_fn.checkpoint.stored import verify

log = logging.getLogger(__name__)
_STEP = re.compile(r"step(0|[1-9]\d*)")
_HIDDEN = re.compile(r"\.(partial|deleted|replaced)-(step\d+)-[0-9a-f]{12}")


def steps(folder: str | Path) -> list[int]:
    """The steps with a checkpoint in ``folder``, oldest first, broken ones too; none if there is no such folder.

    >>> steps("/nowhere")
    []
    """
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def step_path(folder: str | Path, step: int) -> Path:
    """Where the checkpoint of ``step`` lies.

    >>> step_path("runs/a/checkpoints", 200).as_posix()
    'runs/a/checkpoints/step200'
    """
    return Path(folder) / f"step{step}"


def hidden(folder: Path, kind: str, step: int) -> Path:
    """A fresh name in ``folder`` that no reader takes for a checkpoint."""
    return folder / f".{kind}-step{step}-{uuid.uuid4().hex[:12]}"


@dataclass(frozen=True)
class Draft:
    """A checkpoint that is being written: its hidden folder, its final name, and where an older one of that name goes."""

    path: Path
    final: Path
    aside: Path

    def commit(self, index: bytes) -> None:
        """Make the draft the checkpoint of its step, with ``index`` as its ``index.json``; all of it is durable then."""
        write_durably(self.path / "index.json", index)
        sync_folder(self.path)
        if self.final.exists():
            self.final.rename(self.aside)
        self.path.rename(self.final)
        sync_folder(self.final.parent)
        if self.aside.name.startswith(".") and self.aside.exists():
            shutil.rmtree(self.aside)


@contextmanager
def drafting(folder: Path, step: int, nbytes: int, replace: bool) -> Iterator[Draft]:
    """A draft of the checkpoint of ``step``, removed at the end unless committed; ``folder`` is locked meanwhile.

    ValueError if there is an intact checkpoint of that step and not ``replace``; a broken one will be kept under another
    name. OSError if less than ``nbytes`` are free.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = step_path(folder, step)
    with locked(folder):
        path, aside = hidden(folder, "partial", step), hidden(folder, "replaced", step)
        if final.exists() and verify(final):
            aside = final.with_name(f"{final.name}.broken-{aside.name[-12:]}")
            log.warning("%s is broken and another one takes its place; it is kept as %s", final, aside)
        elif final.exists() and not replace:
            raise ValueError(
                f"{final} is there already, and whole; pass replace=True to put this state in its place, "
                "or save into another folder"
            )
        if shutil.disk_usage(folder).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        try:
            path.mkdir()
            yield Draft(path, final, aside)
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def locked(folder: Path, patience: float = 60.0) -> Iterator[None]:
    """Hold ``folder`` as its only writer, and sweep it; the kernel lets go when the process dies, however it dies.

    Waits up to ``patience`` seconds for another writer, then raises TimeoutError. Filesystems without locks are not swept.
    """
    fd = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        if _lock(fd, time.monotonic() + patience):
            _sweep(folder)
        yield
    except BlockingIOError:
        raise TimeoutError(
            f"{folder}: another process has been saving there for {patience:.0f} s; "
            "two runs must not share a folder: give one of them another"
        ) from None
    finally:
        # Closing is not enough: a child forked meanwhile would hold on to the lock.
        with suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def sweep(folder: str | Path) -> None:
    """Remove what a killed writer left in ``folder``; does nothing while another process saves there."""
    if os.path.isdir(folder):
        with suppress(TimeoutError), locked(Path(folder), patience=0.0):
            pass


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


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and fsync it."""
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _lock(fd: int, deadline: float) -> bool:
    """True with the lock, False where the filesystem has none; BlockingIOError if another holds it until the deadline."""
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        time.sleep(0.05)


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
