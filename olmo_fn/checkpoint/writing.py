"""Save a tree: written beside, made durable, then committed by one rename."""

from __future__ import annotations

import errno
import functools
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from olmo_fn.checkpoint.folder import hidden, step_path, sync_folder, writing
from olmo_fn.checkpoint.holding import Holding, Plan, hold, merge
from olmo_fn.checkpoint.index import Box, BrokenCheckpoint, Entry, File, Index
from olmo_fn.checkpoint.leaves import check_meta
from olmo_fn.checkpoint.pool import default_threads, in_order
from olmo_fn.checkpoint.ranks import ALONE, Meeting, RankLost, Ranks, beating
from olmo_fn.checkpoint.tensorfile import DTYPE_NAMES, Piece, write_file
from olmo_fn.checkpoint.verifying import verify

log = logging.getLogger(__name__)

FILE_BYTES = 4 << 30
_SHARE_BYTES = 256 << 20


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
    ranks: Ranks = ALONE,
) -> Path:
    """Save ``tree`` as ``folder/step{step}`` and return that path; on return, the checkpoint is durable.

    ``tree`` is a nested dict of tensors of any shape, stride and device; ``meta`` is JSON of the caller's.
    Tensors are written from their own memory, without a copy if contiguous on the CPU. A new safetensors file
    begins after each ``file_bytes``, and for each of ``threads`` if there is enough to write. Until the last
    rename there is only a hidden folder, so a kill at any instant leaves the older checkpoints whole and this
    one absent. A *broken* checkpoint of the same step is moved aside, to ``step{step}.broken-*``; a whole one
    is replaced only if ``replace``.

    With ``ranks``, all of them call this with the same ``step``, in the same order, and each writes its part
    into the same folder, so that must be on a filesystem they share. Leaves may be DTensors, of which every
    distinct box is written once, by one rank; a plain tensor is the same on all ranks that hold it; a rank
    may hold only some of the tensors (a pipeline stage). ``meta`` is rank 0's. Rank 0 commits when the boxes
    of all fill every tensor exactly once; if a rank fails or dies, the others raise `SaveFailed` that names it.

    Raises ValueError for a tree or ``meta`` that cannot be stored and for a step that is there already,
    TimeoutError if another process keeps saving into ``folder``, and `SaveFailed` (an OSError) if the disk is
    full or fails.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": {"w": torch.ones(2, 3)}}, folder, step=5, meta={"tokens": 80}).name
    'step5'
    """
    with failures_named(folder, step), beating(ranks), Meeting(ranks) as meeting:
        held, meta = hold(tree, ranks), check_meta(meta)
        return save_held(held, folder, step, meta, meeting, replace=replace, file_bytes=file_bytes, threads=threads)


@contextmanager
def failures_named(folder: str | Path, step: int) -> Iterator[None]:
    """Turn into `SaveFailed` what is raised when another rank fails, or when the boxes do not fit together."""
    try:
        yield
    except (RankLost, BrokenCheckpoint) as error:
        raise SaveFailed(
            f"could not save step {step} into {folder}: {error}. It is not committed, and older checkpoints are untouched"
        ) from error


def save_held(
    held: Holding,
    folder: str | Path,
    step: int,
    meta: dict[str, Any],
    meeting: Meeting,
    *,
    replace: bool = False,
    file_bytes: int = FILE_BYTES,
    threads: int | None = None,
) -> Path:
    """`save` of a holding, in a meeting of all ranks."""
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r}: must be an int, 0 or more")
    folder, final = Path(folder), step_path(folder, step)
    need = sum(nbytes for _, nbytes in held.names.values())
    told = meeting.gather("hello", held.dumps(step))

    def write(partial: Path, plan: Plan) -> Index:
        mine = plan.written_by(meeting.ranks.rank)
        pieces = [piece for piece in held.pieces if piece.name in mine]
        prefix = "state" if meeting.ranks.size == 1 else f"state-rank{meeting.ranks.rank:05d}"
        return _write_files(partial, prefix, pieces, step, file_bytes, threads, meeting.look)

    try:
        if meeting.ranks.rank != 0:
            name, plan = Plan.loads(meeting.broadcast("go"))
            part = write(folder / name, plan)
            _write_durably(_part(folder / name, meeting.ranks.rank), part.dumps())
            sync_folder(folder / name)
            meeting.gather("done")
            meeting.broadcast("outcome")
            return final
        plan = Plan.of(told)
        need = sum(plan.tensors.values())
        folder.mkdir(parents=True, exist_ok=True)
        with writing(folder):
            was_whole = final.exists() and not verify(final)
            if was_whole and not replace:
                raise ValueError(
                    f"{final} is there already, and whole; pass replace=True to put this state in its place, "
                    "or save into another folder"
                )
            if shutil.disk_usage(folder).free < need:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            partial = hidden(folder, "partial", step)
            try:
                partial.mkdir()
                meeting.broadcast("go", plan.dumps(partial.name))
                parts = [write(partial, plan)]
                meeting.gather("done")
                parts += [_take_part(partial, rank) for rank in range(1, meeting.ranks.size)]
                index = merge(plan, parts, step, meta, str(partial))
                _write_durably(partial / "index.json", index.dumps())
                sync_folder(partial)
                meeting.conclude()
                _commit(partial, final, step, was_whole)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
        meeting.broadcast("outcome")
    except TimeoutError:
        raise
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            meeting.look_now()  # rank 0 takes the folder away when any rank fails: what that one said counts
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise SaveFailed(
            f"could not save step {step} into {folder}: {error.strerror or error}; "
            f"the checkpoint needs {need:,} bytes, {free:,} are free there. Nothing of it is left behind and "
            "older checkpoints are untouched; free some space, or save into another folder"
        ) from error
    return final


def _write_files(
    partial: Path,
    prefix: str,
    pieces: Sequence[Piece],
    step: int,
    file_bytes: int,
    threads: int | None,
    look: Callable[[], None],
) -> Index:
    """Write the pieces into files of their own; the part of the index that describes them."""
    files: dict[str, File] = {}
    tensors: dict[str, Entry] = {}
    errors: list[BaseException] = []

    def write(name: str, group: list[Piece]) -> tuple[File, list[tuple[str, ...]]]:
        try:
            return write_file(partial / name, group, look_around)
        except BaseException as error:
            errors.append(error)
            raise

    def look_around() -> None:
        if errors:
            raise errors[0]
        look()

    threads = threads or default_threads()
    # A file is written by one thread, as the kernel lets no two write into one at a time: a file for each, if worth it.
    share = max(_SHARE_BYTES, -(-sum(piece.data.nbytes for piece in pieces) // threads))
    groups = {f"{prefix}-{i:05d}.safetensors": group for i, group in enumerate(_groups(pieces, min(file_bytes, share)))}
    with ThreadPoolExecutor(threads) as pool:
        jobs = (functools.partial(write, name, group) for name, group in groups.items())
        with closing(in_order(pool, jobs)) as results:
            for (name, group), (files[name], checksums) in zip(groups.items(), results, strict=True):
                for piece, crc in zip(group, checksums, strict=True):
                    box = Box(name, piece.offset, tuple(piece.data.shape), crc)
                    tensors[piece.name] = Entry(DTYPE_NAMES[piece.data.dtype], piece.shape, (box,))
    return Index(step=step, tensors={piece.name: tensors[piece.name] for piece in pieces}, files=files)


def _part(partial: Path, rank: int) -> Path:
    return partial / f"part-{rank:05d}.json"


def _take_part(partial: Path, rank: int) -> Index:
    path = _part(partial, rank)
    part = Index.loads_part(path.read_bytes(), str(path))
    path.unlink()
    return part


def _groups(pieces: Sequence[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in [*pieces, None]:
        if group and (piece is None or size + piece.data.nbytes > file_bytes):
            # Large items first: every tensor is then aligned to its item size, for readers that map the file.
            yield sorted(group, key=lambda piece: -piece.data.element_size())
            group, size = [], 0
        if piece is not None:
            group.append(piece)
            size += piece.data.nbytes


def _write_durably(path: Path, data: bytes) -> None:
    with open(path, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _commit(partial: Path, final: Path, step: int, was_whole: bool) -> None:
    old = None
    if final.exists():
        aside = hidden(final.parent, "replaced", step)
        if was_whole:
            old = aside
        else:
            aside = final.with_name(f"{final.name}.broken-{aside.name[-12:]}")
            log.warning("%s is broken and another one takes its place; it is kept as %s", final, aside)
        final.rename(aside)
    partial.rename(final)
    sync_folder(final.parent)
    if old is not None:
        shutil.rmtree(old)
