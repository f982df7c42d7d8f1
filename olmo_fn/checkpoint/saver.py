"""Saving in the background: the state is copied, training goes on, a thread writes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from olmo_fn.checkpoint.folder import delete, step_path, steps, sweep, writing
from olmo_fn.checkpoint.holding import Holding, hold
from olmo_fn.checkpoint.leaves import check_meta
from olmo_fn.checkpoint.ranks import ALONE, Meeting, Ranks, beating
from olmo_fn.checkpoint.retention import Retention, to_delete
from olmo_fn.checkpoint.verifying import verify
from olmo_fn.checkpoint.writing import failures_named, save_held

log = logging.getLogger(__name__)


class Saver:
    """Saves one checkpoint at a time into ``folder``, in a thread, then deletes what ``retention`` gives up.

    `submit` returns when the state is copied, so that training may change or donate its memory. The copy is
    made into the same buffers each time, pinned for a GPU's tensors, so a saver takes the memory of one state,
    once; with ``ranks`` (all of them submit the same steps, see `save`) only of the boxes of DTensors that
    this rank writes, and of plain tensors. It uses no process group. An error of the background is logged
    when it happens and raised by the next `submit` or `wait`. Used as a context, a saver waits at the end.
    What a killed run left half written is removed at the start.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, Saver(folder, retention=Retention(keep_last=1)) as save:
    ...     for step in (10, 20):
    ...         save.submit({"params": {"w": torch.full((2,), step)}}, step=step)
    ...     save.wait().name, steps(folder)
    ('step20', [20])
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        retention: Retention | None = None,
        replace: bool = False,
        threads: int | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.folder = Path(folder)
        self.retention = retention or Retention()
        self.replace = replace
        self.threads = threads
        self.ranks = ranks.connection()
        self._buffers: dict[str, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[Path] | None = None
        self._alive = ExitStack()
        self._alive.enter_context(beating(ranks))
        if ranks.rank == 0:
            sweep(self.folder)

    def submit(self, tree: Mapping[str, Any], *, step: int, meta: Mapping[str, Any] | None = None) -> None:
        """Save ``tree`` as it is now; waits for the previous checkpoint, raises its error if it had any."""
        held, meta = hold(tree, self.ranks), check_meta(meta)
        self.wait()
        self._buffers = {piece.name: _copy(piece.data, self._buffers.get(piece.name)) for piece in held.pieces}
        copies = tuple(replace(piece, data=self._buffers[piece.name]) for piece in held.pieces)
        self._running = self._pool.submit(self._save, replace(held, pieces=copies), step, meta)

    @property
    def is_done(self) -> bool:
        """Whether a submitted checkpoint is committed, or failed, so that `wait` returns at once."""
        return self._running is not None and self._running.done()

    def wait(self) -> Path | None:
        """The path of the submitted checkpoint when it is committed, or its error; None if there is none."""
        running, self._running = self._running, None
        return running.result() if running is not None else None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            self.wait()
        except Exception:
            # It is in the log already, and must not hide why the block ended.
            if error is None:
                raise
        finally:
            self._pool.shutdown()
            self._alive.close()
            self._buffers = {}

    def _save(self, held: Holding, step: int, meta: dict[str, Any]) -> Path:
        try:
            with failures_named(self.folder, step), Meeting(self.ranks) as meeting:
                path = save_held(held, self.folder, step, meta, meeting, replace=self.replace, threads=self.threads)
            if self.ranks.rank == 0:
                retire(self.folder, self.retention, protected=step)
            return path
        except Exception as error:
            log.error("checkpoint of step %d: %s", step, error)
            raise


def retire(folder: str | Path, retention: Retention, *, protected: int) -> list[int]:
    """Delete what ``retention`` gives up in ``folder``, never ``protected``; the deleted steps.

    Only what looks whole (index, lengths, headers) counts and is deleted: a broken checkpoint neither takes
    the place of a whole one among the last k, nor is it removed.
    """
    if retention == Retention():
        return []
    folder = Path(folder)
    with writing(folder):
        whole = [step for step in steps(folder) if not verify(step_path(folder, step), deep=False)]
        gone = to_delete(whole, retention, protected=[protected])
        for step in gone:
            delete(step_path(folder, step), step)
    return gone


def _copy(leaf: torch.Tensor, buffer: torch.Tensor | None) -> torch.Tensor:
    if buffer is None or buffer.shape != leaf.shape or buffer.dtype != leaf.dtype:
        buffer = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.is_cuda)
    return buffer.copy_(leaf.detach())
