"""Save a tree: the ranks agree who writes what, write it beside, and rank 0 commits it by one rename."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from olmo_fn.checkpoint.commit import commit, drafting, free_bytes, step_path
from olmo_fn.checkpoint.format import (
    CHUNK_BYTES,
    DTYPE_NAMES,
    Index,
    StoredFile,
    StoredPart,
    StoredTensor,
    crc32,
    dump_header,
    host_bytes,
    part_key,
)
from olmo_fn.checkpoint.ranks import SINGLE_PROCESS, RankLost, Ranks
from olmo_fn.checkpoint.schema import BrokenCheckpoint
from olmo_fn.checkpoint.shards import LocalShard, LocalState, Plan, assign, local_state
from olmo_fn.checkpoint.stored import default_threads
from olmo_fn.files import sync

FILE_BYTES = 4 << 30
# A file is written by one thread, as the kernel lets no two write into one at a time: a file for each, if worth it.
_WORTH_A_FILE = 256 << 20
# The disk begins while later chunks are still being copied, not only at the end.
_SYNC_BYTES = 128 << 20
_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
}


class SaveFailed(OSError):
    """A checkpoint could not be written; nothing of it is left, and the older ones are as they were."""


def save(
    tree: Mapping[str, Any],
    folder: str | Path,
    *,
    step: int,
    meta: Mapping[str, Any] | None = None,
    replace: bool = False,
    file_bytes: int = FILE_BYTES,
    threads: int | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> Path:
    """Save ``tree`` as ``folder/step{step}`` and return that path; on return, the checkpoint is durable.

    ``tree`` is a nested dict of tensors of any shape, stride and device; ``meta`` is JSON of the caller's. Tensors are written
    from their own memory, without a copy if contiguous on the CPU; a `Deferred` one is made when it is written. A new
    safetensors file begins after each ``file_bytes``, and for each of ``threads`` if there is enough to write. Until the last
    rename there is only a hidden folder, so a kill at any instant leaves the older checkpoints intact and this one absent. A
    *broken* checkpoint of the same step is moved aside, to ``step{step}.broken-*``; an intact one is replaced only if
    ``replace``.

    With ``ranks``, all of them call this with the same ``step``, in the same order, and each writes its part into the same
    folder, so that must be on a filesystem they share. Leaves may be DTensors; of a tensor that several ranks hold every
    distinct box is written once, by one of them; a rank may hold only some of the tensors (a pipeline stage). ``meta`` is
    rank 0's. Rank 0 commits when the boxes of all fill every tensor exactly once; if a rank fails, the others raise
    `SaveFailed` that names it.

    Raises ValueError for a tree or ``meta`` that cannot be stored and for a step that is there already, TimeoutError if another
    process keeps saving into ``folder``, and `SaveFailed` (an OSError) if the disk is full or fails.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": {"w": torch.ones(2, 3)}}, folder, step=5, meta={"tokens": 80}).name
    'step5'
    """
    with failures_named(step_path(folder, step)):
        state, plan = ranks.exchange(f"step {step}", lambda: local_state(tree, step, meta, ranks), assign, LocalState.held)
    return save_planned(state, plan, folder, ranks, replace=replace, file_bytes=file_bytes, threads=threads)


def save_planned(
    state: LocalState, plan: Plan, folder: str | Path, ranks: Ranks, *, replace: bool, file_bytes: int, threads: int | None
) -> Path:
    """`save` of a state whose writers are agreed on; of its shards only those are looked at that this rank writes."""
    path, label = step_path(folder, state.step), f"step {state.step}"
    shards = plan.written_by(ranks.rank, state.shards)
    prefix = "state" if ranks.size == 1 else f"state-rank{ranks.rank:05d}"
    with ExitStack() as stack, failures_named(path, plan.nbytes):  # inside: what is free is counted before the draft goes
        draft = path.with_name(ranks.broadcast(label, lambda: stack.enter_context(drafting(path, plan.nbytes, replace)).name))
        ranks.exchange(
            label,
            work=lambda: write_files(draft, prefix, shards, file_bytes, threads or default_threads()),
            combine=lambda parts: commit(draft, path, merge(plan, parts, state, str(draft)).dumps()),
            tell=lambda part: part,
        )
    return path


@contextmanager
def failures_named(path: Path, nbytes: int = 0) -> Iterator[None]:
    """Turn what another rank's failure, boxes that do not fit together, and the disk raise into `SaveFailed`."""
    what = f"could not save {path.name.replace('step', 'step ')} into {path.parent}"
    try:
        yield
    except (RankLost, BrokenCheckpoint) as error:
        raise SaveFailed(f"{what}: {error}. Older checkpoints are untouched") from error
    except TimeoutError:
        raise
    except OSError as error:
        details = f" ({error.filename})" if error.filename else ""
        if remedy := _REMEDIES.get(error.errno or 0):
            details = f"; the checkpoint needs {nbytes:,} bytes, {free_bytes(path.parent):,} are free there"
        raise SaveFailed(
            f"{what}: {error.strerror or error}{details}. Nothing of it is left behind and older checkpoints are untouched; "
            f"{remedy or 'mend that'}, or save into another folder"
        ) from error


Part = tuple[dict[str, StoredTensor], dict[str, StoredFile]]


def merge(plan: Plan, parts: Sequence[Part], state: LocalState, where: str) -> Index:
    """The index of what all ranks wrote; `BrokenCheckpoint` if the boxes do not make up every tensor exactly once."""
    tensors = {}
    for name in plan.writers:
        stored = [tensors_of_rank[name] for tensors_of_rank, _ in parts if name in tensors_of_rank]
        kinds = sorted({f"{tensor.dtype} {list(tensor.shape)}" for tensor in stored})
        if len(kinds) != 1:
            raise BrokenCheckpoint(f"{where}: {name} is {' and '.join(kinds) or 'written by no rank'}")
        boxes = sorted((part for tensor in stored for part in tensor.parts), key=lambda part: part.box)
        tensors[name] = StoredTensor(stored[0].dtype, stored[0].shape, tuple(boxes))
    files = {name: file for _, files_of_rank in parts for name, file in files_of_rank.items()}
    index = Index(state.step, tensors, files, plan.empty, state.meta)
    index.check(where)
    return index


def write_files(draft: Path, prefix: str, shards: Mapping[str, LocalShard], file_bytes: int, threads: int) -> Part:
    """Write the shards into files of their own, durably; what the index says of them."""
    share = -(-sum(shard.data.nbytes for shard in shards.values()) // threads)
    groups = list(_groups(shards, min(file_bytes, max(_WORTH_A_FILE, share))))
    paths = [draft / f"{prefix}-{i:05d}.safetensors" for i in range(len(groups))]
    with ThreadPoolExecutor(threads) as pool:
        written = list(pool.map(write_file, paths, groups))
    files = {path.name: file for path, (file, _) in zip(paths, written, strict=True)}
    tensors = {name: tensor for _, stored in written for name, tensor in stored.items()}
    sync(draft)
    return tensors, files


def write_file(path: Path, shards: Mapping[str, LocalShard]) -> tuple[StoredFile, dict[str, StoredTensor]]:
    """Write a new safetensors file straight from the tensors' memory and fsync it; what the index says of it."""
    # Large items first: every tensor is then aligned to its item size, for readers that map the file.
    shards = dict(sorted(shards.items(), key=lambda item: -item[1].data.itemsize))
    header, starts, size = dump_header(
        (part_key(name, shard.shape, shard.box), DTYPE_NAMES[shard.data.dtype], shard.box.shape, shard.data.nbytes)
        for name, shard in shards.items()
    )
    tensors = {}
    unsynced = 0
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        _write(fd, memoryview(header), 0)
        for (name, shard), start in zip(shards.items(), starts, strict=True):
            data, checksums = host_bytes(shard.tensor()), []
            for first in range(0, max(len(data), 1), CHUNK_BYTES):
                chunk = data[first : first + CHUNK_BYTES]
                checksums.append(crc32(chunk))
                _write(fd, chunk, start + first)
                unsynced += len(chunk)
                if unsynced >= _SYNC_BYTES:
                    getattr(os, "fdatasync", os.fsync)(fd)
                    unsynced = 0
            part = StoredPart(path.name, shard.box, tuple(checksums))
            tensors[name] = StoredTensor(DTYPE_NAMES[shard.data.dtype], shard.shape, (part,))
            del data, chunk  # before a deferred one is made
        os.fsync(fd)
    finally:
        os.close(fd)
    return StoredFile(size, len(header), crc32(header)), tensors


def _groups(shards: Mapping[str, LocalShard], limit: int) -> Iterator[dict[str, LocalShard]]:
    """The shards of each file: in order, a new file after each ``limit`` bytes."""
    group: dict[str, LocalShard] = {}
    size = 0
    for name, shard in shards.items():
        if group and size + shard.data.nbytes > limit:
            yield group
            group, size = {}, 0
        group[name] = shard
        size += shard.data.nbytes
    if group:
        yield group


def _write(fd: int, data: memoryview, start: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], start + done)
