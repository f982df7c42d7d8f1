"""Files that outlive a kill and a power cut: written whole or not at all, made durable, held by one process. No torch."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems say that cannot make the names in a folder durable, or have no locks."""


def write_whole(path: Path, data: bytes) -> None:
    """Put ``data`` into ``path``: a kill or a power cut at any time leaves the old file or the new one. A link stays one."""
    path = path.resolve()
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    sync(path.parent)


@contextmanager
def filling(path: Path) -> Iterator[BinaryIO]:
    """A file to write to, which is at ``path`` in the end, whole; on an error there is none. For caches that many processes
    and threads fill: each writes one of its own, and the last has it.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp(), "cache", "a")
    >>> with filling(place) as file:
    ...     file.write(b"all of it"), place.exists()
    (9, False)
    >>> place.read_bytes()
    b'all of it'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.draft")
    try:
        with draft.open("wb") as file:
            yield file
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Make a file, or the names in a folder, durable, as far as the file system can."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(fd)


def try_lock(fd: int) -> bool | None:
    """Whether this process now holds the open file alone; None where a file system has no locks.

    The kernel lets go when the process dies, however it dies.
    """
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return None
    return True


def unlock(fd: int) -> None:
    """Close a locked file; that alone is not enough, for a child forked meanwhile would hold on to the lock."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)
