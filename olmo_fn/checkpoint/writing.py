"""Save a tree: written beside, made durable, then committed by one rename."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from olmo_fn.checkpoint.folder import hidden, step_path, sync_folder, writing
from olmo_fn.checkpoint.index import Box, Entry, File, Index
from olmo_fn.checkpoint.leaves import Leaves, check_meta, take_apart
from olmo_fn.checkpoint.pool import default_threads
from olmo_fn.checkpoint.tensorfile import DTYPE_NAMES, Piece, write_file
from olmo_fn.checkpoint.verifying import verify

log = logging.getLogger(__name__)

FILE_BYTES = 4 << 30


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
) -> Path:
    """Save ``tree`` as ``folder/step{step}`` and return that path; on return, the checkpoint is durable.

    ``tree`` is a nested dict of tensors of any shape, stride and device; ``meta`` is JSON of the caller's.
    Tensors are written from their own memory, without a copy if contiguous on the CPU. A new safetensors file
    begins after each ``file_bytes``. Until the last rename there is only a hidden folder, so a kill at any
    instant leaves the older checkpoints whole and this one absent. A *broken* checkpoint of the same step is
    moved aside, to ``step{step}.broken-*``; a whole one is replaced only if ``replace``.

    Raises ValueError for a tree or ``meta`` that cannot be stored and for a step that is there already,
    TimeoutError if another process keeps saving into ``folder``, and `SaveFailed` (an OSError) if the disk is
    full or fails.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save({"params": {"w": torch.ones(2, 3)}}, folder, step=5, meta={"tokens": 80}).name
    'step5'
    """
    leaves, meta = check_storable(take_apart(tree)), check_meta(meta)
    return save_leaves(leaves, folder, step, meta, replace=replace, file_bytes=file_bytes, threads=threads)


def check_storable(leaves: Leaves) -> Leaves:
    """``leaves`` as they are; ValueError that names the first that is not a tensor a checkpoint can hold."""
    for path, leaf in leaves.by_path.items():
        plain = type(leaf) in (torch.Tensor, torch.nn.Parameter)
        if not plain or leaf.layout != torch.strided or leaf.is_meta:
            kind = f"Tensor ({leaf.layout}, {leaf.device})" if plain else type(leaf).__name__
            raise ValueError(f"{path} is a {kind}; a checkpoint holds dense tensors, other values go into meta")
        if leaf.dtype not in DTYPE_NAMES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
            raise ValueError(f"{path} is {leaf.dtype}; a checkpoint holds {known}")
    return leaves


def save_leaves(
    leaves: Leaves,
    folder: str | Path,
    step: int,
    meta: dict[str, Any],
    *,
    replace: bool = False,
    file_bytes: int = FILE_BYTES,
    threads: int | None = None,
) -> Path:
    """`save` for a tree that is already taken apart."""
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step={step!r}: must be an int, 0 or more")
    folder, final = Path(folder), step_path(folder, step)
    need = sum(tensor.nbytes for tensor in leaves.by_path.values())
    pieces = [Piece(path, tensor, tuple(tensor.shape), (0,) * tensor.ndim) for path, tensor in leaves.by_path.items()]
    try:
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
                index = _write_files(partial, pieces, leaves.empty, step, meta, file_bytes, threads)
                _write_durably(partial / "index.json", index.dumps())
                sync_folder(partial)
                _commit(partial, final, step, was_whole)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except TimeoutError:
        raise
    except OSError as error:
        free = shutil.disk_usage(folder).free if folder.exists() else 0
        raise SaveFailed(
            f"could not save step {step} into {folder}: {error.strerror or error}; "
            f"the checkpoint needs {need:,} bytes, {free:,} are free there. Nothing of it is left behind and "
            "older checkpoints are untouched; free some space, or save into another folder"
        ) from error
    return final


def _write_files(
    partial: Path,
    pieces: Sequence[Piece],
    empty: tuple[str, ...],
    step: int,
    meta: dict[str, Any],
    file_bytes: int,
    threads: int | None,
) -> Index:
    files: dict[str, File] = {}
    boxes: dict[str, list[Box]] = {piece.name: [] for piece in pieces}
    with ThreadPoolExecutor(threads or default_threads()) as pool:
        for i, group in enumerate(_groups(pieces, file_bytes)):
            name = f"state-{i:05d}.safetensors"
            # Large items first: every tensor is then aligned to its item size, for readers that map the file.
            group.sort(key=lambda piece: -piece.data.element_size())
            files[name], checksums = write_file(partial / name, group, pool)
            for piece, crc in zip(group, checksums, strict=True):
                boxes[piece.name].append(Box(name, piece.offset, tuple(piece.data.shape), crc))
    tensors = {piece.name: Entry(DTYPE_NAMES[piece.data.dtype], piece.shape, tuple(boxes[piece.name])) for piece in pieces}
    return Index(step=step, tensors=tensors, files=files, empty=empty, meta=meta)


def _groups(pieces: Sequence[Piece], file_bytes: int) -> Iterator[list[Piece]]:
    group: list[Piece] = []
    size = 0
    for piece in pieces:
        if group and size + piece.data.nbytes > file_bytes:
            yield group
            group, size = [], 0
        group.append(piece)
        size += piece.data.nbytes
    if group:
        yield group


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
